import numpy as np
import pytest

from engine import engines as module
from engine.backends.openvino.int8 import write_ranges
from engine.backends.settings import PRECISIONS, BackendSettings
from engine.engines import Engines, ranges_of
from engine.errors import BackendError
from engine.model import Model, find_model

MODEL = Model.open(find_model("pictogram"))
OPENVINO = BackendSettings(backend="openvino")
NAMES = ranges_of(MODEL)


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(module, "capabilities", lambda: frozenset({"FP32", "BF16", "INT8"}))


@pytest.fixture(autouse=True)
def _without_openvino(monkeypatch):
    """Say nothing of this processor, unless `processor` does."""
    monkeypatch.setattr(module, "capabilities", frozenset)


@pytest.fixture
def processor(monkeypatch):
    """Return what fakes a processor: its machine, and what OpenVINO can do there."""

    def fake(machine, *there):
        monkeypatch.setattr(module.platform, "machine", lambda: machine)
        monkeypatch.setattr(module, "capabilities", lambda: frozenset(there))

    return fake


@pytest.fixture
def calibrated(tmp_path):
    write_ranges(tmp_path / "cache" / "graphs" / NAMES["step"], {"a.weight": (-1.0, 1.0)})


def chosen(**options):
    engines = Engines.choose(MODEL, **options)
    return engines.settings.backend, engines.precision


def test_without_openvino_or_bfloat16():
    assert chosen() == ("cpu", "float32")
    assert chosen(settings=OPENVINO) == ("openvino", "float32")


@pytest.mark.usefixtures("fast")
def test_a_processor_with_bfloat16():
    assert chosen() == ("openvino", "bfloat16")
    assert chosen(settings=OPENVINO) == ("openvino", "bfloat16")
    assert chosen(settings=BackendSettings(backend="cpu")) == ("cpu", "float32")


@pytest.mark.usefixtures("fast", "calibrated")
def test_a_calibrated_model():
    assert chosen() == ("openvino", "int8")
    assert Engines.choose(MODEL).ranges == {"a.weight": (-1.0, 1.0)}
    assert chosen(precision="bfloat16") == ("openvino", "bfloat16")
    assert chosen(settings=BackendSettings(backend="cpu")) == ("cpu", "float32")


@pytest.mark.usefixtures("fast")
def test_a_decoder_is_rounded_beside_a_unet(tmp_path):
    folder = tmp_path / "cache" / "graphs"
    write_ranges(folder / NAMES["vae_decoder"], {"b.weight": (0.0, 2.0)})
    assert chosen() == ("openvino", "bfloat16"), "its UNet is not calibrated"
    write_ranges(folder / NAMES["step"], {"a.weight": (-1.0, 1.0)})
    assert Engines.choose(MODEL).ranges == {"a.weight": (-1.0, 1.0), "b.weight": (0.0, 2.0)}


@pytest.mark.usefixtures("calibrated")
def test_ranges_are_for_int8_alone():
    engines = Engines.choose(MODEL, settings=OPENVINO)
    assert (engines.precision, engines.ranges) == ("float32", None)


@pytest.mark.usefixtures("fast")
def test_a_small_model_opens_soon_and_a_large_one_draws_fast(monkeypatch):
    assert chosen(fast_start=True) == ("cpu", "float32")
    monkeypatch.setattr(module, "SMALL", 2)
    assert chosen(fast_start=True) == ("openvino", "bfloat16")


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(
    ("precision", "backend"),
    [("float32", "openvino"), ("float16", "cpu"), ("bfloat16", "openvino")],
)
def test_a_precision_overrides_the_choice(precision, backend):
    assert chosen(precision=precision) == (backend, precision)
    assert precision in PRECISIONS[backend]


def test_what_a_backend_does_not_compute_in():
    with pytest.raises(BackendError, match=r"'cpu' does not compute in bfloat16; .*'?openvino"):
        chosen(settings=BackendSettings(backend="cpu"), precision="bfloat16")
    with pytest.raises(BackendError, match="does not compute in float8"):
        chosen(precision="float8")


def test_int8_without_ranges_says_how_to_find_them():
    with pytest.raises(BackendError, match=r"run `python -m runtime\.calibration .*pictogram`"):
        chosen(precision="int8")


@pytest.mark.parametrize(
    ("machine", "there", "expected"),
    [
        ("x86_64", ("FP32", "INT8", "GROUP_NORM"), ("openvino", "float32")),  # AVX2
        ("AMD64", ("FP32", "INT8", "GROUP_NORM"), ("openvino", "float32")),  # on Windows
        ("x86_64", ("FP32", "INT8", "GROUP_NORM", "WINOGRAD"), ("openvino", "float32")),  # AVX-512
        ("x86_64", ("FP32", "GROUP_NORM", "BF16"), ("openvino", "bfloat16")),
        ("x86_64", ("FP32", "INT8"), ("cpu", "float32")),  # SSE4.2: the UNet cannot be opened
        ("aarch64", ("FP32", "FP16", "GROUP_NORM"), ("cpu", "float32")),  # not measured
        ("arm64", ("FP32", "GROUP_NORM", "BF16"), ("openvino", "bfloat16")),
        ("x86_64", (), ("cpu", "float32")),  # OpenVINO is not installed
    ],
)
def test_the_fastest_of_a_processor(processor, machine, there, expected):
    processor(machine, *there)
    assert chosen() == expected
    assert chosen(precision="float32")[0] == expected[0]
    assert chosen(fast_start=True) == ("cpu", "float32"), "a small model"
    assert chosen(precision="float16") == ("cpu", "float16")


def test_threads_stay(monkeypatch):
    engines = Engines.choose(MODEL, settings=BackendSettings(threads=1))
    assert engines.settings == BackendSettings(backend="cpu", threads=1)
    engine = engines.open("vae_decoder", dict(MODEL.weights("vae_decoder")))
    pixels = engine.run({"latents": np.zeros((1, 8, 2, 2), np.float32)})["pixels"]
    assert pixels.shape == (1, 16, 16, 3)
