"""No process of this project sends usage statistics, or writes beyond its cache and its output."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.network_guard import STRACE, run_guarded

ROOT = Path(__file__).parents[1]
API = """
import sys
from runtime import Pipeline
from engine.backends.settings import BackendSettings
settings = BackendSettings(backend=sys.argv[1], threads=1)
small = {"num_inference_steps": 1, "height": 32, "width": 32}
Pipeline.load("pictogram", settings=settings)("a cat", **small)
"""
SERVE = """
import subprocess, sys, time, urllib.request
command = [sys.executable, "-m", "serving", "--port", "0", "--backend", "cpu", "--threads", "1"]
server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
url = server.stdout.readline().split()[2]
body = b'{"prompt": "a cat", "num_inference_steps": 1, "size": "32x32"}'
head = {"content-type": "application/json"}
while True:
    try:
        request = urllib.request.Request(url + "/v1/images/generations", body, head)
        with urllib.request.urlopen(request) as answer:
            assert b"b64_json" in answer.read()
        break
    except OSError:
        assert server.poll() is None
        time.sleep(0.2)
server.terminate()
assert server.wait() == 0
"""
BUILD = """
import sys
from pathlib import Path
from engine.backends.tensorrt.build import build
from engine.backends.tensorrt.build_request import BuildRequest, BuildSettings
from engine.backends.tensorrt.profiles import Profile, Range
from engine.graphs.graph import find_graph, graph_folders
from engine.model import Model, find_model
model, sides = Model.open(find_model("pictogram")), Range(64, 64, 64)
settings = BuildSettings(profiles=(Profile(height=sides, width=sides),), target="sm89")
part = "vae_decoder"
graph = find_graph(part, model.config(part), "float16", graph_folders(), model.path)
request = BuildRequest(
    library="tensorrt_rtx", part=part, graph=graph.path, model=model.path, settings=settings
)
build(request, Path(sys.argv[1]))
"""
MODEL = "engine/shipped/pictogram"
SMALL = ["--steps", "1", "--threads", "1", "--height", "32", "--width", "32"]
# By what must be installed; {out} is a path in the process' own folder.
PROCESSES = {
    "API": ("onnxruntime", ["-c", API, "cpu"]),
    "API on OpenVINO": ("openvino", ["-c", API, "openvino"]),
    "command": ("onnxruntime", ["-m", "latentrt", "a cat", *SMALL, "--out", "{out}.png"]),
    "info": ("onnxruntime", ["-m", "latentrt", "info", MODEL]),
    "server": ("uvicorn", ["-c", SERVE]),
    "builder": ("tensorrt_rtx_bindings", ["-c", BUILD, "{out}.engine"]),
    "tracing": ("torch", ["-m", "export", MODEL, "--out", "{out}"]),
}
SLOW = {"tracing"}  # two minutes, since strace looks at every file of torch


def did(folder, arguments, **variables):
    """Run Python in a fresh home; return what it has done beyond its folder."""
    home, out = folder / "home", str(folder / "ours" / "out")
    home.mkdir()
    command = [sys.executable, *(part.replace("{out}", out) for part in arguments)]
    return run_guarded(command, folder, home, **variables)


def test_the_library_alone_would_write(tmp_path):
    """What the other tests rest on; wheels without telemetry, such as those of a distribution."""
    if not did(tmp_path, ["-c", "import onnxruntime"]).files:
        pytest.skip("this build of ONNX Runtime reports nothing")


@pytest.mark.skipif(not STRACE, reason="strace is not installed")
def test_what_a_library_would_send_is_seen(tmp_path):
    """Without `site` there is no guard in Python, as in a library's own code."""
    send = "import socket; socket.socket(type=socket.SOCK_DGRAM).connect(('192.0.2.1', 53))"
    elsewhere = tmp_path.with_name("elsewhere")
    seen = did(tmp_path, ["-S", "-c", f"{send}; open({str(elsewhere)!r}, 'w')"])
    assert (seen.addresses, seen.files) == ({"192.0.2.1"}, {str(elsewhere)})


@pytest.mark.parametrize(
    "code",
    [
        "socket.create_connection(('192.0.2.1', 9))",
        "socket.getaddrinfo('example.com', 80)",
        "subprocess.check_call([sys.executable, '-c', 'import socket; socket.gethostbyname(9)'])",
    ],
)
def test_what_python_would_send_is_refused(tmp_path, code):
    with pytest.raises(AssertionError, match=r"refused to|CalledProcessError"):
        did(tmp_path, ["-c", f"import socket, subprocess, sys; {code}"])


@pytest.mark.parametrize(
    "process",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PROCESSES],
)
def test_a_process_of_ours_sends_nothing_and_writes_nothing(tmp_path, process):
    library, arguments = PROCESSES[process]
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    seen = did(tmp_path, arguments)
    assert seen.addresses == set()
    assert seen.files == set()


def test_it_is_off_whatever_the_environment_says(tmp_path):
    seen = did(tmp_path, PROCESSES["API"][1], ORT_DISABLE_TELEMETRY="0")
    assert seen.addresses == seen.files == set()


def test_events_are_stopped_where_the_library_was_imported_before(monkeypatch):
    import onnxruntime

    from engine.backends.onnxruntime.cpu import _import

    calls = []
    monkeypatch.setattr(onnxruntime, "disable_telemetry_events", lambda: calls.append(True))
    assert _import() is onnxruntime
    assert calls == [True]


BEFORE = "import onnxruntime\n" + API


def test_an_app_that_imported_the_library_before_is_told(tmp_path):
    """What that import began is not ours to stop; with the variable set nothing begins."""
    seen = did(tmp_path, ["-W", "error", "-c", BEFORE, "cpu"], ORT_DISABLE_TELEMETRY="1")
    assert seen.addresses == seen.files == set()


def test_the_warning_names_what_to_do(monkeypatch):
    from engine.backends.onnxruntime import cpu

    monkeypatch.setattr(cpu, "TELEMETRY_BEGAN", True)
    with pytest.warns(RuntimeWarning, match="set ORT_DISABLE_TELEMETRY=1"):
        cpu._import()
