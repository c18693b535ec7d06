from types import MappingProxyType

import pytest
import tensorrt_rtx_bindings

from engine.backends.tensorrt import library as tensorrt_library
from engine.backends.tensorrt.library import (
    LIBRARIES,
    Library,
    compute_capability,
    library,
    parse_targets,
    version,
)
from engine.errors import BackendError

INSTALL = r"`pip install tensorrt` .*'\.\[tensorrt\]'"


def test_tensorrt_rtx_is_found_by_its_bindings_alone():
    module = library("tensorrt_rtx")
    assert module.Builder is tensorrt_rtx_bindings.Builder
    assert version(module) == tensorrt_rtx_bindings.__version__


def test_a_missing_library_names_the_extra(monkeypatch):
    missing = Library(
        modules=("not_there", "not_there_either"), packages="tensorrt", extra="tensorrt"
    )
    monkeypatch.setattr(tensorrt_library, "LIBRARIES", MappingProxyType({"tensorrt": missing}))
    with pytest.raises(BackendError, match=rf"not_there_either.*{INSTALL}"):
        library("tensorrt")


def test_a_library_whose_shared_objects_are_missing_names_the_extra(monkeypatch, tmp_path):
    code = "raise OSError('libnvinfer.so.11: cannot open shared object file')"
    (tmp_path / "broken_bindings.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    broken = Library(modules=("broken_bindings",), packages="tensorrt", extra="tensorrt")
    monkeypatch.setattr(tensorrt_library, "LIBRARIES", MappingProxyType({"tensorrt": broken}))
    with pytest.raises(BackendError, match=rf"libnvinfer.so.11.*{INSTALL}"):
        library("tensorrt")


def test_targets_are_those_of_the_library():
    known = {name for name in dir(tensorrt_rtx_bindings.ComputeCapability) if name.startswith("SM")}
    targets = {target.upper() for target in LIBRARIES["tensorrt_rtx"].targets}
    assert targets == known - {"SM75"}
    for target in LIBRARIES["tensorrt_rtx"].targets:
        assert compute_capability(tensorrt_rtx_bindings, target).name == target.upper()


def test_targets_are_read_once_each():
    assert parse_targets("sm86, SM89,sm120,sm86") == ("sm86", "sm89", "sm120")


@pytest.mark.parametrize("text", ["", "sm86,", "rtx4090", "sm75", "sm90", "8.9"])
def test_other_targets_are_refused(text):
    with pytest.raises(BackendError, match=r"target|Hopper|Turing"):
        parse_targets(text)
