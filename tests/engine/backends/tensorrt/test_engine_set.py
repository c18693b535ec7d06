"""Engines found by what a run needs, and pictures drawn with them, on a stand-in for a GPU."""

from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.adapters.adapter import adapt_model
from engine.backends.binding import bind
from engine.backends.settings import BackendSettings
from engine.backends.tensorrt import engine_set as tensorrt_ladder
from engine.backends.tensorrt import facts as tensorrt_facts
from engine.backends.tensorrt.build_request import BuildSettings
from engine.backends.tensorrt.engine_store import EngineStore, weights_hash
from engine.backends.tensorrt.facts import engine_facts
from engine.backends.tensorrt.profiles import Profile, Range, input_shapes, relevant
from engine.errors import BackendError
from engine.graphs.graph import find_graph, graph_folders
from engine.model import Model, find_model
from runtime import Pipeline
from tests.support.fake_cuda import FakeDevice
from tests.support.fake_tensorrt import FakeTensorRT

MODEL = Model.open(find_model("pictogram"))
REQUEST = {"prompt": "a red apple", "seed": 3, "num_inference_steps": 3, "sampler": "euler_a"}
WHOLE = Profile(
    height=Range(64, 64, 128),
    width=Range(64, 64, 128),
    batch=Range(1, 1, 2),
    tokens=Range(32, 32, 32),
)
SMALL = Profile(height=Range(64, 64, 64), width=Range(64, 64, 64), tokens=Range(32, 32, 32))
PARTS = ("text_encoder", "step", "vae_decoder")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def device(monkeypatch):
    device = FakeDevice(total=2**32)
    device.facts = SimpleNamespace(name="Stand-in", sm="sm89", driver="1.2")
    for module in (tensorrt_ladder, tensorrt_facts):
        monkeypatch.setattr(module, "find_device", lambda: device)
    monkeypatch.setattr("engine.devices.cuda.find_device", lambda: device)
    return device


@pytest.fixture
def library(device, monkeypatch):
    library = FakeTensorRT(device)
    for module in (tensorrt_ladder, tensorrt_facts):
        monkeypatch.setattr(module, "library", lambda name: library)
    return library


@pytest.fixture
def builds(library, monkeypatch):
    """Build with the stand-in; the requests that came."""
    requests = []

    def build(request, path):
        requests.append(request)
        write(library, request.part, request.settings, MODEL, path)

    monkeypatch.setattr(tensorrt_ladder, "build", build)
    return requests


def graph_of(part):
    return find_graph(part, MODEL.config(part), "float16", graph_folders(), MODEL.path)


def write(library, part, settings, model, path, weights=None):
    graph, config = graph_of(part), model.config(part)
    shapes = [input_shapes(part, config, profile) for profile in settings.profiles]
    held = dict(bind(graph, model.weights(part) if weights is None else weights))
    library.write_plan(path, graph, held, shapes, refit=settings.refit)


def put(library, *profiles, parts=PARTS, refit=False, weights=None):
    """Put engines into the cache as `python -m export` does."""
    for part in parts:
        chosen = tuple(dict.fromkeys(relevant(part, profile) for profile in profiles))
        settings = BuildSettings(profiles=chosen, refit=refit)
        held = MODEL.weights(part) if weights is None else weights[part]
        graph = graph_of(part)
        named = {name: held[name] for name in graph.weights}
        facts = engine_facts(
            "tensorrt_rtx", graph, settings, lambda named=named: weights_hash(named)
        )
        EngineStore().get_or_build(
            facts, lambda path, p=part, s=settings, h=held: write(library, p, s, MODEL, path, h)
        )


def pipeline(**settings):
    chosen = BackendSettings(backend="tensorrt_rtx", **settings)
    return Pipeline.load(settings=chosen)


def pixels(result):
    return np.stack([np.asarray(image) for image in result.images])


@pytest.fixture(scope="module")
def host():
    settings = BackendSettings(backend="cpu", threads=1)
    return Pipeline.load(precision="float16", settings=settings)


def test_pictures_are_those_of_the_same_graphs_on_the_processor(host, library, device):
    put(library, WHOLE)
    drawn = pipeline()
    assert (drawn.engines.settings.backend, drawn.engines.precision) == ("tensorrt_rtx", "float16")
    for options in (
        {"height": 64, "width": 64},
        {"height": 128, "width": 64, "prompt": ["a", "b"]},
    ):
        options = REQUEST | options
        expected = pixels(host(**options))
        for _ in range(3):
            np.testing.assert_array_equal(pixels(drawn(**options)), expected)
    assert device.counts["replay"] == 2, "of each form the first run records, the last is proven"


def test_each_size_takes_the_engine_that_fits_it_most_closely(library, device):
    put(library, WHOLE)
    put(library, SMALL, parts=("step",))
    drawn = pipeline()
    drawn(**REQUEST, height=64, width=64)
    assert device.counts["load"] == 3
    ladder = drawn.engine("step")
    (rung,) = ladder._engines.values()
    wanted = relevant("step", SMALL).to_dict()
    (small,) = (f for f, _ in EngineStore().find(part="step") if f.profiles == (wanted,))
    assert [*ladder._engines] == [small.key()]
    drawn(**REQUEST, height=128, width=128)
    assert device.counts["load"] == 4
    assert len(ladder._engines) == 2
    assert rung in ladder._engines.values()


def test_a_size_that_no_engine_takes(library):
    put(library, SMALL)
    with pytest.raises(BackendError) as caught:
        pipeline()(**REQUEST, height=128, width=64)
    message = str(caught.value)
    assert "64 × 128 pixels" in message, "what came, width first"
    assert "64 × 64 pixels" in message, "what is allowed"
    assert "--height 128 --width 64" in message, "what to do"
    assert "--build-missing" in message
    assert "\n" not in message


def test_without_an_engine(library):
    with pytest.raises(BackendError, match=r"no engine of tensorrt_rtx in the cache has the text_"):
        pipeline()(**REQUEST)


def test_what_is_missing_is_built_where_that_is_wanted(host, library, builds):
    options = REQUEST | {"height": 64, "width": 64, "prompt": ["a", "b"]}
    drawn = pipeline(build_missing=True)
    np.testing.assert_array_equal(pixels(drawn(**options)), pixels(host(**options)))
    assert [request.part for request in builds] == [*PARTS]
    step = builds[1].settings.profiles[0]
    assert (step.height, step.batch) == (Range(64, 64, 64), Range(2, 2, 2))
    assert builds[1].model == MODEL.path
    pipeline()(**options)
    assert len(builds) == 3, "it is in the cache"
    drawn(**options | {"height": 128})
    assert [request.part for request in builds[3:]] == ["step", "vae_decoder"]


def test_engines_of_other_weights_or_gpus_are_not_taken(library, device):
    weights = {part: {n: a * 2 for n, a in MODEL.weights(part).items()} for part in PARTS}
    put(library, WHOLE, weights=weights)
    with pytest.raises(BackendError, match="with these weights for this GPU"):
        pipeline()(**REQUEST)
    put(library, WHOLE)
    device.facts.sm = "sm120"
    with pytest.raises(BackendError, match="with these weights for this GPU"):
        pipeline()(**REQUEST)
    device.facts.sm = "sm89"
    device.facts.driver = "another"  # TensorRT-RTX compiles for it on the device
    assert pipeline()(**REQUEST, height=64, width=64)


def lora(folder):
    down, up = np.ones((4, 192), np.float32), np.full((192, 4), 0.05, np.float32)
    name, path = "lora_te_text_model_encoder_layers_0_self_attn_q_proj", folder / "a.safetensors"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, path)
    return path


@pytest.mark.parametrize("refit", [True, False], ids=["refitted", "found"])
def test_adapters_on_and_off(host, library, device, tmp_path, refit):
    path, size = lora(tmp_path), {"height": 64, "width": 64}
    put(library, WHOLE, refit=refit)
    drawn = pipeline()
    expected = {(): pixels(host(**REQUEST, **size))}
    host.set_loras([path])
    expected[path,] = pixels(host(**REQUEST, **size))
    host.set_loras([])
    assert (expected[()] != expected[path,]).any()
    if not refit:
        drawn(**REQUEST, **size)
        with pytest.raises(BackendError, match="and with --refit if adapters are to change it"):
            drawn.set_loras([path])
        np.testing.assert_array_equal(pixels(drawn(**REQUEST, **size)), expected[()])
        adapted = adapt_model(MODEL, [path])
        put(library, WHOLE, parts=("text_encoder",), weights=adapted)
    for loras in ((), (path,), ()):
        drawn.set_loras(loras)
        np.testing.assert_array_equal(pixels(drawn(**REQUEST, **size)), expected[loras])
    assert (device.counts["refit"] > 0) == refit


def test_what_is_built_while_an_adapter_is_on_takes_weights_later(
    host, library, builds, device, tmp_path
):
    path, size = lora(tmp_path), {"height": 64, "width": 64}
    drawn = pipeline(build_missing=True)
    drawn.set_loras([path])
    host.set_loras([path])
    expected = pixels(host(**REQUEST, **size))
    host.set_loras([])
    np.testing.assert_array_equal(pixels(drawn(**REQUEST, **size)), expected)
    assert {request.part: request.settings.refit for request in builds}["text_encoder"]
    drawn.set_loras([])
    np.testing.assert_array_equal(pixels(drawn(**REQUEST, **size)), pixels(host(**REQUEST, **size)))


def test_a_damaged_engine_is_never_loaded(library, device):
    put(library, WHOLE)
    (path,) = (path for facts, path in EngineStore().find(part="step"))
    path.chmod(0o600)
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(BackendError, match="was damaged and is removed"):
        pipeline()(**REQUEST, height=64, width=64)
    assert device.counts["load"] == 1


def test_a_request_that_does_not_fit_says_how_much_is_missing(library, device, monkeypatch):
    put(library, WHOLE)
    drawn = pipeline()
    monkeypatch.setattr(device, "memory", lambda: (2**20, 2**32))
    with pytest.raises(BackendError, match=r"and 0\.00 GiB are free, so 0\.\d\d GiB are missing"):
        drawn(**REQUEST, height=64, width=64)


def test_a_build_that_does_not_fit_is_not_begun(library, device, builds, monkeypatch):
    drawn = pipeline(build_missing=True)
    monkeypatch.setattr(device, "memory", lambda: (2**20, 2**32))
    with pytest.raises(BackendError, match=r"building the text_encoder for .* takes about"):
        drawn(**REQUEST, height=64, width=64)
    assert not builds
