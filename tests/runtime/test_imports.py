"""What a process loads: the runtime draws without torch, and importing it loads no backend."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEVER = {"torch", "diffusers", "transformers", "onnx", "safetensors", "export", "training"}
OURS = {"engine", "runtime", "latentrt"}
LATE = {"onnxruntime", "tokenizers"}
CHOSEN = {"cuda", "openvino", "tensorrt", "tensorrt_bindings", "tensorrt_rtx"}
CHOSEN |= {"tensorrt_rtx_bindings"}
# What a plain prompt has no use for, by the rooms that are the largest.
UNUSED = {
    "engine.adapters.adapter",
    "engine.checkpoints.control_net",
    "engine.checkpoints.formats.gguf",
    "engine.checkpoints.formats.torch_archive",
    "engine.checkpoints.single_file",
    "engine.steering.ip_adapters",
    "runtime.calibration",
    "runtime.denoising.device_loop",
    "runtime.images.foreign",
    "runtime.images.safety",
    "runtime.images.upscaler",
}
MOST_OF_OURS = 125
NVIDIA = ("libcuda", "libcudart", "libnvinfer", "libtensorrt", "libnvrtc", "libcudnn")
DRAW = """
from engine.backends.settings import BackendSettings
from runtime import Pipeline
pipeline = Pipeline.load("pictogram", settings=BackendSettings(backend="cpu", threads=1))
image = pipeline("a", num_inference_steps=1).images[0]
pipeline("a", image=image, num_inference_steps=2)
"""


def loaded(code):
    """Run code in a fresh process; return the modules that it has loaded."""
    report = "\nimport json, sys; print(json.dumps([*sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code + report],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout))


def test_a_plain_prompt_loads_what_it_needs():
    ours = {name for name in loaded(DRAW) if name.partition(".")[0] in OURS}
    assert "runtime.pipeline" in ours
    assert not UNUSED & ours
    assert len(ours) <= MOST_OF_OURS


def test_drawing_loads_no_torch():
    modules = loaded(DRAW)
    assert modules >= LATE, "a picture was drawn"
    assert not (NEVER | CHOSEN) & modules


@pytest.mark.parametrize("code", ["import runtime", "import runtime.__main__", "import engine"])
def test_importing_loads_no_backend(code):
    assert not (NEVER | LATE | CHOSEN) & loaded(code)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_importing_maps_no_library_of_a_gpu():
    listing = "import runtime, runtime.__main__; print(open('/proc/self/maps').read())"
    command = [sys.executable, "-c", listing]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "libc.so" in done.stdout
    assert not [name for name in NVIDIA if name in done.stdout]


def test_public_names():
    import runtime

    names = {
        "Control",
        "DrawnImage",
        "Hires",
        "ImagePrompt",
        "Pipeline",
        "Plan",
        "Progress",
        "Region",
        "Request",
        "Result",
        "State",
        "StepInputs",
    }
    assert set(runtime.__all__) == names
    for name in runtime.__all__:
        assert isinstance(getattr(runtime, name), type)
