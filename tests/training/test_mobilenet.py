"""MobileNet-v2 out of npm's package, beside transformers' with the same weights."""

import base64
import io
import tarfile

import numpy as np
import pytest
import torch
from transformers import MobileNetV2Config, MobileNetV2Model

from engine.errors import ModelError
from training import mobilenet
from training.mobilenet import MobileNet

FOLDER = "package/dist/models/mobilenet_v2"
HIDDEN = (1, 4, 11, 15)  # of transformers' hidden states, those after the stages that are taken


@pytest.fixture(scope="module")
def oracle():
    torch.manual_seed(0)
    config = MobileNetV2Config(tf_padding=True, layer_norm_eps=1e-3)
    model = MobileNetV2Model(config, add_pooling_layer=False).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model


def layers(model):
    """Yield each layer of transformers' by Keras' names of its convolution and its moments."""
    stem = model.conv_stem
    yield stem.first_conv, "Conv1", "bn_Conv1"
    yield stem.conv_3x3, "expanded_conv_depthwise", "expanded_conv_depthwise_BN"
    yield stem.reduce_1x1, "expanded_conv_project", "expanded_conv_project_BN"
    for i, block in enumerate(model.layer, start=1):
        yield block.expand_1x1, f"block_{i}_expand", f"block_{i}_expand_BN"
        yield block.conv_3x3, f"block_{i}_depthwise", f"block_{i}_depthwise_BN"
        yield block.reduce_1x1, f"block_{i}_project", f"block_{i}_project_BN"


def tensors(model):
    for layer, name, norm in layers(model):
        kernel = layer.convolution.weight.detach()
        if name.endswith("depthwise"):
            yield f"{name}/depthwise_kernel", kernel.permute(2, 3, 0, 1)
        else:
            yield f"{name}/kernel", kernel.permute(2, 3, 1, 0)
        of = layer.normalization
        parts = ("gamma", of.weight), ("beta", of.bias)
        for part, value in (
            *parts,
            ("moving_mean", of.running_mean),
            ("moving_variance", of.running_var),
        ):
            yield f"{norm}/{part}", value.detach()


def packed(model, cut=0):
    """Write a package as npm's: bytes with a scale and an offset; give the model those values."""
    stated, data = [], b""
    for name, value in tensors(model):
        least = float(value.min())
        scale = float(value.max() - least) / 255 or 1.0
        levels = ((value - least) / scale).round().clamp(0, 255)
        value.copy_(levels * scale + least)
        data += levels.to(torch.uint8).numpy().tobytes()
        shape = ",".join(map(str, value.shape))
        stated.append(
            f'{{name:"{name}",shape:[{shape}],dtype:"float32",'
            f'quantization:{{min:{least!r},scale:{scale!r},dtype:"uint8"}}}}'
        )
    shard = base64.b64encode(data[: len(data) - cut]).decode()
    return {
        "model": f"e.exports={{weightsManifest:[{{weights:[{','.join(stated)}]}}]}}",
        "group1-shard1of1": f'h.exports="{shard}"',
    }


@pytest.fixture
def package(tmp_path, monkeypatch):
    def write(texts):
        path = tmp_path / "package.tgz"
        with tarfile.open(path, "w:gz") as tar:
            for name, text in texts.items():
                member = tarfile.TarInfo(f"{FOLDER}/{name}.min.js")
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text.encode()))
        monkeypatch.setattr(mobilenet, "fetch", lambda package, folder: path)

    return write


@torch.no_grad()
def test_what_it_sees_is_what_transformers_sees(oracle, package, tmp_path):
    package(packed(oracle))
    images = torch.rand(2, 3, mobilenet.SIDE, mobilenet.SIDE) * 2 - 1
    seen = MobileNet.load(tmp_path)(images)
    wanted = oracle(images / 2 + 0.5, output_hidden_states=True).hidden_states
    assert [tuple(part.shape[1:]) for part in seen] == [
        (24, 56, 56), (32, 28, 28), (96, 14, 14), (320, 7, 7)
    ]  # fmt: skip
    for part, index in zip(seen, HIDDEN, strict=True):
        error = (part - wanted[index]).norm() / wanted[index].norm()
        assert error < 1e-5
    small = torch.rand(1, 3, 64, 64)
    assert np.isfinite(MobileNet.load(tmp_path)(small)[-1].numpy()).all()


def test_a_package_that_ends_early_is_one_sentence(oracle, package, tmp_path):
    package(packed(oracle, cut=10))
    with pytest.raises(ModelError, match="ends before block_16_project_BN/moving_variance"):
        MobileNet.load(tmp_path)
