"""No process of this project sends usage statistics, or writes beyond its cache and its output."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.configs.safety_checker import SafetyCheckerConfig
from tests.support.digits import write_digits
from tests.support.network_guard import STRACE, run_guarded
from tests.support.pictures import drawing
from tests.support.upscaler_files import write_upscaler

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
BENCH = """
import sys
from benchmarks import machine, overhead
from latentrt.__main__ import main
machine.SIDE, overhead.STEPS = 64, 2  # what takes long sends no more than what is short
sys.exit(main(["bench", "overhead", "--repeats", "1"]))
"""
MODEL = "engine/shipped/pictogram"
SMALL = ["--steps", "1", "--threads", "1", "--height", "32", "--width", "32"]
ON_CPU = [*SMALL, "--backend", "cpu"]
ON_OPENVINO = [*SMALL, "--backend", "openvino"]
DRAW = ["-m", "latentrt", "a cat", "--out", "{out}.png"]
SIGN = ["--c2pa-cert", "{in}/es256-chain.pem", "--c2pa-key", "{in}/es256-key.pem"]
CALIBRATE = ["-m", "latentrt", "calibrate", MODEL, "--steps", "1", "--prompt", "cat"]
UPSCALE = ["-m", "latentrt", "upscale", "{in}/photo.png", "--upscaler", "{in}/up.safetensors"]
STEERED = ["--model", "{in}/steered/v1-5-pruned.safetensors", "--graphs", "{in}/steered/graphs"]
STEERED += ["--control", "{in}/steered/net", "--control-image", "{in}/photo.png"]
STEERED += ["--precision", "float32"]
DDPM = ["-m", "training", "ddpm", "--idx", "{in}/digits", "--classes", "zero,one"]
# By what must be installed; {in} is a folder with files, {out} a path in the process' own.
PROCESSES = {
    "API": ("onnxruntime", ["-c", API, "cpu"]),
    "API on OpenVINO": ("openvino", ["-c", API, "openvino"]),
    "command": ("onnxruntime", [*DRAW, *SMALL]),
    "safety checker": ("onnxruntime", [*DRAW, *ON_CPU, "--safety-checker", "{in}/checker"]),
    "safety checker on OpenVINO": (
        "openvino",
        [*DRAW, *ON_OPENVINO, "--safety-checker", "{in}/checker"],
    ),
    "signing": ("c2pa", [*DRAW, *ON_CPU, *SIGN]),
    "grid": (
        "onnxruntime",
        ["-m", "latentrt", "grid", "a cat", "--x", "seed=1,2", *ON_CPU, "--out", "{out}.png"],
    ),
    "batch": (
        "onnxruntime",
        ["-m", "latentrt", "batch", "{in}/requests.txt", *ON_CPU, "--out", "{out}"],
    ),
    "upscaler": ("onnxruntime", [*UPSCALE, "--out", "{out}.png"]),
    "upscaler on OpenVINO": ("openvino", [*UPSCALE, "--backend", "openvino", "--out", "{out}.png"]),
    "preprocessor": (
        "onnxruntime",
        ["-m", "latentrt", "preprocess", "canny", "{in}/photo.png", "--out", "{out}.png"],
    ),
    "calibration": ("openvino", [*CALIBRATE, "--threads", "1"]),
    "info": ("onnxruntime", ["-m", "latentrt", "info", MODEL]),
    "info of a picture": ("onnxruntime", ["-m", "latentrt", "info", "{in}/photo.png"]),
    "cache": ("onnxruntime", ["-m", "latentrt", "export", "cache"]),
    "benchmark": ("onnx", ["-c", BENCH]),
    "server": ("uvicorn", ["-c", SERVE]),
    "builder": ("tensorrt_rtx_bindings", ["-c", BUILD, "{out}.engine"]),
    "tracing": ("torch", ["-m", "export", MODEL, "--out", "{out}"]),
    "training": (
        "torch",
        [*DDPM, *["--steps", "1", "--batch-size", "4", "--work", "{out}", "--out", "{out}/m"]],
    ),
    "ControlNet on OpenVINO": ("diffusers", [*DRAW, *ON_OPENVINO, *STEERED]),
}
SLOW = {"tracing"}  # a minute


def write_inputs(folder):
    """Write what processes read: pictures, requests, an upscaler, a safety checker, digits."""
    drawing(64, 64).save(folder / "photo.png")
    (folder / "requests.txt").write_text("a cat\na dog\n")
    write_upscaler(folder / "up.safetensors")
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    config = SafetyCheckerConfig(**small, projection_dim=8)
    shapes = {
        **config.tensor_shapes(),
        **{"concept_embeds": (17, 8), "concept_embeds_weights": (17,)},
        **{"special_care_embeds": (3, 8), "special_care_embeds_weights": (3,)},
    }
    rng = np.random.default_rng(0)
    checker = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    (folder / "checker").mkdir()
    save_file(checker, folder / "checker" / "model.safetensors")
    described = json.dumps({"vision_config": small, "projection_dim": 8})
    (folder / "checker" / "config.json").write_text(described)
    (folder / "digits").mkdir()
    write_digits(folder / "digits", per_class=4, side=16, classes=2)
    if find_spec("c2pa"):
        from tests.support.certificates import write_certificates  # needs cryptography, as that

        write_certificates(folder)


def write_steered(folder):
    """Write a small model with a ControlNet and their graphs, which torch makes."""
    from engine.model import Model
    from runtime import Pipeline
    from tests.support.controls import small_control_net, trace_control_graphs, write_control_net
    from tests.support.small_models import SMALL as MODELS
    from tests.support.small_models import trace_graphs

    (folder / "graphs").mkdir(parents=True)
    small = MODELS["sd1"]
    net = write_control_net(small_control_net(small), folder / "net")
    file = small.write_file(folder)
    trace_graphs(Model.open(file), folder / "graphs")
    pipeline = Pipeline.load(file, graphs=folder / "graphs", controls={"net": net})
    trace_control_graphs(pipeline, folder / "graphs")


def did(folder, arguments, **variables):
    """Run Python in a fresh home; return what it has done beyond its folder."""
    home, out, inputs = folder / "home", str(folder / "ours" / "out"), folder / "in"
    home.mkdir()
    if any("{in}" in part for part in arguments):
        inputs.mkdir()
        write_inputs(inputs)
    if any("{in}/steered" in part for part in arguments):
        write_steered(inputs / "steered")
    named = (part.replace("{out}", out).replace("{in}", str(inputs)) for part in arguments)
    command = [sys.executable, *named]
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
