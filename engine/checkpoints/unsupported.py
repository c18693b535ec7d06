"""What a file is that holds no model of ours: told by names that nothing else has."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from engine.checkpoints.component import shown
from engine.configs.base import Shape
from engine.errors import ModelError

__all__ = ["foreign_channels", "refuse_foreign"]

ADVICE = "use a Stable Diffusion 1.x, 2.x or XL model"
AS_ADAPTER = "give it beside a model, not as one"

# pattern found in a name: (what the file seems to be, what to do); the first that is found counts
SIGNATURES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        r"lora_(unet|te\d?)_|\.lora_(up|down|[AB])\.|\.lora\.(up|down)\.|\.(hada|lokr)_w\d"
        r"|\.processor\..+_lora\.|\.(oft_blocks|dora_scale)\b": ("a LoRA", AS_ADAPTER),
        r"^(emb_params|string_to_param\..+|clip_[lg]|<.+>)$": (
            "a textual-inversion embedding",
            AS_ADAPTER,
        ),
        r"\brdb1\.conv1\.|\bRDB1\.conv1\.|\bresidual_group\.blocks\.|^body\.1\.weight$": (
            "an upscaler",
            "give it as --upscale, or to `latentrt upscale`",
        ),
        r"^control_model\.|^controlnet_|\binput_hint_block\.|^control_all_|^lora_controlnet": (
            "a ControlNet",
            ADVICE,
        ),
        r"^(image_proj|ip_adapter)\.": (
            "an IP-Adapter",
            "give it as --ip-adapter, with --image-prompt and --image-encoder",
        ),
        r"motion_modules\.": ("an AnimateDiff motion module", ADVICE),
        r"^adapter\.body\.|^body\.\d+\.(block1|in_conv)\.": ("a T2I-Adapter", ADVICE),
        r"\bjoint_blocks\.": ("Stable Diffusion 3", ADVICE),
        r"\bdouble_blocks\.|\bsingle_transformer_blocks\.": (
            "Flux or a model made like it",
            ADVICE,
        ),
        r"\bclip_txt_mapper\.|\bchannelwise\.|\beffnet_mapper\.": ("Stable Cascade", ADVICE),
        r"\bdouble_layers\.": ("AuraFlow", ADVICE),
        r"\bcap_embedder\.|\bcontext_refiner\.": ("Lumina or a model made like it", ADVICE),
        r"\bcaption_projection\.|\badaln_single\.|\by_embedder\.": (
            "PixArt, Sana or another diffusion transformer",
            ADVICE,
        ),
        r"\btime_stack\.|\btime_mixer\b|\btemporal_transformer_blocks\.": (
            "Stable Video Diffusion",
            ADVICE,
        ),
        r"\bpatchify_proj\.|\bhead\.modulation$|\bpatch_embedding\.": ("a video model", ADVICE),
        r"^depth_model\.": ("Stable Diffusion 2 with depth", ADVICE),
        r"^noise_augmentor\.": ("Stable unCLIP", ADVICE),
        r"^edm_(mean|std|vpred\.)": ("a model of the EDM schedule, as Playground 2.5", ADVICE),
        r"^low_res_(scale|model)": ("the upscaler of Stable Diffusion", ADVICE),
        r"^cond_stage_model\.transformer\.(token_emb|attn_layers)\.": (
            "a latent diffusion model of before Stable Diffusion",
            ADVICE,
        ),
        r"^cond_stage_model\.roberta\.|^cond_stage_model\.transformer\.roberta\.": (
            "AltDiffusion",
            ADVICE,
        ),
        r"\bmodel\.diffusion_model\.": ("", ""),  # may be ours
        r"^(first_stage_model\.|vae\.)?(encoder\.(down|mid|conv_in)|decoder\.(up|mid|conv_in))": (
            "an autoencoder alone",
            "give it beside a model with --vae",
        ),
        r"^(unet\.)?(down_blocks|mid_block|up_blocks)\.\d*\.?(resnets|attentions)\.": (
            "the UNet of a folder in diffusers' layout",
            "give the folder that holds model_index.json",
        ),
        r"^(text_model\.)?(encoder\.layers|embeddings)\.|^transformer\.resblocks\.": (
            "a text encoder alone",
            "give a whole model",
        ),
    }
)
MAX_TENSORS = 20_000  # the largest models, with averaged weights, have some 5,000

# Channels of the UNet's input that are neither 4 nor, with a picture, 8 nor, with a mask too, 9
CHANNELS: Mapping[int, str] = MappingProxyType(
    {
        5: "Stable Diffusion 2 with depth",
        7: "the upscaler of Stable Diffusion",
    }
)


def refuse_foreign(path: Path, shapes: Mapping[str, Shape]) -> None:
    """Raise ModelError with what a file seems to be, unless it may be one of our families."""
    if not shapes:
        raise ModelError(f"{path} holds no tensors; {ADVICE}")
    if len(shapes) > MAX_TENSORS:
        raise ModelError(
            f"{path} holds {len(shapes)} tensors, and no model that is known here more than "
            f"{MAX_TENSORS}; {ADVICE}"
        )
    names = list(shapes)
    text = "\n".join(name[:200] for name in names)
    for pattern, (what, advice) in SIGNATURES.items():
        if re.search(pattern, text, re.MULTILINE):
            if not what:
                return
            raise ModelError(f"{path} seems to be {what}; {advice}")
    listed = ", ".join(shown(name, 60) for name in names[:3])
    raise ModelError(
        f"{path} is no model of images that is known here: it holds {len(shapes)} tensors such as "
        f"{listed}; {ADVICE}"
    )


def foreign_channels(path: Path, channels: int, latent: int) -> ModelError:
    """Say that a UNet takes something beside latents, for the caller to raise."""
    seems = f", as {CHANNELS[channels]} does" if channels in CHANNELS else ""
    return ModelError(
        f"{path} has a UNet that takes {channels} channels{seems}; supported are {latent} "
        f"(text to image), {2 * latent} (editing by instructions) and {2 * latent + 1} (inpainting)"
    )
