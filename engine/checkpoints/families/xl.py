"""Stable Diffusion XL and its refiner (Podell et al. 2023, arXiv:2307.01952)."""

from dataclasses import replace
from types import MappingProxyType

from engine.checkpoints.architecture import CONTEXT, Stored, first_transformer
from engine.checkpoints.families.base import SCHEDULE, Family, Presets, choice, has
from engine.checkpoints.families.sd import CLIP_L, INPAINTING_CHANNELS, LCM_GUIDANCE_CHANNELS
from engine.checkpoints.families.variants import DMD2, HYPER, LCM, LIGHTNING, TCD, XL_TURBO
from engine.checkpoints.parts import UNET, autoencoder, clip, open_clip, unet
from engine.configs.diffusion import (
    XL_SCALING_FACTOR,
    AutoencoderConfig,
    TextEncoderConfig,
    UNetConfig,
)

__all__ = ["OPEN_CLIP_G", "REFINER", "REFINER_FAMILY", "XL", "XL_FAMILY"]

# The last two of each are stable-diffusion.cpp's: all its text encoders have transformers' names.
CLIP_PLACE = (
    "conditioner.embedders.0.transformer.text_model.",
    "conditioner.embedders.0.transformer.",
    "cond_stage_model.transformer.text_model.",
    "text_encoders.clip_l.transformer.text_model.",
)
OPEN_CLIP_PLACE = (
    "conditioner.embedders.1.model.",
    "cond_stage_model.1.transformer.text_model.",
    "text_encoders.clip_g.transformer.text_model.",
)
REFINER_PLACE = ("conditioner.embedders.0.model.",)
REFINER_CONTEXT = 1280  # what the refiner attends to; XL attends to 2048
SCHEDULER = MappingProxyType(
    {
        **SCHEDULE,
        "_class_name": "EulerDiscreteScheduler",
        "interpolation_type": "linear",
        "sample_max_value": 1.0,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    }
)

OPEN_CLIP_G = TextEncoderConfig(
    vocab_size=49408,
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
)
XL = UNetConfig(
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
# Distilled to fewer transformers, and to half a middle (Gupta et al. 2024, arXiv:2401.02677).
SSD_1B = replace(
    XL,
    mid_block_type="UNetMidBlock2D",
    transformer_layers_per_block=((0, 0), (2, 2), (4, 4)),
    reverse_transformer_layers_per_block=((4, 4, 10), (2, 1, 1), (0, 0, 0)),
)
VEGA = replace(XL, mid_block_type="UNetMidBlock2D", transformer_layers_per_block=(1, 1, 2))
REFINER = UNetConfig(
    block_out_channels=(384, 768, 1536, 1536),
    down_block_types=(
        "DownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(6, 12, 24, 24),
    transformer_layers_per_block=4,
    cross_attention_dim=1280,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2560,
)


def _has_size_conditioning(file: Stored) -> bool:
    return f"{UNET}label_emb" in file


def _is_refiner(file: Stored) -> bool:
    """Tell it by OpenCLIP alone; without a text encoder by the width of the text."""
    if not _has_size_conditioning(file) or has(file, CLIP_PLACE + OPEN_CLIP_PLACE):
        return False
    attends = f"{first_transformer(file, UNET)}.{CONTEXT}"
    return has(file, REFINER_PLACE) or file.size(attends, 1) == REFINER_CONTEXT


def _is_xl(file: Stored) -> bool:
    return _has_size_conditioning(file) and not _is_refiner(file)


XL_FAMILY = Family(
    name="xl",
    title="Stable Diffusion XL",
    recognises=_is_xl,
    unet=MappingProxyType({"addition_embed_type": "text_time", "addition_time_ids": 6}),
    parts=MappingProxyType(
        {
            "text_encoder": clip(CLIP_PLACE),
            "text_encoder_2": open_clip(OPEN_CLIP_PLACE, pooled=True),
            "unet": unet(linear=True),
            "vae": autoencoder(XL_SCALING_FACTOR),
        }
    ),
    pipelines=("StableDiffusionXL",),
    context="penultimate_hidden_state",
    zeros_for_empty_prompt=True,
    scheduler=SCHEDULER,
    sample_size=128,
    scaling_factor=XL_SCALING_FACTOR,
    # Of 768 pixels instead of 1024: 0.56 of the work; smaller ones lose what XL is made for.
    presets=Presets(
        title="Stable Diffusion XL",
        fast=choice(10, 5.0, schedule="align_your_steps_xl", size=768),
        balanced=choice(25, 5.0, schedule="karras"),
        quality=choice(50, 5.0, schedule="karras"),
        creative=choice(30, 4.0, "euler_a"),
    ),
    variants=(XL_TURBO, LIGHTNING, HYPER, LCM, TCD, DMD2),
    published=MappingProxyType(
        {
            "text_encoder": (CLIP_L, OPEN_CLIP_G),
            "unet": (
                XL,
                replace(XL, in_channels=INPAINTING_CHANNELS),
                replace(XL, time_cond_proj_dim=LCM_GUIDANCE_CHANNELS),
                *(SSD_1B, VEGA),
            ),
            "vae": (AutoencoderConfig(scaling_factor=XL_SCALING_FACTOR),),
        }
    ),
)
REFINER_FAMILY = Family(
    name="xl-refiner",
    title="Stable Diffusion XL refiner",
    recognises=_is_refiner,
    unet=MappingProxyType({"addition_embed_type": "text_time", "addition_time_ids": 5}),
    parts=MappingProxyType(
        {
            "text_encoder_2": open_clip(REFINER_PLACE, pooled=True),
            "unet": unet(linear=True, refiner=True),
            "vae": autoencoder(XL_SCALING_FACTOR),
        }
    ),
    pipelines=("StableDiffusionXL",),
    context="penultimate_hidden_state",
    scheduler=SCHEDULER,
    sample_size=128,
    scaling_factor=XL_SCALING_FACTOR,
    # From a picture: strength is the share of the steps that are run.
    presets=Presets(
        title="Stable Diffusion XL refiner",
        fast=choice(20, 5.0, schedule="karras"),
        balanced=choice(30, 5.0, schedule="karras"),
        quality=choice(50, 5.0, schedule="karras"),
        creative=choice(30, 4.0, "euler_a"),
    ),
    variants=(XL_TURBO, LIGHTNING, HYPER, LCM, TCD, DMD2),
    published=MappingProxyType(
        {
            "text_encoder": (OPEN_CLIP_G,),
            "unet": (REFINER,),
            "vae": (AutoencoderConfig(scaling_factor=XL_SCALING_FACTOR),),
        }
    ),
)
