"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022, arXiv:2112.10752)."""

import re
from dataclasses import replace
from types import MappingProxyType

from engine.checkpoints.architecture import Stored, first_transformer
from engine.checkpoints.families.base import SCALING_FACTOR, SCHEDULE, Family, Presets, choice, has
from engine.checkpoints.families.variants import DMD2, HYPER, LCM, LIGHTNING, TCD, TURBO
from engine.checkpoints.parts import UNET, autoencoder, clip, open_clip, unet
from engine.configs.diffusion import AutoencoderConfig, TextEncoderConfig, UNetConfig

__all__ = [
    "CLIP_L",
    "INPAINTING_CHANNELS",
    "LCM_GUIDANCE_CHANNELS",
    "OPEN_CLIP_H",
    "SD1",
    "SD1_FAMILY",
    "SD2",
    "SD2_FAMILY",
]

CLIP_PLACE = ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")
OPEN_CLIP_PLACE = ("cond_stage_model.model.",)
OPEN_CLIP_WIDTH = 1024
EDITING_CHANNELS = 8  # the latent and the latents of the picture that is edited
INPAINTING_CHANNELS = 9  # the latent, the mask and the masked picture's latents
LCM_GUIDANCE_CHANNELS = 256  # of the embedded guidance scale that an LCM's UNet is told

CLIP_L = TextEncoderConfig(
    vocab_size=49408,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
)
OPEN_CLIP_H = TextEncoderConfig(
    vocab_size=49408,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,  # of 24: the UNet attends to the layer before the last
    num_attention_heads=16,
    hidden_act="gelu",
)
SD1 = UNetConfig(cross_attention_dim=768)
SD2 = UNetConfig(
    cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
)

# Smaller ones with the same texts, distilled: BK-SDM (Kim et al. 2023, arXiv:2305.15798), whose
# small and tiny forms are Segmind's small-sd and tiny-sd too, and SDXS-512 (Song et al. 2024,
# arXiv:2403.16627) of either generation. Tiny ones lack the lowest level.
BK_SDM = replace(SD1, layers_per_block=1)
BK_SDM_SMALL = replace(BK_SDM, mid_block_type=None)
BK_SDM_TINY = replace(
    BK_SDM_SMALL,
    block_out_channels=(320, 640, 1280),
    down_block_types=("CrossAttnDownBlock2D",) * 3,
    up_block_types=("CrossAttnUpBlock2D",) * 3,
)
SDXS = replace(
    BK_SDM_TINY,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(5, 10, 20),
)
SDXS_OF_SD2 = replace(
    BK_SDM_TINY,
    cross_attention_dim=1024,
    attention_head_dim=(5, 10, 20),
    use_linear_projection=True,
    only_cross_attention=(True, False, False),
)

# 10 steps are what the tables of arXiv:2404.14507 were found for, with SD 1.5 and SDXL.
PRESETS = Presets(
    title="Stable Diffusion",
    fast=choice(10, 7.5, schedule="align_your_steps"),
    balanced=choice(25, 7.5, schedule="karras"),
    quality=choice(50, 7.5, schedule="karras"),
    creative=choice(30, 5.5, "euler_a"),
)
# Its tables are for predicted noise, and Karras's levels need 15 steps with DPM++ 2M.
V_PRESETS = Presets(
    title="Stable Diffusion predicting v",
    fast=choice(15, 7.5, schedule="karras"),
    balanced=choice(25, 7.5, schedule="karras"),
    quality=choice(50, 7.5, schedule="karras"),
    creative=choice(30, 5.5, "euler_a"),
)


def _has_unet(file: Stored) -> bool:
    return has(file, (UNET,)) and f"{UNET}label_emb" not in file


def _has_renamed_open_clip(file: Stored) -> bool:
    """Tell an OpenCLIP model in CLIP's place, where stable-diffusion.cpp puts it, by its layers."""
    for place in CLIP_PLACE:
        width = file.shapes.get(f"{place}embeddings.token_embedding.weight", ())[-1:]
        layer = f"{place}encoder.layers.0"
        if width == (OPEN_CLIP_WIDTH,) or has(
            file, (f"{layer}.attn", f"{layer}.self_attn.in_proj")
        ):
            return True
    return False


def _is_sd1(file: Stored) -> bool:
    """Tell it by CLIP; without a text encoder by the convolutions around its transformers."""
    projection = f"{first_transformer(file, UNET)}.proj_in.weight"
    convolutions = len(file.shapes.get(projection, ())) == 4
    reads_by_clip = has(file, CLIP_PLACE) or convolutions
    by_open_clip = has(file, OPEN_CLIP_PLACE) or _has_renamed_open_clip(file)
    return _has_unet(file) and not by_open_clip and reads_by_clip


def _is_sd2(file: Stored) -> bool:
    """Tell it by OpenCLIP; without a text encoder by linear projections."""
    return _has_unet(file) and not _is_sd1(file)


SD1_FAMILY = Family(
    name="sd1",
    title="Stable Diffusion 1.x",
    recognises=_is_sd1,
    unet=MappingProxyType({"addition_embed_type": None, "use_linear_projection": False}),
    parts=MappingProxyType(
        {
            "text_encoder": clip(CLIP_PLACE),
            "unet": unet(linear=False),
            "vae": autoencoder(SCALING_FACTOR),
        }
    ),
    pipelines=("StableDiffusion", "LatentConsistencyModel"),
    scheduler=MappingProxyType({"_class_name": "PNDMScheduler", **SCHEDULE}),
    sample_size=64,
    presets=PRESETS,
    v_presets=V_PRESETS,
    variants=(TURBO, LIGHTNING, HYPER, LCM, TCD, DMD2),
    published=MappingProxyType(
        {
            "text_encoder": (CLIP_L,),
            "unet": (
                SD1,
                replace(SD1, in_channels=INPAINTING_CHANNELS),
                replace(SD1, in_channels=EDITING_CHANNELS),
                replace(SD1, time_cond_proj_dim=LCM_GUIDANCE_CHANNELS),
                *(BK_SDM, BK_SDM_SMALL, BK_SDM_TINY, SDXS),
            ),
            "vae": (AutoencoderConfig(),),
        }
    ),
)
SD2_FAMILY = Family(
    name="sd2",
    title="Stable Diffusion 2.x",
    recognises=_is_sd2,
    unet=MappingProxyType({"addition_embed_type": None, "use_linear_projection": True}),
    parts=MappingProxyType(
        {
            "text_encoder": open_clip(OPEN_CLIP_PLACE + CLIP_PLACE[:1], pooled=False),
            "unet": unet(linear=True),
            "vae": autoencoder(SCALING_FACTOR),
        }
    ),
    pipelines=("StableDiffusion", "LatentConsistencyModel"),
    scheduler=MappingProxyType({"_class_name": "DDIMScheduler", **SCHEDULE}),
    prediction_type="v_prediction",
    # `v2-1_768-ema-pruned` and `512-base-ema` are how they came.
    prediction_names=(
        (re.compile(r"(?<!\d)768(?!\d)"), "v_prediction"),
        (re.compile(r"(?<!\d)512(?!\d)|(?<![a-z])base(?![a-z])"), "epsilon"),
    ),
    sample_size=64,
    v_sample_size=96,  # of the models for 768 pixels
    presets=PRESETS,
    v_presets=V_PRESETS,
    variants=(TURBO, LIGHTNING, HYPER, LCM, TCD, DMD2),
    published=MappingProxyType(
        {
            "text_encoder": (OPEN_CLIP_H,),
            "unet": (SD2, replace(SD2, in_channels=INPAINTING_CHANNELS), SDXS_OF_SD2),
            "vae": (AutoencoderConfig(),),
        }
    ),
)
