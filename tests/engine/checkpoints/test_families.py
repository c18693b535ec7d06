"""Which family a file is of, and its architectures: full sizes without memory, small ones too."""

import json
import re
from dataclasses import replace

import diffusers
import pytest

from engine.checkpoints.families import FAMILIES
from engine.checkpoints.unsupported import SIGNATURES
from engine.configs.diffusion import AutoencoderConfig, TextEncoderConfig, UNetConfig
from engine.errors import ModelError
from engine.model import Model
from runtime.samplers.noise_schedule import NoiseSchedule
from tests.support import original_layout as original
from tests.support import published_configs as published

PUBLISHED = {  # UNet, text_encoder, text_encoder_2, VAE
    "sd1": (published.UNET_SD15, published.TEXT_SD15, None, published.VAE_SD15),
    "sd2": (published.UNET_SD21, published.TEXT_SD21, None, published.VAE_SD15),
    "xl": (published.UNET_XL, published.TEXT_SD15, published.TEXT_XL_2, published.VAE_XL),
    "xl-refiner": (published.UNET_REFINER, None, published.TEXT_XL_2, published.VAE_XL),
}
ADDED = {  # of the YAML's terms, and of diffusers' configuration
    "as published": ({}, {}),
    "inpainting": ({"in_channels": 9}, {"in_channels": 9}),
    "lcm": ({"time_cond": 256}, {"time_cond_proj_dim": 256}),
}


def full_size(path, family, *, unet=None, drop=(), add=None, **options):
    """Open a file of a published size, of which no byte of data exists."""
    params = original.FULL[family]
    params = replace(params, unet=replace(params.unet, **(unet or {})))
    names = original.model_names(params)
    names = {name: shape for name, shape in names.items() if not name.startswith(tuple(drop))}
    file = original.write_sparse(path / "model.safetensors", names | (add or {}), **options)
    return Model.read(file)


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("family", PUBLISHED)
def test_a_published_size_finds_its_graphs(family, added, tmp_path):
    unet, text, text_2, vae = PUBLISHED[family]
    theirs, ours = ADDED[added]
    checkpoint = full_size(tmp_path, family, unet=theirs)
    assert checkpoint.family is FAMILIES[family]
    assert checkpoint.unet == UNetConfig.from_dict(unet | ours)
    assert checkpoint.unet.key() == UNetConfig.from_dict(unet | ours).key()
    assert checkpoint.vae.key() == AutoencoderConfig.from_dict(vae).key()
    for name, values in (("text_encoder", text), ("text_encoder_2", text_2)):
        found = checkpoint.configs.get(name)
        expected = TextEncoderConfig.from_dict(values) if values else None
        assert found == expected
        assert found is None or found.key() == expected.key()
    assert checkpoint.is_inpainting == (added == "inpainting")
    assert (checkpoint.variant is not None) == (added == "lcm")


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_unet_and_autoencoder_without_text_encoders_tell_the_family(family, tmp_path):
    checkpoint = full_size(tmp_path, family, drop=("cond_stage_model.", "conditioner."))
    assert checkpoint.family is FAMILIES[family]
    assert checkpoint.unet == UNetConfig.from_dict(PUBLISHED[family][0])
    assert not checkpoint.text_encoders
    for name in ("text_encoder", "text_encoder_2"):
        with pytest.raises(ModelError, match=f"holds no {name}; use a file of the whole model"):
            checkpoint.component(name)


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_file_without_an_autoencoder_asks_for_one(family, tmp_path):
    checkpoint = full_size(tmp_path, family, drop=("first_stage_model.",))
    assert "vae" not in checkpoint.configs
    with pytest.raises(ModelError, match=r"model\.safetensors holds no vae; give one with --vae"):
        checkpoint.component("vae")


def test_openclip_files_that_lost_the_last_layer_are_whole(tmp_path):
    lost = (f"{original.OPEN_CLIP}transformer.resblocks.23.", f"{original.OPEN_CLIP}text_proj")
    checkpoint = full_size(tmp_path, "sd2", drop=lost)
    (found,) = checkpoint.text_encoders.values()
    assert found == TextEncoderConfig.from_dict(published.TEXT_SD21)
    lost = (f"{original.OPEN_CLIP}transformer.resblocks.22.",)
    with pytest.raises(ModelError, match=r"lacks cond_stage_model\.model\..*\.22\."):
        full_size(tmp_path, "sd2", drop=lost)


def test_projections_of_stable_diffusion_2_may_be_convolutions(tmp_path):
    checkpoint = full_size(tmp_path, "sd2", unet={"use_linear_in_transformer": False})
    assert checkpoint.unet == UNetConfig.from_dict(published.UNET_SD21)
    assert checkpoint.component("unet").shapes["mid_block.attentions.0.proj_in.weight"] == (
        1280,
        1280,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_schedulers_are_configurations_that_diffusers_reads(family):
    values = dict(FAMILIES[family].scheduler)
    scheduler = getattr(diffusers, values["_class_name"])
    assert values.items() >= {"beta_start": 0.00085, "beta_end": 0.012}.items()
    made = scheduler.from_config(values)
    assert made.alphas_cumprod[-1] == pytest.approx(0.0047, abs=1e-4)
    assert made.config.steps_offset == 1


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_schedulers_of_variants_are_ones_that_diffusers_reads(family):
    for variant in family.variants:
        values = {**family.scheduler, **variant.scheduler}
        getattr(diffusers, values["_class_name"]).from_config(values)
        schedule = NoiseSchedule.from_config(values)
        assert schedule.timestep_spacing == (
            "leading" if variant.name in ("lcm", "tcd", "dmd2") else "trailing"
        )


FOREIGN = {  # names of published files: what the error says
    "a LoRA": [
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
        "unet.mid_block.attentions.0.proj_in.lora_A.weight",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
        "unet.up_blocks.1.attn.processor.to_q_lora.down.weight",
    ],
    "a textual-inversion embedding": ["emb_params", "clip_l", "<cat-toy>"],
    "a ControlNet": [
        "control_model.input_hint_block.0.weight",
        "controlnet_cond_embedding.conv_in.weight",
    ],
    "an upscaler": [
        "params_ema.body.0.rdb1.conv1.weight",
        "model.1.sub.0.RDB1.conv1.0.weight",
        "layers.0.residual_group.blocks.0.norm1.weight",
        "body.1.weight",
    ],
    "an IP-Adapter": ["image_proj.proj.weight"],
    "an AnimateDiff motion module": [
        "down_blocks.0.motion_modules.0.temporal_transformer.norm.bias"
    ],
    "a T2I-Adapter": ["adapter.body.0.in_conv.weight", "body.0.block1.weight"],
    "Stable Diffusion 3": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    "Flux": [
        "model.diffusion_model.double_blocks.0.img_attn.qkv.weight",
        "double_blocks.0.img_attn.norm.key_norm.scale",
    ],
    "Stable Cascade": ["clip_txt_mapper.weight", "down_blocks.1.0.channelwise.0.weight"],
    "AuraFlow": ["double_layers.0.attn.w2q.weight"],
    "Lumina": ["model.diffusion_model.cap_embedder.0.weight"],
    "PixArt, Sana": ["adaln_single.linear.weight"],
    "Stable Video Diffusion": [
        "model.diffusion_model.input_blocks.1.1.time_stack.0.attn1.to_q.weight"
    ],
    "a video model": ["head.modulation", "model.diffusion_model.patchify_proj.weight"],
    "Stable Diffusion 2 with depth": ["depth_model.model.pretrained.pos_embed"],
    "Stable unCLIP": ["noise_augmentor.time_embed.weight"],
    "a model of the EDM schedule": ["edm_mean", "edm_vpred.sigma_max"],
    "the upscaler of Stable Diffusion": ["low_res_scale"],
    "a latent diffusion model of before": ["cond_stage_model.transformer.token_emb.weight"],
    "AltDiffusion": ["cond_stage_model.roberta.embeddings.word_embeddings.weight"],
    "an autoencoder alone": [
        "first_stage_model.encoder.conv_in.weight",
        "decoder.up.0.block.0.conv1.weight",
        "encoder.down_blocks.0.resnets.0.conv1.weight",
    ],
    "the UNet of a folder": [
        "down_blocks.0.resnets.0.conv1.weight",
        "mid_block.attentions.0.norm.bias",
    ],
    "a text encoder alone": ["text_model.encoder.layers.0.mlp.fc1.bias"],
    "no model of images that is known here": ["fc.weight", "layer1.0.conv1.weight"],
}


def test_every_signature_has_an_example():
    names = "\n".join(name for names in FOREIGN.values() for name in names)
    for pattern, (what, _) in SIGNATURES.items():
        assert not what or re.search(pattern, names, re.MULTILINE), pattern


@pytest.mark.parametrize(
    ("what", "name"), [(what, name) for what, names in FOREIGN.items() for name in names]
)
def test_another_architecture_is_refused_by_its_name(what, name, tmp_path):
    names = {name: (4, 4)}
    if name.startswith("model.diffusion_model.") or "." not in name or what.startswith("Stable D"):
        names["model.diffusion_model.out.2.weight"] = (4, 320, 3, 3)
    file = original.write_sparse(tmp_path / "other.safetensors", names)
    with pytest.raises(ModelError, match=re.escape(what)) as caught:
        Model.read(file)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(file))


@pytest.mark.parametrize(
    ("channels", "what"), [(5, "depth"), (7, "upscaler"), (6, "4 .*8 .*and 9")]
)
def test_other_channels_are_refused(channels, what, tmp_path):
    with pytest.raises(ModelError, match=rf"takes {channels} channels.*{what}"):
        full_size(tmp_path, "sd1", unet={"in_channels": channels})


def test_a_file_of_no_tensors_is_refused(tmp_path):
    file = original.write_sparse(tmp_path / "empty.safetensors", {})
    with pytest.raises(ModelError, match="holds no tensors"):
        Model.read(file)


def test_a_file_of_too_many_tensors_is_refused(tmp_path):
    names = {f"model.diffusion_model.{i}": (1,) for i in range(20_001)}
    file = original.write_sparse(tmp_path / "many.safetensors", names)
    with pytest.raises(ModelError, match="20001 tensors"):
        Model.read(file)


def small(path, family, unet=None, **changes):
    params = original.SMALL[family]
    params = replace(params, unet=replace(params.unet, **(unet or {})), **changes)
    return Model.read(
        original.write_sparse(path / "small.safetensors", original.model_names(params))
    )


def test_transformers_may_differ_within_a_level(tmp_path):
    params = original.SMALL["sd1"]
    names = original.model_names(params)
    block = "model.diffusion_model.input_blocks.2.1.transformer_blocks"
    names |= {
        name.replace(f"{block}.0.", f"{block}.1."): shape
        for name, shape in names.items()
        if name.startswith(f"{block}.0.")
    }
    unet = Model.read(original.write_sparse(tmp_path / "uneven.safetensors", names)).unet
    assert unet.down_depths() == ((1, 2), (0, 0))
    assert unet.up_depths() == ((0, 0, 0), (1, 1, 1))
    assert unet.middle_depth() == 1


def test_a_level_with_a_transformer_too_few_is_refused(tmp_path):
    names = original.model_names(original.SMALL["sd1"])
    block = "model.diffusion_model.input_blocks.2.1."
    left = {name: shape for name, shape in names.items() if not name.startswith(block)}
    file = original.write_sparse(tmp_path / "uneven.safetensors", left)
    with pytest.raises(ModelError, match=r"level 0 has transformers of \[1, 0\] blocks"):
        Model.read(file)


def test_a_middle_of_another_depth_is_refused(tmp_path):
    with pytest.raises(ModelError, match="2 blocks at the lowest level and 1 in the middle"):
        small(tmp_path, "xl", {"middle_depth": 1})


def test_widths_that_no_norm_divides_are_refused(tmp_path):
    with pytest.raises(
        ModelError, match=r"small\.safetensors has tensors of no unet that runs.*48"
    ):
        small(tmp_path, "sd1", {"model_channels": 48})


def test_parts_of_different_models_are_refused(tmp_path):
    with pytest.raises(ModelError, match="attends to 96 values and text encoders that make 64"):
        small(tmp_path, "sd1", {"context_dim": 96})
    with pytest.raises(ModelError, match="makes 5 channels and an autoencoder that takes 4"):
        small(tmp_path, "sd1", {"out_channels": 5})


def test_layers_may_differ_by_level(tmp_path):
    checkpoint = small(tmp_path, "sd1", {"num_res_blocks": (1, 3)})
    assert checkpoint.unet.layers_per_block == (1, 3)


def test_the_shipped_facts_are_json():
    for family in FAMILIES.values():
        json.dumps(dict(family.scheduler))
