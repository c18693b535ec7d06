import dataclasses
import inspect
import json
import re

import pytest
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig

from engine.configs.diffusion import AutoencoderConfig, TextEncoderConfig, UNetConfig
from engine.errors import ModelError
from tests.support import published_configs as published

UNET, TEXT, VAE = published.UNET_XL, published.TEXT_SD15, published.VAE_XL
SMALLEST = {  # the fields without a default
    UNetConfig: {},
    TextEncoderConfig: {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    },
    AutoencoderConfig: {},
}
PUBLISHED = {
    "unet-sd15": (UNetConfig, published.UNET_SD15),
    "unet-sd21": (UNetConfig, published.UNET_SD21),
    "unet-xl": (UNetConfig, published.UNET_XL),
    "unet-refiner": (UNetConfig, published.UNET_REFINER),
    "text-sd15": (TextEncoderConfig, published.TEXT_SD15),
    "text-sd21": (TextEncoderConfig, published.TEXT_SD21),
    "text-xl-2": (TextEncoderConfig, published.TEXT_XL_2),
    "vae-sd15": (AutoencoderConfig, published.VAE_SD15),
    "vae-xl": (AutoencoderConfig, published.VAE_XL),
}


@pytest.mark.parametrize(("kind", "values"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_values_are_read(kind, values):
    config = kind.from_dict(values)
    for field in dataclasses.fields(config):
        value = values.get(field.name)
        expected = tuple(value) if isinstance(value, list) else value
        if field.name == "projection_dim" and values["architectures"] == ["CLIPTextModel"]:
            expected = 0
        if expected is None:  # absent, or null where nothing is the default
            expected = field.default
        assert getattr(config, field.name) == expected, field.name


@pytest.mark.parametrize(("kind", "values"), PUBLISHED.values(), ids=PUBLISHED)
def test_a_folder_is_read(kind, values, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    assert kind.load(tmp_path) == kind.from_dict(values)


def test_heads_and_layers_by_level():
    one = UNetConfig.from_dict(published.UNET_SD15)
    assert one.heads() == (8, 8, 8, 8)
    assert one.layers() == (2, 2, 2, 2)
    assert one.down_depths() == ((1, 1), (1, 1), (1, 1), (0, 0))
    assert one.up_depths() == ((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1))
    assert one.middle_depth() == 1
    assert one.attention_levels() == {0, 1, 2, 3}  # the lowest in the middle alone
    xl = UNetConfig.from_dict(published.UNET_XL)
    assert xl.heads() == (5, 10, 20)
    assert xl.down_depths() == ((0, 0), (2, 2), (10, 10))
    assert xl.up_depths() == ((10, 10, 10), (2, 2, 2), (0, 0, 0))
    assert xl.middle_depth() == 10
    assert xl.attention_levels() == {1, 2}
    refiner = UNetConfig.from_dict(published.UNET_REFINER)
    assert refiner.heads() == (6, 12, 24, 24)
    assert refiner.down_depths() == ((0, 0), (4, 4), (4, 4), (0, 0))
    assert refiner.middle_depth() == 4
    assert UNetConfig(layers_per_block=(1, 2, 3, 4)).layers() == (1, 2, 3, 4)
    assert UNetConfig(num_attention_heads=16, attention_head_dim=8).heads() == (16,) * 4


def test_compression_is_8_with_four_levels():
    assert AutoencoderConfig.from_dict(published.VAE_XL).compression == 8
    assert AutoencoderConfig(block_out_channels=(32, 64)).compression == 2


@pytest.mark.parametrize(
    ("kind", "reference"),
    [(UNetConfig, UNet2DConditionModel), (AutoencoderConfig, AutoencoderKL)],
)
def test_fields_are_those_of_diffusers(kind, reference):
    names = {field.name for field in dataclasses.fields(kind)}
    ours = {"time_ids"}  # what diffusers' pipeline computes from its text encoder
    assert names - ours <= set(inspect.signature(reference.__init__).parameters)


def test_fields_are_those_of_transformers():
    assert {field.name for field in dataclasses.fields(TextEncoderConfig)} <= set(
        CLIPTextConfig().to_dict()
    )


def test_unet_defaults_are_those_of_diffusers():
    small = {"block_out_channels": (32,) * 4}  # the default widths take seconds to build
    reference = UNet2DConditionModel(**small).config
    assert UNetConfig.from_dict(reference) == UNetConfig(**small)


def test_projection_is_read_where_the_model_has_one():
    for architectures in (["CLIPTextModel"], "CLIPTextModel", None, []):
        values = TEXT | {"architectures": architectures}
        assert TextEncoderConfig.from_dict(values).projection_dim == 0
    projected = TEXT | {"architectures": ["CLIPTextModelWithProjection"]}
    assert TextEncoderConfig.from_dict(projected).projection_dim == 768


def test_the_two_ways_to_name_the_end_of_text_are_one_architecture():
    old, new = (TEXT | {"eos_token_id": index} for index in (2, TEXT["vocab_size"] - 1))
    assert TextEncoderConfig.from_dict(old) == TextEncoderConfig.from_dict(new)
    other = TextEncoderConfig.from_dict(TEXT | {"eos_token_id": 50})
    assert other.eos_token_id == 50
    assert other.key() != TextEncoderConfig.from_dict(old).key()


def test_how_many_sizes_an_xl_is_told():
    assert UNetConfig.from_dict(published.UNET_XL).addition_time_ids == 6
    assert UNetConfig.from_dict(published.UNET_REFINER).addition_time_ids == 5


def test_whose_activations_leave_the_range_of_float16():
    assert AutoencoderConfig.from_dict(published.VAE_XL).overflows_float16
    assert not AutoencoderConfig.from_dict(published.VAE_SD15).overflows_float16


def test_null_means_a_default_of_nothing():
    nothing = {"shift_factor": None, "latents_mean": None}
    assert AutoencoderConfig.from_dict(VAE | nothing) == AutoencoderConfig.from_dict(VAE)
    assert UNetConfig.from_dict({"addition_time_embed_dim": None}) == UNetConfig()


REFUSED = {
    UNetConfig: [
        # blocks that are not implemented
        ("down_block_types", ["DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D"]),
        ("down_block_types", ["SimpleCrossAttnDownBlock2D"] * 3),
        ("up_block_types", ["CrossAttnUpBlock2D", "K_UpBlock2D", "UpBlock2D"]),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("mid_block_type", "UNetMidBlock3D"),
        # embeddings that are not implemented
        ("addition_embed_type", "text_image"),
        ("addition_embed_type", "image_hint"),
        ("class_embed_type", "timestep"),
        ("class_embed_type", "projection"),
        ("class_embeddings_concat", True),
        ("num_class_embeds", 1000),
        ("encoder_hid_dim", 768),
        ("encoder_hid_dim_type", "ip_image_proj"),
        ("time_embedding_type", "fourier"),
        ("time_embedding_dim", 512),
        ("time_embedding_act_fn", "silu"),
        ("timestep_post_act", "silu"),
        # other maths
        ("act_fn", "gelu"),
        ("attention_type", "gated"),
        ("center_input_sample", True),
        ("conv_in_kernel", 1),
        ("conv_out_kernel", 1),
        ("cross_attention_norm", "group_norm"),
        ("downsample_padding", 0),
        ("dual_cross_attention", True),
        ("mid_block_only_cross_attention", True),
        ("mid_block_scale_factor", 1.4142),
        ("only_cross_attention", [True, False]),
        ("resnet_skip_time_act", True),
        ("resnet_time_scale_shift", "scale_shift"),
        ("reverse_transformer_layers_per_block", [10, 2]),
        ("reverse_transformer_layers_per_block", [[10, 10], [2, 2, 2], 1]),
        ("reverse_transformer_layers_per_block", [[10, 10, 0], [2, 2, 2], 1]),
        ("reverse_transformer_layers_per_block", [["10"] * 3, [2, 2, 2], 1]),
        ("reverse_transformer_layers_per_block", 10),
        # lists of unequal length
        ("down_block_types", ["CrossAttnDownBlock2D"] * 2),
        ("up_block_types", ["CrossAttnUpBlock2D"] * 4),
        ("block_out_channels", [320, 640]),
        ("attention_head_dim", [5, 10]),
        ("num_attention_heads", [5, 10, 20, 20]),
        ("layers_per_block", [2, 2]),
        ("transformer_layers_per_block", [1, 2, 10, 10]),
        # numbers that do not divide
        ("norm_num_groups", 30),
        ("block_out_channels", [320, 640, 1290]),
        ("attention_head_dim", 7),
        ("attention_head_dim", [5, 10, 21]),
        # values that are no such thing
        ("in_channels", "4"),
        ("in_channels", 4.0),
        ("in_channels", True),
        ("in_channels", None),
        ("in_channels", 0),
        ("out_channels", -4),
        ("block_out_channels", 320),
        ("block_out_channels", []),
        ("block_out_channels", [320, "640", 1280]),
        ("block_out_channels", [0, 640, 1280]),
        ("down_block_types", "DownBlock2D"),
        ("down_block_types", [1, 2, 3]),
        ("down_block_types", None),
        ("mid_block_type", 3),
        ("layers_per_block", 0),
        ("layers_per_block", [2, 0, 2]),
        ("transformer_layers_per_block", [[1], [2, 2], [10]]),
        ("attention_head_dim", {"0": 5}),
        ("cross_attention_dim", [2048, 2048, 2048]),
        ("use_linear_projection", "yes"),
        ("use_linear_projection", 1),
        ("norm_num_groups", 0),
        ("norm_num_groups", None),
        ("norm_eps", "1e-5"),
        ("norm_eps", 0.0),
        ("norm_eps", float("nan")),
        ("flip_sin_to_cos", 1),
        ("freq_shift", -1),
        ("addition_time_embed_dim", None),
        ("addition_time_embed_dim", 0),
        ("projection_class_embeddings_input_dim", None),
        ("time_cond_proj_dim", -256),
        ("time_cond_proj_dim", "256"),
    ],
    TextEncoderConfig: [
        ("architectures", ["BertModel"]),
        ("architectures", ["T5EncoderModel"]),
        ("architectures", "CLIPModel"),
        ("architectures", 4),
        ("architectures", {"0": "CLIPTextModel"}),
        ("hidden_act", "relu"),
        ("hidden_act", None),
        ("hidden_size", 770),
        ("hidden_size", "768"),
        ("num_attention_heads", 7),
        ("num_attention_heads", 0),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", None),
        ("vocab_size", 49408.0),
        ("max_position_embeddings", 0),
        ("layer_norm_eps", None),
        ("layer_norm_eps", float("inf")),
        ("eos_token_id", [2]),
        ("eos_token_id", None),
    ],
    AutoencoderConfig: [
        ("down_block_types", ["AttnDownEncoderBlock2D"] * 4),
        ("up_block_types", ["AttnUpDecoderBlock2D"] * 4),
        ("down_block_types", ["DownEncoderBlock2D"] * 3),
        ("up_block_types", ["UpDecoderBlock2D"] * 5),
        ("down_block_types", None),
        ("up_block_types", 4),
        ("block_out_channels", [128, 256, 512]),
        ("block_out_channels", [128, 256, 512, 500]),
        ("block_out_channels", []),
        ("norm_num_groups", 24),
        ("norm_num_groups", 0),
        ("act_fn", "relu"),
        ("latents_mean", [-1.6574, 1.886, -1.383, 2.5155]),
        ("latents_std", [8.4927, 5.9022, 6.5498, 5.2299]),
        ("latent_channels", 0),
        ("layers_per_block", [2, 2, 2, 2]),
        ("mid_block_add_attention", None),
        ("use_quant_conv", "true"),
        ("scaling_factor", "0.13025"),
        ("scaling_factor", 0),
        ("scaling_factor", None),
        ("shift_factor", float("nan")),
    ],
}
PARTS = {UNetConfig: UNET, TextEncoderConfig: TEXT, AutoencoderConfig: VAE}


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        pytest.param(kind, *case, id=f"{kind.__name__}-{case[0]}-{case[1]}")
        for kind, cases in REFUSED.items()
        for case in cases
    ],
)
def test_a_value_that_is_not_implemented_is_refused_by_name(kind, name, value):
    with pytest.raises(ModelError, match=rf"\b{name}\b"):
        kind.from_dict(PARTS[kind] | {name: value})


@pytest.mark.parametrize("name", SMALLEST[TextEncoderConfig])
def test_a_missing_field_is_named(name):
    values = {key: value for key, value in TEXT.items() if key != name}
    with pytest.raises(ModelError, match=rf"TextEncoderConfig.*missing.*'{name}'.*config\.json"):
        TextEncoderConfig.from_dict(values)


@pytest.mark.parametrize("value", [None, 0])
def test_a_projection_without_a_width_is_refused(value):
    values = published.TEXT_XL_2 | {"projection_dim": value}
    with pytest.raises(ModelError, match="projection_dim"):
        TextEncoderConfig.from_dict(values)


def test_heads_matter_only_where_there_is_attention():
    heads = {"attention_head_dim": [7, 10, 20]}  # the first level of XL has no attention
    assert UNetConfig.from_dict(UNET | heads).heads() == (7, 10, 20)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (UNetConfig, {"block_out_channels": [32, 32, 32, 32]}),  # a list cannot be hashed
        (TextEncoderConfig, SMALLEST[TextEncoderConfig] | {"hidden_act": "relu"}),
        (AutoencoderConfig, {"block_out_channels": (100,)}),
    ],
)
def test_configurations_are_checked_where_they_are_built(kind, wrong):
    with pytest.raises(ModelError, match=next(reversed(wrong))):
        kind(**wrong)


@pytest.mark.parametrize("kind", SMALLEST)
def test_a_missing_file_is_named(kind, tmp_path):
    with pytest.raises(ModelError, match=re.escape(str(tmp_path / "config.json"))):
        kind.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b'{"in_channels": }', b"\xff\xfe", b"[1, 2]", b"4"])
def test_a_corrupt_file_is_named(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=re.escape(str(path))):
        UNetConfig.load(tmp_path)


def test_a_folder_in_the_place_of_the_file_is_named(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"config\.json"):
        UNetConfig.load(tmp_path)


OTHER = {
    UNetConfig: {
        "time_ids": 5,
        "in_channels": 9,
        "out_channels": 8,
        "block_out_channels": (320, 640, 1280, 640),
        "down_block_types": ("CrossAttnDownBlock2D",) * 4,
        "up_block_types": ("CrossAttnUpBlock2D",) * 4,
        "mid_block_type": "UNetMidBlock2D",
        "layers_per_block": 1,
        "cross_attention_dim": 768,
        "attention_head_dim": (5, 10, 20, 20),
        "num_attention_heads": 4,
        "transformer_layers_per_block": 2,
        "reverse_transformer_layers_per_block": ((1, 1, 2), (1,) * 3, (1,) * 3, (1,) * 3),
        "only_cross_attention": True,
        "use_linear_projection": True,
        "norm_num_groups": 16,
        "norm_eps": 1e-6,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "addition_embed_type": "text_time",
        "addition_embed_type_num_heads": 32,
        "addition_time_embed_dim": 128,
        "projection_class_embeddings_input_dim": 2560,
        "time_cond_proj_dim": 256,
    },
    TextEncoderConfig: {
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 65,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "max_position_embeddings": 32,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "eos_token_id": 50,
        "projection_dim": 24,
    },
    AutoencoderConfig: {
        "in_channels": 4,
        "out_channels": 4,
        "latent_channels": 16,
        "block_out_channels": (128, 256, 512),
        "layers_per_block": 1,
        "norm_num_groups": 16,
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.13025,
        "shift_factor": 0.1159,
    },
}


@pytest.mark.parametrize("kind", OTHER)
def test_keys_differ_when_any_field_does(kind):
    base = dict(SMALLEST[kind])
    if kind is UNetConfig:  # what text_time asks for
        base |= {
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        }
    assert set(OTHER[kind]) == {field.name for field in dataclasses.fields(kind)}
    configs = [kind(**base)]
    configs += [kind(**base | {name: value}) for name, value in OTHER[kind].items()]
    keys = [config.key() for config in configs]
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch("[0-9a-f]{12}", key) for key in keys)


KEYS = {  # graphs are shipped and cached under these names: a change here orphans them
    "unet-sd15": "a74b45039a33",
    "unet-sd21": "4fb6e5d5432a",
    "unet-xl": "b89965db402c",
    "unet-refiner": "4893d273dd8b",
    "text-sd15": "eaecaf288138",
    "text-sd21": "75a1ba1c1d0b",
    "text-xl-2": "d87e12f3d692",
    "vae-sd15": "abf8b3d9da5b",
    "vae-xl": "45590ec9c78c",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_are_stable(name):
    kind, values = PUBLISHED[name]
    assert kind.from_dict(values).key() == KEYS[name]


def test_keys_do_not_depend_on_what_does_not_shape_the_graph():
    config = UNetConfig.from_dict(published.UNET_SD15)
    shuffled = dict(reversed(published.UNET_SD15.items())) | {"sample_size": 96, "other": [1]}
    assert UNetConfig.from_dict(shuffled) == config
    assert UNetConfig.from_dict(shuffled).key() == config.key()


@pytest.mark.parametrize("kind", SMALLEST)
def test_configurations_are_values(kind):
    config = kind(**SMALLEST[kind])
    assert config == kind(**SMALLEST[kind])
    assert hash(config) == hash(kind(**SMALLEST[kind]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(config)[0].name, 4)
