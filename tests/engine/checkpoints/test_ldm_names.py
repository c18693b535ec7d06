"""The tables of names, against the original code's own lists and diffusers' conversions."""

import gzip
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers.loaders import single_file_utils as reference

from engine.checkpoints.component import UNUSED, Source, left_over
from engine.checkpoints.ldm_names import (
    autoencoder_sources,
    open_clip_sources,
    text_encoder_sources,
    unet_sources,
)
from engine.configs.diffusion import AutoencoderConfig, TextEncoderConfig, UNetConfig
from engine.model import Model
from tests.support import original_layout as original
from tests.support import published_configs as published

DATA = Path(__file__).parents[2] / "support" / "data" / "original_names.json.gz"
LISTED = {
    family: {name: tuple(shape) for name, shape in names.items()}
    for family, names in json.loads(gzip.decompress(DATA.read_bytes())).items()
}
UNETS = {
    "sd1": published.UNET_SD15,
    "sd2": published.UNET_SD21,
    "xl": published.UNET_XL,
    "xl-refiner": published.UNET_REFINER,
}
OPEN_CLIPS = {  # configuration and place
    "sd2": (published.TEXT_SD21, original.OPEN_CLIP),
    "xl": (published.TEXT_XL_2, original.XL_OPEN_CLIP),
    "xl-refiner": (published.TEXT_XL_2, original.REFINER_OPEN_CLIP),
}


def under(prefix, names):
    """Take the names of one part, without its prefix."""
    return {n.removeprefix(prefix): shape for n, shape in names.items() if n.startswith(prefix)}


def check(sources, config, listed):
    """Every tensor has a source of its shape; return the listed names that are not used."""
    shapes = config.tensor_shapes()
    assert list(sources) == list(shapes)
    for name, source in sources.items():
        stored = source.shape(listed[source.name])
        assert stored == shapes[name] or (*shapes[name], 1, 1) == stored
    return set(listed) - {source.name for source in sources.values()}


@pytest.mark.parametrize("family", LISTED)
def test_the_writer_of_the_tests_names_what_the_original_code_does(family):
    written = original.model_names(original.FULL[family], ema=family == "sd1")
    assert written == LISTED[family]


@pytest.mark.parametrize("family", UNETS)
def test_every_tensor_of_a_published_unet_has_its_name(family):
    config = UNetConfig.from_dict(UNETS[family])
    listed = under(original.UNET, LISTED[family])
    assert check(unet_sources(config), config, listed) == set()


@pytest.mark.parametrize("family", LISTED)
def test_every_tensor_of_a_published_autoencoder_has_its_name(family):
    config = AutoencoderConfig.from_dict(published.VAE_SD15)
    listed = under(original.VAE, LISTED[family])
    assert check(autoencoder_sources(config), config, listed) == set()


@pytest.mark.parametrize(("family", "place"), [("sd1", original.CLIP), ("xl", original.XL_CLIP)])
def test_every_tensor_of_a_published_clip_text_encoder_has_its_name(family, place):
    config = TextEncoderConfig.from_dict(published.TEXT_SD15)
    assert check(text_encoder_sources(config, place), config, LISTED[family]) == {
        name for name in LISTED[family] if not name.startswith(place)
    }


@pytest.mark.parametrize("family", OPEN_CLIPS)
def test_every_tensor_of_a_published_open_clip_text_tower_has_its_name(family):
    values, place = OPEN_CLIPS[family]
    config = TextEncoderConfig.from_dict(values)
    unused = check(open_clip_sources(config), config, under(place, LISTED[family]))
    if family == "sd2":
        assert "text_projection" in unused
        unused = {name for name in unused if not name.startswith("transformer.resblocks.23.")}
        assert not left_over([place + name for name in unused], set())
    else:
        assert unused == {"logit_scale"}


SMALL = {
    **original.SMALL,
    **{f"{name} inpainting": original.inpainting(p) for name, p in original.SMALL.items()},
}


@pytest.fixture(params=SMALL)
def written(request, tmp_path):
    """A small model's tensors in the original layout, and what is read of its file."""
    params = SMALL[request.param]
    tensors = original.random_tensors(original.model_names(params))
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    return params, tensors, Model.read(tmp_path / "model.safetensors")


def equal(component, expected):
    """Compare with what diffusers made: the same names, the same numbers."""
    expected = {name: value for name, value in expected.items() if "position_ids" not in name}
    assert set(component) == set(expected)
    for name, value in expected.items():
        array = component[name]
        assert array.size == value.numel()
        assert np.array_equal(array, value.numpy().reshape(array.shape)), name


def torch_tensors(tensors):
    return {name: torch.from_numpy(value) for name, value in tensors.items()}


def test_unets_are_what_diffusers_converts_them_to(written):
    params, tensors, checkpoint = written
    config = {
        "layers_per_block": params.unet.num_res_blocks[0],
        "addition_embed_type": "text_time" if params.unet.adm_in_channels else None,
    }
    converted = reference.convert_ldm_unet_checkpoint(torch_tensors(tensors), config)
    equal(checkpoint.component("unet"), converted)


def test_autoencoders_are_what_diffusers_converts_them_to(written):
    params, tensors, checkpoint = written
    blocks = [""] * len(params.vae.ch_mult)
    config = {"down_block_types": blocks, "up_block_types": blocks}
    converted = reference.convert_ldm_vae_checkpoint(torch_tensors(tensors), config)
    equal(checkpoint.component("vae"), converted)


def test_text_encoders_are_what_diffusers_converts_them_to(written):
    params, tensors, checkpoint = written
    tensors = torch_tensors(tensors)
    if params.clip:
        converted = reference.convert_ldm_clip_checkpoint(tensors)
        converted = {n: v for n, v in converted.items() if n.startswith("text_model.")}
        equal(checkpoint.component("text_encoder"), converted)
    if params.open_clip:
        xl = params.unet.adm_in_channels is not None
        place = next(place for place in original.parts(params) if place.endswith(".model."))
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=params.open_clip.width))
        tensors[place + "text_projection"] = tensors[place + "text_projection"].clone()
        converted = reference.convert_open_clip_checkpoint(model, tensors, prefix=place)
        if not xl:
            last = params.open_clip.layers - 1
            converted = {
                name: value
                for name, value in converted.items()
                if f".layers.{last}." not in name and not name.startswith("text_projection")
            }
        equal(checkpoint.component("text_encoder_2" if xl else "text_encoder"), converted)


def test_averaged_weights_are_what_diffusers_extracts(tmp_path, caplog):
    params = SMALL["sd1"]
    tensors = original.random_tensors(original.model_names(params, ema=True))
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Model.read(tmp_path / "model.safetensors")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    converted = reference.convert_ldm_unet_checkpoint(
        torch_tensors(tensors), {"layers_per_block": 2}, extract_ema=True
    )
    equal(checkpoint.component("unet"), converted)
    assert any("EMA" in note and "are used" in note for note in checkpoint.notes)


def test_a_source_takes_a_third_or_the_transpose_as_a_view():
    stored = np.arange(12.0).reshape(6, 2)
    third = Source(name="in_proj_weight", third=1)
    assert third.shape((6, 2)) == (2, 2)
    assert third.shape((5, 2)) is None
    assert third.shape(()) is None
    assert np.array_equal(third.view(stored, (2, 2)), stored[2:4])
    turned = Source(name="text_projection", transposed=True)
    assert turned.shape((6, 2)) == (2, 6)
    assert np.array_equal(turned.view(stored, (2, 6)), stored.T)
    for source, shape in ((third, (2, 2)), (turned, (2, 6)), (Source(name="a"), (6, 2, 1, 1))):
        assert np.shares_memory(source.view(stored, shape), stored)


KNOWN = {  # reason's beginning: names that published files have
    "averages": ["model_ema.diffusion_modelout2weight", "first_stage_model.model_ema.decay"],
    "the noise schedule": [*original.SCHEDULE, "denoiser.sigmas"],
    "settings": ["logvar", "lvlb_weights", "scale_factor"],
    "the discriminator": ["loss.logvar", "first_stage_model.loss.discriminator.main.0.weight"],
    "words": ["embedding_manager.string_to_param_dict.*"],
    "the numbers": ["position_ids", f"{original.CLIP}embeddings.position_ids"],
    "the causal mask": [f"{original.OPEN_CLIP}attn_mask"],
    "the temperature": ["conditioner.embedders.0.logit_scale", "cond_stage_model.logit_scale"],
    "CLIP's half": ["cond_stage_model.transformer.vision_model.post_layernorm.weight"],
    "the projection": [
        "cond_stage_model.model.text_projection",
        "cond_stage_model.transformer.text_projection.weight",
        "cond_stage_model.transformer.text_model.text_projection",
        "text_encoders.clip_l.transformer.text_projection.weight",
        "conditioner.embedders.0.transformer.text_projection.weight",
        "conditioner.embedders.0.text_projection",
        "text_projection.weight",
    ],
    "a mark that says what": ["v_pred", "ztsnr"],
}
ANYWHERE = {  # in whichever part of a model
    "a mark that says that": [
        "scaled_fp8",
        f"{original.UNET}scaled_fp8",
        f"{original.UNET}out.2.comfy_quant",
    ],
    "the range": [f"{original.UNET}out.2.scale_input", "out.2.input_scale", "out.2.output_scale"],
}


def test_every_kind_of_unused_tensor_has_an_example():
    beginnings = KNOWN | ANYWHERE
    assert len(beginnings) == len(UNUSED)
    for reason in UNUSED.values():
        assert any(reason.startswith(beginning) for beginning in beginnings)


@pytest.mark.parametrize("names", ANYWHERE.values(), ids=list(ANYWHERE))
def test_marks_of_layers_are_not_left_over(names):
    assert left_over(names, set()) == []


@pytest.mark.parametrize("names", KNOWN.values(), ids=list(KNOWN))
def test_known_tensors_are_not_left_over(names):
    assert left_over(names, set()) == []
    assert left_over([f"model.{name}" for name in names], set()) == [f"model.{n}" for n in names]


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.out.2.weight",
        "conditioner.embedders.1.model.text_projection",
        "cond_stage_model.model.transformer.resblocks.23.ln_1.bias",
        "first_stage_model.decoder.conv_in.weight",
        "betas2",
        "my_betas",
    ],
)
def test_other_tensors_are_left_over(name):
    assert left_over([name], set()) == [name]
    assert left_over([name], {name}) == []
