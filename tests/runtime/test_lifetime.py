"""A pipeline goes with its last reference, or when it is closed, and leaves nothing behind."""

import gc
import weakref
from importlib.util import find_spec

import numpy as np
import pytest

from engine.backends.settings import BackendSettings
from engine.errors import BackendError
from runtime import Hires, Pipeline, Request
from tests.support.fake_cuda import FakeDevice, FakeEngine
from tests.support.pictures import drawing

REQUEST = {"prompt": "a", "seed": 1, "num_inference_steps": 2, "height": 64, "width": 64}
PARTS = ("text_encoder", "step", "step_shallow", "vae_decoder", "vae_encoder")


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def load(backend="cpu"):
    settings = BackendSettings(backend=backend, threads=1)
    return Pipeline.load("pictogram", settings=settings, precision="float32")


def draw(pipeline):
    pipeline(**REQUEST)


def watch(pipeline):
    for progress in pipeline.denoise(pipeline.plan(Request(**REQUEST))):
        progress.denoised()


def leave(pipeline):
    next(pipeline.denoise(pipeline.plan(Request(**REQUEST))))


def change(pipeline):
    pipeline.set_loras([])
    pipeline.set_embeddings([])
    pipeline(**REQUEST | {"image": drawing(64, 64), "hires": Hires(scale=1.5)})


def fail(pipeline):
    with pytest.raises(ValueError, match="height"):
        pipeline(**REQUEST | {"height": 63})


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("backend", ["cpu", "openvino"])
@pytest.mark.parametrize("use", [draw, watch, leave, change, fail])
def test_a_pipeline_is_freed_by_del_alone(use, backend):
    if backend == "openvino" and find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    pipeline = load(backend)
    use(pipeline)
    held = [pipeline, pipeline.engines, pipeline.model, *pipeline.engines.opened.values()]
    references = [weakref.ref(each) for each in held if hasattr(each, "__weakref__")]
    assert len(references) >= 2
    del held, pipeline
    assert [reference() for reference in references] == [None] * len(references)


def on_device(device):
    host, pipeline = load(), load()
    for part in PARTS:
        pipeline.engines.opened[part] = FakeEngine(host.engine(part), device)
    return pipeline


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("use", [draw, watch, change])
def test_a_devices_memory_is_freed_by_del_alone(use):
    device = FakeDevice()
    pipeline = on_device(device)
    before = device.allocated
    for _ in range(3):  # call by call, recorded, launched
        use(pipeline)
    assert use is watch or device.allocated > before
    del pipeline
    assert device.allocated - device.scratch(0).nbytes <= before


def test_closing_frees_engines_and_a_devices_memory():
    device = FakeDevice()
    pipeline = on_device(device)
    before = device.allocated
    for _ in range(2):
        draw(pipeline)
    engine = weakref.ref(pipeline.engines.opened["step"])
    pipeline.close()
    assert engine() is None
    assert device.allocated - device.scratch(0).nbytes <= before
    assert not pipeline.engines.opened


def test_a_closed_pipeline_says_so():
    with load() as pipeline:
        expected = pipeline(**REQUEST).images
    with pytest.raises(BackendError, match=r"pictogram were closed; load it again"):
        pipeline(**REQUEST)
    pipeline.close()  # once more does no harm
    assert np.array_equal(load()(**REQUEST).images[0], expected[0])
