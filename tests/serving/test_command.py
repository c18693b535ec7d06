"""`latentrt serve` as a process: its options, its start, its end, and its engine that is killed."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from engine.errors import LatentrtError, RequestError
from serving.__main__ import main
from serving.operator_files import find_adapters, find_models
from serving.options import engine_settings, make_parser, read_keys

ROOT = Path(__file__).parents[2]
BODY = {"prompt": "a red apple", "seed": 7, "num_inference_steps": 25}


@contextmanager
def served(*options):
    """Run the command; yields its process and a client."""
    words = [sys.executable, "-m", "latentrt", "serve", "--port", "0", "--threads", "1", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    lines, reader = [], None
    try:
        url = re.search(r"http://\S+", process.stdout.readline())[0]
        reader = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
        reader.start()
        with httpx.Client(base_url=url, timeout=60) as client:
            end = time.monotonic() + 60
            while client.get("/ready").status_code != 200 and time.monotonic() < end:
                time.sleep(0.02)
            yield process, client, lines
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(20)
        if reader is not None:
            reader.join(5)
        process.stdout.close()
        process.stderr.close()


def begin(count, client, results):
    """Ask for pictures at the same time; returns who asks."""
    threads = [threading.Thread(target=post, args=(client, results)) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def post(client, results):
    answer = client.post("/v1/images/generations", json=BODY)
    results.append((answer.status_code, answer.json()))


def test_a_served_picture_an_engine_that_dies_and_an_end_that_waits():
    with served("--backend", "cpu") as (process, client, lines):
        alone = []
        post(client, alone)
        assert alone[0][0] == 200
        results = []
        asked = begin(4, client, results)
        time.sleep(0.5)
        (child,) = children(process.pid)
        os.kill(child, signal.SIGKILL)
        while client.get("/ready").status_code != 503:
            time.sleep(0.01)
        for thread in asked:
            thread.join(60)
        assert [status for status, _ in results] == [200] * 4
        files = {told["data"][0]["b64_json"] for _, told in results}
        assert files == {alone[0][1]["data"][0]["b64_json"]}, "the same bits"
        assert "latentrt_engine_restarts_total 1.0" in client.get("/metrics").text
        # SIGTERM: what was begun is finished, what comes is refused, and then it ends.
        results.clear()
        asked = begin(8, client, results)
        job = client.post("/api/v1/pictures", json=BODY).json()["id"]
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        while client.get("/ready").json()["status"] != "draining":
            time.sleep(0.01)
        refused = client.post("/api/v1/pictures", json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
        for thread in asked:
            thread.join(60)
        assert [status for status, _ in results] == [200] * 8
        while client.get(f"/api/v1/pictures/{job}").json()["state"] != "done":
            time.sleep(0.05)
        time.sleep(0.5)  # its client looks now and then
        file = client.get(f"/api/v1/pictures/{job}/image/0").content
        assert file == base64.b64decode(files.pop())
        assert process.wait(20) == 0
    log = "".join(lines)
    assert "a red apple" not in log
    assert "POST /v1/images/generations 200" in log
    assert "Traceback" not in log


def children(pid):
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def test_a_second_signal_ends_it_at_once():
    with served("--backend", "cpu") as (process, client, _):
        long = {**BODY, "num_inference_steps": 150, "num_images_per_prompt": 10}
        assert client.post("/api/v1/pictures", json=long).status_code == 202
        (child,) = children(process.pid)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.wait(15)
        end = time.monotonic() + 10
        while Path(f"/proc/{child}").exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert not Path(f"/proc/{child}").exists(), "the engine ends with it"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="it has no full device")
def test_a_full_disk_keeps_nobody_from_drawing(tmp_path):
    """No file may grow, and neither output takes a word: it draws, and ends as it should."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "latentrt", "serve", "--port", str(port), "--threads", "1"]
    words += ["--backend", "cpu", "--rows", "capacity"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LATENTRT_CACHE": str(tmp_path)}
    limited = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *words]
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(limited, stdout=full, stderr=full, env=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            end, state = time.monotonic() + 60, None
            while state != 200 and time.monotonic() < end and process.poll() is None:
                time.sleep(0.02)
                with suppress(httpx.ConnectError):
                    state = client.get("/ready").status_code
            results = []
            for thread in begin(3, client, results):
                thread.join(60)
        assert [status for status, _ in results] == [200] * 3
        assert len({told["data"][0]["b64_json"] for _, told in results}) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait(20)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--model", "no-name.safetensors"], "has no name"),
        (["--model", "x=/no/such/file"], "/no/such/file"),
        (["--model", "a/b=pictogram"], "is no name"),
        (["--model", "pictogram", "--model", "pictogram"], "two models"),
        (["--lora-dir", "/no/such/folder"], "is no folder"),
        (["--api-key-file", "/no/such/file"], "cannot be read"),
        (["--rows", "0"], "--rows is 0"),
        (["--rows", "many"], "preview, capacity or a number"),
        (["--model-memory", "a lot"], "--model-memory: 'a lot' is no size"),
        (["--max-queue", "0"], "--max-queue is 0"),
        (["--max-queue-seconds", "nan"], "--max-queue-seconds"),
    ],
)
def test_bad_options_are_one_sentence(given, said, capsys):
    assert main(given) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["--port", port]) == 2
    assert "cannot be listened on" in capsys.readouterr().err


def test_names_come_from_the_operator(tmp_path, capsys):
    outside = tmp_path / "secret.safetensors"
    folder = tmp_path / "loras"
    folder.mkdir()
    for path in (outside, folder / "ink.safetensors", folder / "two words.safetensors"):
        path.touch()
    (folder / "note.txt").touch()
    (folder / "link.safetensors").symlink_to(outside)
    assert set(find_adapters(folder)) == {"ink"}
    assert "link.safetensors is left out (it lies elsewhere)" in capsys.readouterr().err
    assert find_models(["pictogram"]) == {"pictogram": "pictogram"}
    shipped = str(ROOT / "engine" / "shipped" / "pictogram")
    assert find_models([f"mine={shipped}"]) == {"mine": shipped}


def test_settings_reach_the_engine(tmp_path):
    from serving.child import EngineSettings, row_limits

    given = ["--rows", "4", "--max-queue", "9", "--backend", "cpu", "--precision", "float32"]
    given += ["--model-memory", "1.5GiB"]
    settings = engine_settings(make_parser("serve").parse_args(given))
    assert (settings.rows, settings.limits.jobs, settings.precision) == (4, 9, "float32")
    assert settings.model_bytes == 3 << 29
    chosen = engine_settings(make_parser("serve").parse_args(["--rows", "capacity"]))
    assert row_limits(chosen).largest == 1, "before anything is measured"
    assert chosen.model_bytes > 0
    again = EngineSettings.from_json(json.loads(json.dumps(settings.as_json())))
    assert again == settings
    assert row_limits(engine_settings(make_parser("serve").parse_args([]))).largest == 8


def test_who_may_come_in(tmp_path):
    parse = make_parser("serve").parse_args
    assert read_keys(parse([])) is None
    assert read_keys(parse(["--host", "0.0.0.0", "--open"])) is None
    with pytest.raises(RequestError, match="--open"):
        read_keys(parse(["--host", "192.168.0.7"]))
    (tmp_path / "keys").write_text("anna:" + "0" * 64)
    keys = read_keys(parse(["--host", "::", "--api-key-file", str(tmp_path / "keys")]))
    assert set(keys.hashes) == {"anna"}
    assert issubclass(RequestError, LatentrtError)
