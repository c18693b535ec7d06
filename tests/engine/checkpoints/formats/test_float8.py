import ml_dtypes
import numpy as np
import pytest
import torch

from engine.checkpoints.formats.files import open_weights
from engine.checkpoints.formats.float8 import FLOAT8
from tests.support.bad_numbers import safetensors

FORMS = {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
EVERY = np.arange(256, dtype=np.uint8)


def same(ours, expected):
    assert ours.dtype == expected.dtype == np.float16
    np.testing.assert_array_equal(ours, expected)
    signed = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(ours)[signed], np.signbit(expected)[signed])


def test_all_forms_of_torch_and_numpy_are_there():
    assert FORMS.keys() == FLOAT8.keys()


@pytest.mark.parametrize("form", FORMS)
def test_every_number_is_numpys_and_torchs_half(tmp_path, form):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors({"weight": (form, (16, 16), EVERY.tobytes())}))
    weights = open_weights(path)
    stored = EVERY.view(getattr(ml_dtypes, FORMS[form])).reshape(16, 16)
    with np.errstate(invalid="ignore"):
        same(weights["weight"], stored.astype(np.float16))
    halves = torch.from_numpy(EVERY).view(getattr(torch, FORMS[form])).half().reshape(16, 16)
    same(weights["weight"], halves.numpy())
    assert weights.tensors["weight"].is_float
    assert not weights["weight"].flags.writeable


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_archives_of_torch_hold_them_too(tmp_path, form, old):
    path = tmp_path / "model.ckpt"
    stored = torch.randn(6, 4).to(getattr(torch, FORMS[form]))
    values = {"state_dict": {"weight": stored, "transposed": stored.T, "row": stored[2]}}
    torch.save(values, path, _use_new_zipfile_serialization=not old)
    weights = open_weights(path)
    for name, value in values["state_dict"].items():
        assert weights.tensors[name].dtype == form
        same(weights[name], value.half().numpy())


def test_many_numbers_are_read_in_pieces(tmp_path):
    path = tmp_path / "model.safetensors"
    codes = np.random.default_rng(0).integers(0, 0x7F, (300, 500), np.uint8)
    path.write_bytes(safetensors({"weight": ("F8_E4M3", codes.shape, codes.tobytes())}))
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float16)
    same(open_weights(path)["weight"], expected)
