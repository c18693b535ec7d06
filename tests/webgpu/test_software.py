"""The real WebGPU provider on a Vulkan that the processor computes.

Where the provider's package is installed, VK_ICD_FILENAMES names the driver and
ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER is 1, as in the step of .ci/run.
"""

import os
from importlib.util import find_spec

import numpy as np
import pytest

from engine.backends.onnxruntime.webgpu import PROVIDER
from engine.backends.onnxruntime.webgpu_trials import has_attention, has_float16
from engine.backends.settings import BackendSettings
from engine.devices.webgpu import find_device
from runtime import Pipeline

SOFTWARE = "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"
pytestmark = pytest.mark.skipif(
    find_spec("onnxruntime_ep_webgpu") is None or os.environ.get(SOFTWARE) != "1",
    reason="the provider, or a Vulkan of the processor's, is not there",
)
REQUEST = {"prompt": "red apple, fluent style", "seed": 7, "num_inference_steps": 2}
REQUEST |= {"height": 64, "width": 64}
MIN_PSNR = 60  # dB beside the processor's picture; 89 and 86 were seen


@pytest.fixture(scope="module")
def pipelines():
    names = ("cpu", "webgpu")
    settings = [BackendSettings(backend=name) for name in names]
    host, gpu = (Pipeline.load(settings=each, precision="float32") for each in settings)
    return host, gpu


MORE = {
    "plain": {},
    "edges that join": {"seamless": "both", "sampler": "ddim"},
    "guided otherwise": {"pag_scale": 2.0, "apg": (0.0, 15.0, -0.5)},
    "shrunk": {"deep_shrink": 0.5, "cache_interval": 2},
}


@pytest.mark.parametrize("name", MORE)
def test_the_picture_is_the_processors_and_no_node_runs_there(pipelines, name):
    expected, found = (
        np.asarray(pipeline(**REQUEST | MORE[name]).images[0], np.float64) for pipeline in pipelines
    )
    error = np.mean((expected - found) ** 2)
    assert error <= 255**2 / 10 ** (MIN_PSNR / 10), f"{10 * np.log10(255**2 / error):.1f} dB"
    engines = pipelines[1].engines
    for part, engine in [*engines.opened.items(), *engines.opened_variants.items()]:
        for placed in engine.placements():
            assert placed[PROVIDER]
            assert set(placed) == {PROVIDER}, f"{part}: {placed}"


def test_what_is_tried_on_the_device():
    """SwiftShader has no float16, and subgroups of four lanes, for which attention is wrong."""
    device = find_device()
    assert device.is_software
    assert not has_float16(device)
    assert not has_attention(device, "float32")
