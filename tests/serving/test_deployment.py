"""The files of deploy/: each is read as its program reads it, and says what the server takes."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import crossplane
import httpx
import pytest
import yaml

from serving.configuration import parse_options
from serving.limits import Limits
from serving.options import make_parser
from serving.row_limits import ROWS
from tests.support.servers import SlowStudio, serving

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
NAME = "pictures.example.org"
UPSTREAM = "127.0.0.1:7860"


def options(arguments, environment=None):
    return parse_options(make_parser("serve"), arguments, environment or {})


@pytest.fixture(scope="module")
def unit():
    read = configparser.ConfigParser(strict=False, interpolation=None)
    read.optionxform = str
    read.read_string((DEPLOY / "latentrt.service").read_text())
    return read


@pytest.fixture(scope="module")
def instructions():
    """Return the Dockerfile's instructions, as pairs of a name and what follows."""
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    joined = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line]


def test_the_unit_starts_the_server_and_lets_it_finish(unit):
    service = unit["Service"]
    program, command, *given = shlex.split(service["ExecStart"])
    assert (Path(program).name, command) == ("latentrt", "serve")
    given[given.index("--config") + 1] = str(DEPLOY / "server.toml")
    read = options(given)
    assert (read.host, read.port, read.hosts) == ("127.0.0.1", 7860, [NAME])
    assert str(read.api_key_file) == "${CREDENTIALS_DIRECTORY}/keys"
    assert service["LoadCredential"].startswith("keys:")
    assert service["KillMode"] == "mixed", "or the engine would die at the first signal"
    assert int(service["TimeoutStopSec"]) > Limits().queue_seconds
    assert service["Environment"].endswith(f"/{service['CacheDirectory']}")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_reads_the_unit(tmp_path):
    text = (DEPLOY / "latentrt.service").read_text()
    path = tmp_path / "latentrt.service"
    path.write_text(text.replace("/opt/latentrt/bin/latentrt", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True)
    assert "latentrt.service" not in done.stderr, done.stderr


def test_the_settings_are_options():
    given = tomllib.loads((DEPLOY / "server.toml").read_text())
    assert {"model", "port", "allow-host"} == set(given)


def test_nginx_reads_its_file():
    read = crossplane.parse(str(DEPLOY / "nginx.conf"), check_ctx=False)
    assert read["status"] == "ok", read["errors"]
    servers = [each["block"] for each in read["config"][0]["parsed"]]
    assert [each["directive"] for each in read["config"][0]["parsed"]] == ["server", "server"]
    plain, tls = ({each["directive"]: each for each in block} for block in servers)
    assert plain["return"]["args"] == ["301", "https://$host$request_uri"]
    assert tls["listen"]["args"] == ["443", "ssl"]
    assert tls["server_name"]["args"] == [NAME]
    (most,) = tls["client_max_body_size"]["args"]
    assert int(most.removesuffix("m")) << 20 > Limits().body_bytes
    places = {
        each["args"][0]: each["block"]
        for each in servers[1]
        if each["args"][:1] and "block" in each
    }
    passed = [(each["directive"], *each["args"]) for each in places["/"]]
    assert ("proxy_pass", f"http://{UPSTREAM}") in passed
    assert ("proxy_set_header", "Host", "$host") in passed
    assert ("proxy_set_header", "X-Forwarded-Proto", "$scheme") in passed
    assert ("proxy_buffering", "off") in passed
    assert [each["directive"] for each in places["/metrics"]] == ["deny"]


def caddy(lines):
    """Read a block of a Caddyfile: directives with their arguments and blocks."""
    read = []
    for line in lines:
        words = shlex.split(line, comments=True)
        if words == ["}"]:
            return read
        if words and words[-1] == "{":
            read.append((*words[:-1], caddy(lines)))
        elif words:
            assert not {"{", "}"} & set(words), line
            read.append((*words,))
    return read


def test_caddys_file_is_one():
    text = (DEPLOY / "Caddyfile").read_text()
    assert text.count("{") == text.count("}")
    ((name, site),) = caddy(iter(text.splitlines()))
    assert name == NAME
    directives = {each[0]: each[1:] for each in site}
    assert directives["reverse_proxy"][0] == UPSTREAM
    assert ("flush_interval", "-1") in directives["reverse_proxy"][1]
    ((_, most),) = directives["request_body"][0]
    assert int(most.removesuffix("MB")) * 10**6 > Limits().body_bytes
    assert directives["respond"] == ("/metrics", "403")


def test_a_browser_comes_through_a_proxy_with_tls():
    """What both proxies send: their name as Host, and the scheme that the browser used."""
    with serving(SlowStudio(0), names=[NAME]) as running:
        url = f"{running.url}/sdapi/v1/options"
        sent = {"host": NAME, "origin": f"https://{NAME}", "x-forwarded-for": "192.0.2.1"}
        through = {**sent, "x-forwarded-proto": "https"}
        assert httpx.post(url, json={}, headers=through).status_code == 200
        assert httpx.post(url, json={}, headers=sent).status_code == 403
        foreign = {**through, "host": "elsewhere.example"}
        assert httpx.post(url, json={}, headers=foreign).status_code == 403


def test_the_image_is_made_of_what_is_there(instructions):
    known = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "VOLUME", "EXPOSE", "STOPSIGNAL",
             "HEALTHCHECK", "ENTRYPOINT", "USER"}  # fmt: skip
    assert {name for name, _ in instructions} == known
    stages = [
        re.fullmatch(r"(\S+) AS (\w+)", said) for name, said in instructions if name == "FROM"
    ]
    made = [stage[2] for stage in stages]
    assert made == ["wheel", "base", "cuda", "ray", "cpu"], "cpu is the default"
    for name, said in instructions:
        if name == "COPY" and not said.startswith("--from="):
            for path in said.split()[:-1]:
                assert (ROOT / path).exists(), path
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = {said.split()[0] for name, said in instructions if name == "COPY"}
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {package.removesuffix("*") for package in packages} <= copied
    extras = re.findall(
        r"\[(\w+)\]\"", " ".join(said for name, said in instructions if name == "RUN")
    )
    assert set(extras) <= set(project["project"]["optional-dependencies"])


def test_the_container_asks_for_keys_and_says_how_it_is(instructions):
    said = dict(instructions)
    environment = dict(each.split("=", 1) for each in shlex.split(said["ENV"]))
    program, command = json.loads(said["ENTRYPOINT"])
    assert (program, command) == ("latentrt", "serve")
    read = options([], environment)
    assert (read.host, read.port) == ("0.0.0.0", int(said["EXPOSE"]))
    assert str(read.api_key_file) == "/run/secrets/keys"
    assert environment["LATENTRT_CACHE"] == said["VOLUME"]
    assert said["USER"] == "latentrt"
    _, flag, code = json.loads(said["HEALTHCHECK"].removeprefix("CMD "))
    with serving(SlowStudio(0)) as running:
        asked = code.replace(f"http://{UPSTREAM}", running.url)
        assert asked != code
        assert subprocess.run([sys.executable, flag, asked]).returncode == 0
    assert subprocess.run([sys.executable, flag, asked], stderr=subprocess.PIPE).returncode == 1


@pytest.fixture(scope="module")
def ray_file():
    return yaml.safe_load((DEPLOY / "ray.yaml").read_text(encoding="utf-8"))


def test_ray_is_told_to_listen_on_this_machine_alone(ray_file):
    (app,) = ray_file["applications"]
    read = parse_options(make_parser("serve run"), [], {}, app["args"])
    assert ray_file["http_options"]["host"] == read.host == "127.0.0.1"
    assert ray_file["http_options"]["port"] == 7860
    module, function = app["import_path"].split(":")
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    assert f"def {function}(" in path.read_text(encoding="utf-8")


def test_rays_replicas_may_finish_what_they_have_begun(ray_file):
    (app,) = ray_file["applications"]
    gateway, engine = app["deployments"]
    assert (gateway["name"], engine["name"]) == ("Gateway", "Engine")
    assert gateway["num_replicas"] >= 2, "one may die"
    for deployment in (gateway, engine):
        assert deployment["graceful_shutdown_timeout_s"] > Limits().queue_seconds
    scaling = engine["autoscaling_config"]
    assert 1 <= scaling["min_replicas"] < scaling["max_replicas"]
    assert scaling["target_ongoing_requests"] == ROWS, "a step's rows"
