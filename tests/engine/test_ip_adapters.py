"""IP-Adapters and image encoders, their files and graphs, against transformers and diffusers."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFullImageProjection,
    IPAdapterPlusImageProjection,
)
from safetensors.torch import save_file

from engine.backends.settings import BackendSettings
from engine.checkpoints.image_encoder import open_image_encoder
from engine.checkpoints.ip_adapter import check_unet, is_ip_adapter, open_ip_adapter
from engine.configs.diffusion import UNetConfig
from engine.engines import open_engine
from engine.errors import ModelError
from engine.graphs.image_encoder import image_encoder_graph
from engine.graphs.ip_adapter import ip_adapter_graph
from tests.support import published_configs as published
from tests.support.ip_adapters import KINDS, small_encoder, small_ip_adapter, write_ip_adapter
from tests.support.parity import relative_error
from tests.support.small_models import SMALL
from tests.support.tolerances import PARITY_RTOL

SETTINGS = BackendSettings(threads=1, backend="cpu")
TYPES = {
    "linear": ImageProjection,
    "plus": IPAdapterPlusImageProjection,
    "full": IPAdapterFullImageProjection,
}


def unet_with(states):
    """Let diffusers read IP-Adapters into a small UNet; returns that."""
    unet = deepcopy(SMALL["sd1"].reference.unet)
    unet._load_ip_adapter_weights(states, low_cpu_mem_usage=False)
    return unet.eval()


@torch.no_grad()
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_an_image_encoder_is_transformers_own(act, tmp_path):
    encoder = small_encoder(hidden_act=act)
    encoder.save_pretrained(tmp_path)
    config, weights = open_image_encoder(tmp_path)
    engine = open_engine(image_encoder_graph(config, "float32"), weights, SETTINGS)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    found = engine.run({"pixel_values": pixels.numpy()})
    expected = encoder(pixels, output_hidden_states=True)
    assert relative_error(torch.tensor(found["image_embeds"]), expected.image_embeds) < PARITY_RTOL
    states = torch.tensor(found["penultimate_hidden_state"])
    assert relative_error(states, expected.hidden_states[-2]) < PARITY_RTOL
    assert relative_error(states, expected.hidden_states[-1]) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_are_diffusers_own(kind, tmp_path):
    state = small_ip_adapter(SMALL["sd1"], kind)
    path = write_ip_adapter(state, tmp_path / "adapter.safetensors")
    config, weights = open_ip_adapter(path)
    check_unet(path, config, SMALL["sd1"].configs["unet"])
    engine = open_engine(ip_adapter_graph(config, "float32"), weights, SETTINGS)
    rows = 1 if kind == "linear" else 17
    shape = 1, rows, config.embed_dim
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = engine.run({"features": features.numpy()})
    unet = unet_with([state])
    layer = unet.encoder_hid_proj.image_projection_layers[0]
    assert isinstance(layer, TYPES[kind])
    tokens = layer(features[:, 0] if kind == "linear" else features)
    processors = [p for name, p in unet.attn_processors.items() if "attn2" in name]
    for name, linears in (("keys", "to_k_ip"), ("values", "to_v_ip")):
        expected = torch.cat([getattr(p, linears)[0](tokens) for p in processors], dim=-1)
        assert relative_error(torch.tensor(found[name]), expected) < PARITY_RTOL


@pytest.mark.parametrize("kind", KINDS)
def test_every_naming_is_the_same_adapter(kind, tmp_path):
    state = small_ip_adapter(SMALL["sd1"], kind)
    named = write_ip_adapter(state, tmp_path / "a.safetensors")
    pickled = write_ip_adapter(state, tmp_path / "a.bin")
    saved = {n: t.contiguous() for n, t in unet_with([state]).state_dict().items()}
    whole, alone = tmp_path / "unet.safetensors", tmp_path / "alone.safetensors"
    save_file(saved, whole)
    save_file({n: t for n, t in saved.items() if "_ip." in n or n.startswith("encoder_")}, alone)
    config, weights = open_ip_adapter(named)
    for path in (pickled, whole, alone):
        other_config, other = open_ip_adapter(path)
        assert other_config == config
        for name in weights:
            assert np.array_equal(weights[name], other[name]), name


def test_layers_are_numbered_as_in_the_published_files():
    """SD 1.5's 16 are 1, 3, ... 31, of which 11 lie on the way down and 31 is the middle."""
    unet = UNetConfig.from_dict(published.UNET_SD15)
    layers = unet.cross_attentions()
    assert [layer.width for layer in layers] == [320, 320, 640, 640, 1280, 1280] + [1280] * 3 + [
        640,
        640,
        640,
        320,
        320,
        320,
    ] + [1280]
    assert layers[-1].name == "mid_block.attentions.0.transformer_blocks.0"
    assert [layer.level for layer in layers] == [0, 0, 1, 1, 2, 2, 2, 2, 2, 1, 1, 1, 0, 0, 0, 3]
    assert len(UNetConfig.from_dict(published.UNET_XL).cross_attentions()) == 70


def renamed(state, part, changes):
    """Return a state with tensors added to one of its dictionaries."""
    return {**state, part: {**state[part], **changes}}


LINEAR = small_ip_adapter(SMALL["sd1"], "linear")
PLUS = small_ip_adapter(SMALL["sd1"], "plus")
FACE = {"proj.0.weight": torch.ones(8, 8), "proj.2.weight": torch.ones(256, 8)}
BAD = {
    "face": ({**LINEAR, "image_proj": {**FACE, "norm.weight": torch.ones(64)}}, "FaceID, which"),
    "instant": (
        {**PLUS, "image_proj": {**PLUS["image_proj"], "proj_in.weight": torch.ones(48, 512)}},
        "InstantID's IP-Adapter, which wants",
    ),
    "lora": (renamed(LINEAR, "ip_adapter", {"0.to_q_lora.down.weight": torch.ones(2)}), "FaceID"),
    "left": (renamed(LINEAR, "image_proj", {"more.weight": torch.ones(2)}), "holds image_proj.mo"),
    "unlike": (renamed(LINEAR, "image_proj", {"norm.weight": torch.ones(63)}), "has shape"),
    "short": (renamed(LINEAR, "ip_adapter", {"1.to_v_ip.weight": torch.ones(9, 9)}), "has shape"),
    "empty": (renamed(LINEAR, "ip_adapter", {"1.to_k_ip.weight": torch.ones(0, 4)}), "can be made"),
    "whole": ({"image_proj": {"a": torch.ones(1)}, "ip_adapter": {}}, "holds no IP-Adapter but"),
    "unknown": ({**LINEAR, "image_proj": {"b.weight": torch.ones(1)}}, "of a kind that is not"),
}


@pytest.mark.parametrize(("state", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("ending", [".bin", ".safetensors"])
def test_what_is_no_ip_adapter_is_one_sentence(state, message, ending, tmp_path):
    path = write_ip_adapter(state, tmp_path / f"adapter{ending}")
    with pytest.raises(ModelError, match=message) as caught:
        open_ip_adapter(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "a LoRA"),
        ("control_model.input_hint_block.0.weight", "a ControlNet"),
        ("vision_model.embeddings.class_embedding", "an image encoder"),
        ("model.diffusion_model.out.2.weight", "a model or a UNet"),
        ("adapter.body.0.in_conv.weight", "a T2I-Adapter"),
    ],
)
def test_other_files_are_named(name, what, tmp_path):
    assert not is_ip_adapter([name])
    save_file({name: torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=f"is {what}, which cannot be used as one"):
        open_ip_adapter(tmp_path / "other.safetensors")


PROJECTION = "encoder_hid_proj.image_projection_layers.0."
DIFFUSERS_FACES = {
    "plain": {"ff.net.0.proj.weight": (8, 8), "ff.net.2.weight": (256, 8), "norm.weight": (64,)},
    "plus": {"proj.net.0.proj.weight": (8, 8), "proj.net.2.weight": (256, 8), "norm.weight": (64,)},
}


@pytest.mark.parametrize("shapes", DIFFUSERS_FACES.values(), ids=DIFFUSERS_FACES)
def test_faces_in_diffusers_naming_are_named(shapes, tmp_path):
    tensors = {f"{PROJECTION}{name}": torch.ones(shape) for name, shape in shapes.items()}
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip.0.weight"
    save_file({**tensors, key: torch.ones(32, 64)}, tmp_path / "face.safetensors")
    with pytest.raises(ModelError, match="is an IP-Adapter FaceID, which wants"):
        open_ip_adapter(tmp_path / "face.safetensors")


def test_another_family_is_refused_with_what_differs(tmp_path):
    path = write_ip_adapter(LINEAR, tmp_path / "adapter.bin")
    config, _ = open_ip_adapter(path)
    for family, what in (("xl", "tokens of the width 64, .* 128"), ("xl refiner", "widths|number")):
        with pytest.raises(ModelError, match=f"another family: it .*{what}"):
            check_unet(path, config, SMALL[family].configs["unet"])


def test_what_is_no_image_encoder_is_one_sentence(tmp_path):
    with pytest.raises(ModelError, match=r"holds no config\.json; give the folder of an image enc"):
        open_image_encoder(tmp_path)
    encoder = small_encoder()
    encoder.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**encoder.state_dict(), "vision_model.more": torch.ones(1)}, file)
    with pytest.raises(ModelError, match=r"holds vision_model\.more, for which"):
        open_image_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["CLIPTextModel"]}')
    with pytest.raises(ModelError, match=r"describes .'CLIPTextModel'.; give the folder of an im"):
        open_image_encoder(tmp_path)
