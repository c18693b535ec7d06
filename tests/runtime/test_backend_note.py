from types import SimpleNamespace

import pytest

from engine.backends.settings import BackendSettings
from runtime import backend_note
from runtime.backend_note import openvino_note

AVX2 = "flags\t\t: fpu sse avx avx2\n"
BFLOAT16 = "processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\n"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A terminal on a processor with AVX2, without OpenVINO."""
    flags = tmp_path / "cpuinfo"
    flags.write_text(AVX2)
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(backend_note, "CPUINFO", flags)
    monkeypatch.setattr(backend_note, "find_spec", lambda name: None)
    monkeypatch.setattr(backend_note.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(backend_note.sys.stderr, "isatty", lambda: True, raising=False)
    return tmp_path


def engines(backend="cpu", precision="float32", is_small=False):
    settings = BackendSettings(backend=backend)
    return SimpleNamespace(settings=settings, precision=precision, is_small=is_small)


def test_it_is_said_once_a_day(machine):
    (note,) = openvino_note(engines())
    assert note.startswith("OpenVINO draws a large model about 1.3 times as fast here; install it")
    assert openvino_note(engines()) == []
    (machine / "cache" / "openvino-note").write_text("2026-01-01")
    assert len(openvino_note(engines())) == 1


def test_a_processor_with_bfloat16_gains_more(machine):
    (machine / "cpuinfo").write_text(BFLOAT16)
    assert "about 2.6 times as fast here, in bfloat16" in openvino_note(engines())[0]


@pytest.mark.parametrize(
    "other",
    [{"backend": "cuda"}, {"precision": "float16"}, {"is_small": True}],
)
@pytest.mark.usefixtures("machine")
def test_where_it_gains_nothing(other):
    assert openvino_note(engines(**other)) == []
    assert len(openvino_note(engines())) == 1, "the day was not used up"


@pytest.mark.usefixtures("machine")
def test_elsewhere_nothing_is_said(monkeypatch):
    for name, value in (("find_spec", lambda name: object()),):
        with monkeypatch.context() as patch:
            patch.setattr(backend_note, name, value)
            assert openvino_note(engines()) == []
    with monkeypatch.context() as patch:
        patch.setattr(backend_note.platform, "machine", lambda: "arm64")
        assert openvino_note(engines()) == []
    with monkeypatch.context() as patch:
        patch.setattr(backend_note.sys.stderr, "isatty", lambda: False, raising=False)
        assert openvino_note(engines()) == []
    assert len(openvino_note(engines())) == 1


def test_a_cache_that_cannot_be_written(machine):
    (machine / "cache").write_text("no folder")
    assert openvino_note(engines()) == [], "it would be said each time"
