import numpy as np
import pytest
import torch

from engine.adapters.textual_inversion import read_embedding
from engine.checkpoints.formats.files import open_weights
from tests.support.bad_legacy import DATA, legacy, state_dict, storage, view


def saved(path, value):
    torch.save(value, path, _use_new_zipfile_serialization=False)
    return open_weights(path)


def agrees(ours, expected):
    expected = expected.detach()
    expected = (expected.float() if expected.dtype == torch.bfloat16 else expected).numpy()
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    np.testing.assert_array_equal(ours, expected)


def test_a_checkpoint_is_torchs(tmp_path):
    numbers = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "whole": numbers,
        "a piece": numbers[1:3, ::2],
        "transposed": numbers.T,
        "half": torch.randn(3, 2).half(),
        "bfloat16": torch.randn(5).bfloat16(),
        "ids": torch.arange(7),
        "truth": torch.tensor([True, False]),
        "a parameter": torch.nn.Parameter(torch.ones(2)),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "nothing": torch.zeros(0, 3),
    }
    weights = saved(tmp_path / "model.ckpt", {"state_dict": tensors, "global_step": 7})
    assert weights.keys() == tensors.keys()
    assert weights.metadata["global_step"] == "7"
    for name, tensor in tensors.items():
        agrees(weights[name], tensor)
        assert not weights[name].flags.writeable


def test_tensors_may_share_a_storage_and_the_same_one_twice(tmp_path):
    numbers = torch.arange(12.0)
    value = {"a": numbers[:4], "b": numbers[4:].reshape(2, 4), "c": numbers}
    weights = saved(tmp_path / "model.pt", value)
    assert len(weights.files) == 1
    for name, tensor in value.items():
        agrees(weights[name], tensor)


def test_views_of_before_0_4_are_read(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(legacy(state_dict(storage(view(1, 3)), (3,))))
    expected = np.frombuffer(DATA, "<f4")[1:]
    np.testing.assert_array_equal(open_weights(path)["weight"], expected)


def test_the_first_function_that_rebuilt_tensors_is_known(tmp_path):
    pickled = state_dict(storage()).replace(b"_rebuild_tensor_v2", b"_rebuild_tensor")
    path = tmp_path / "model.pt"
    path.write_bytes(legacy(pickled))
    expected = np.frombuffer(DATA, "<f4").reshape(2, 2)
    np.testing.assert_array_equal(open_weights(path)["weight"], expected)


@pytest.mark.parametrize("name", ["*", "mystyle"])
def test_an_embedding_is_read(tmp_path, name):
    path = tmp_path / "file.pt"
    vectors = torch.randn(2, 8)
    value = {"string_to_param": {name: vectors}, "string_to_token": {name: 265}, "name": "word"}
    saved(path, value)
    embedding = read_embedding(path)
    np.testing.assert_array_equal(embedding.vectors["text_encoder"], vectors.numpy())


def test_a_folder_of_the_old_format_is_opened(tmp_path):
    saved(tmp_path / "diffusion_pytorch_model.bin", {"a": torch.ones(2)})
    assert open_weights(tmp_path)["a"].tolist() == [1, 1]
