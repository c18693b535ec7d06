import pytest
import torch
from torch import nn

from training.muon import Muon, is_hidden_matrix, orthogonalise


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12)])
def test_singular_values_come_out_near_1_and_the_vectors_stay(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    conditioned = left @ torch.diag(values.clamp(min=0.1 * values.max().item())) @ right
    out = orthogonalise(conditioned)
    assert out.shape == shape
    assert out.dtype == torch.float32
    singular = torch.linalg.svdvals(out)
    assert singular.min() > 0.6
    assert singular.max() < 1.3
    rotated = left.T @ out @ right.T  # diagonal if the singular vectors are the same
    assert (rotated - torch.diag(rotated.diag())).abs().max() < 0.05  # bfloat16


def test_a_matrix_of_zeros_stays():
    assert not orthogonalise(torch.zeros(3, 5)).any()


def test_the_first_update_is_orthogonal_and_scaled():
    weight = nn.Parameter(torch.zeros(4, 2, 3, 3))
    weight.grad = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=0.1, weight_decay=0.0).step()
    singular = torch.linalg.svdvals(weight.detach().flatten(1)) / (0.1 * 0.2 * 18**0.5)
    assert singular.min() > 0.6
    assert singular.max() < 1.3
    assert (weight.detach() * weight.grad).sum() < 0


def test_weights_decay_and_what_has_no_gradient_stays():
    decayed, still = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    decayed.grad = torch.zeros(2, 2)
    Muon([decayed, still], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(decayed.detach(), torch.full((2, 2), 0.95))
    assert (still == 1).all()


def test_a_training_of_matrices_converges():
    torch.manual_seed(0)
    layer, target = nn.Linear(8, 8, bias=False), torch.randn(8, 8)
    optimizer = Muon(layer.parameters(), lr=0.2, weight_decay=0.0)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 200)
        optimizer.zero_grad()
        loss = (layer.weight - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3


def test_embeddings_norms_and_the_outermost_layers_are_not_muons():
    weight = nn.Parameter(torch.zeros(2, 2))
    assert is_hidden_matrix("unet.down_blocks.0.resnets.0.conv1.weight", weight)
    assert is_hidden_matrix("text_encoder.text_model.encoder.layers.0.mlp.fc1.weight", weight)
    for name in ("unet.conv_in.weight", "unet.conv_out.weight", "x.token_embedding.weight"):
        assert not is_hidden_matrix(name, weight)
    assert not is_hidden_matrix(
        "unet.mid_block.resnets.0.norm1.weight", nn.Parameter(torch.ones(2))
    )
