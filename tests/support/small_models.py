"""Small models of every family, as their authors publish them and as diffusers runs them.

A model begins as a file in the original layout with random numbers of trained models' sizes. The
reference is made of it by diffusers' own conversion, so that no table of ours is in between. Widths
keep to what `engine/checkpoints/architecture.py` reads off shapes, and the vocabulary is CLIP's.
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from engine.configs.diffusion import Config
from engine.graphs.graph import Part, graph_name
from engine.model import Model
from runtime.conditioning.vocabulary import Vocabulary
from tests.support import original_layout as original
from tests.support.original_layout import AutoencoderParams, ModelParams, TextParams, UNetParams
from tests.support.traced import trace_once

SIDE = 8  # of the latents: pictures of 64 by 64 pixels
TIME_EMBED = 32  # of each of the numbers that XL is told
ENDINGS = {"CLIP": "<|endoftext|>", "OpenCLIP": "!"}  # what their rows are padded with

# 64 channels are 2 for each group of a norm. With 1 a norm takes the time embedding out again.
VAE = AutoencoderParams(ch=64, ch_mult=(1, 1, 1, 1), num_res_blocks=1)
CLIP = TextParams(width=64, layers=2)
OPEN_CLIP = TextParams(width=64, layers=2, projection=64)
SD1 = ModelParams(
    unet=UNetParams(
        model_channels=64,
        channel_mult=(1, 2),
        transformer_depth=(1, 0),
        middle_depth=1,
        context_dim=64,
        num_res_blocks=(1, 1),
        use_linear_in_transformer=False,
    ),
    vae=VAE,
    clip=CLIP,
)
SHALLOW = replace(  # what is added to it does not need more, and it is traced in half the time
    SD1,
    unet=replace(SD1.unet, channel_mult=(1,), transformer_depth=(0,), num_res_blocks=(1,)),
)
SD2 = ModelParams(
    unet=UNetParams(
        model_channels=64,
        channel_mult=(1, 2),
        transformer_depth=(1, 0),
        middle_depth=1,
        context_dim=64,
        num_res_blocks=(1, 1),
    ),
    vae=VAE,
    open_clip=replace(OPEN_CLIP, layers=3),
)
XL = ModelParams(
    unet=UNetParams(
        model_channels=64,
        channel_mult=(1, 2),
        transformer_depth=(0, 2),
        middle_depth=2,
        context_dim=128,
        num_res_blocks=(1, 1),
        adm_in_channels=64 + 6 * TIME_EMBED,
    ),
    vae=VAE,
    clip=CLIP,
    open_clip=OPEN_CLIP,
)
REFINER = ModelParams(
    unet=UNetParams(
        model_channels=64,
        channel_mult=(1, 2),
        transformer_depth=(0, 0),
        middle_depth=1,
        context_dim=64,
        num_res_blocks=(1, 1),
        adm_in_channels=64 + 5 * TIME_EMBED,
    ),
    vae=VAE,
    open_clip=OPEN_CLIP,
)

# The published `scheduler_config.json` files.
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
V_PREDICTION = SCHEDULE | {"prediction_type": "v_prediction"}
TRAILING = SCHEDULE | {"timestep_spacing": "trailing"}
LEADING = SCHEDULE | {"timestep_spacing": "leading"}
CONSISTENCY = LEADING | {"set_alpha_to_one": True, "steps_offset": 0}


@dataclass(frozen=True)
class SmallModel:
    """A model in the original layout.

    file: the stem that its file has; scheduler: what diffusers is told
    kind: diffusers' pipeline, less its `Pipeline`; extra: arguments of its own
    """

    file: str
    params: ModelParams
    kind: str
    schedule: Mapping[str, Any]
    seed: int = 0
    scheduler: str = "DDIMScheduler"

    @property
    def is_xl(self) -> bool:
        return self.params.unet.adm_in_channels is not None

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return trained(original.model_names(self.params), self.seed)

    @cached_property
    def configs(self) -> Mapping[str, Config]:
        """Read what the file says of its parts, by the names of components."""
        with tempfile.TemporaryDirectory() as folder:
            return dict(Model.open(self.write_file(Path(folder))).configs)

    @cached_property
    def reference(self) -> DiffusionPipeline:
        """Make what diffusers runs of it."""
        kind: Any = getattr(diffusers, f"{self.kind}Pipeline")
        parts = {"unet": make_unet(self.params, self.tensors)}
        parts["vae"] = make_vae(self.params, self.tensors)
        names = ["text_encoder_2"] if self.is_xl and not self.params.clip else ["text_encoder"]
        if self.params.clip and self.params.open_clip:
            names.append("text_encoder_2")
        encoders = (self.params.clip and "CLIP", self.params.open_clip and "OpenCLIP")
        for name, encoder in zip(names, filter(None, encoders), strict=True):
            parts[name] = make_text_encoder(self.params, self.tensors, encoder)
            parts[name.replace("text_encoder", "tokenizer")] = make_tokenizer(ENDINGS[encoder])
        scheduler = getattr(diffusers, self.scheduler).from_config(dict(self.schedule))
        if self.is_xl:
            absent = {"text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"} - parts.keys()
            extra: dict[str, Any] = dict.fromkeys(absent)
            if not self.params.clip:
                extra |= {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
            extra["add_watermarker"] = False
        else:
            extra = {"safety_checker": None, "feature_extractor": None}
            extra["requires_safety_checker"] = False
        pipeline = kind(**parts, scheduler=deepcopy(scheduler), **extra)
        pipeline.scheduler = scheduler  # diffusers sets a steps_offset of 0 to 1
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def write_folder(self, folder: Path, **options: Any) -> Path:
        """Save in diffusers' layout."""
        self.reference.save_pretrained(folder, **options)
        return folder

    def write_file(self, folder: Path, **metadata: str) -> Path:
        path = folder / f"{self.file}.safetensors"
        save_file(self.tensors, path, metadata=metadata or None)
        return path

    def write_training_checkpoint(self, folder: Path, *, averages: bool = False) -> Path:
        """Save as PyTorch Lightning does in training.

        averages: keep the weights as running means, and others, still to be averaged, as the UNet
        """
        tensors = dict(self.tensors)
        if averages:
            names = original.model_names(self.params, ema=True)
            tensors = trained(names, self.seed + 1) | {
                n: v for n, v in tensors.items() if not n.startswith(original.UNET)
            }
            for name, value in self.tensors.items():
                if name.startswith(original.UNET):
                    flat = name.removeprefix("model.").replace(".", "")
                    tensors[f"model_ema.{flat}"] = value
        path = folder / f"{self.file}.ckpt"
        optimizer = {
            "state": {0: {"step": 470000, "exp_avg": torch.zeros(4), "exp_avg_sq": torch.ones(4)}},
            "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "amsgrad": False, "params": [0]}],
        }
        state = {
            "epoch": 6,
            "global_step": 470000,
            "pytorch-lightning_version": "1.4.2",
            "state_dict": tensors,
            "callbacks": {"ModelCheckpoint": {"monitor": None, "best_model_path": ""}},
            "optimizer_states": [optimizer],
            "lr_schedulers": [{"base_lrs": [1e-4], "last_epoch": 470000}],
            "hyper_parameters": {"scale_factor": 0.18215},
        }
        torch.save(state, path)
        return path


def trained(names: original.Shapes, seed: int) -> dict[str, Tensor]:
    """Draw numbers that keep every layer's output near 1; no two tensors have the same."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in names.items():
        numbers = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            tensors[name] = numbers / math.sqrt(math.prod(shape[1:]))
        else:
            is_norm = name.endswith(".weight") and len(shape) == 1
            tensors[name] = 0.2 * numbers + (1 if is_norm else 0)
    return tensors


def make_unet(params: ModelParams, tensors: Mapping[str, Tensor]) -> UNet2DConditionModel:
    unet = params.unet
    widths = [unet.model_channels * mult for mult in unet.channel_mult]
    attends = [bool(depth) for depth in unet.transformer_depth]
    depths = [depth or 1 for depth in unet.transformer_depth]
    depths[-1] = unet.middle_depth
    config: dict[str, Any] = {
        "sample_size": SIDE,
        "in_channels": unet.in_channels,
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]],
        "layers_per_block": unet.num_res_blocks[0],
        "cross_attention_dim": unet.context_dim,
        "attention_head_dim": 8,
        "time_cond_proj_dim": unet.time_cond,
    }
    if unet.use_linear_in_transformer:
        config["use_linear_projection"] = True
        config["attention_head_dim"] = [max(width // 64, 1) for width in widths]
    if set(depths) != {1}:  # a number where all that count are equal, as of Stable Diffusion 2
        config["transformer_layers_per_block"] = (
            unet.middle_depth if {*unet.transformer_depth} <= {0, unet.middle_depth} else depths
        )
    if unet.adm_in_channels:
        config["addition_embed_type"] = "text_time"
        config["addition_time_embed_dim"] = TIME_EMBED
        config["projection_class_embeddings_input_dim"] = unet.adm_in_channels
    module = UNet2DConditionModel(**config)
    told = {"layers_per_block": config["layers_per_block"]}
    told["addition_embed_type"] = config.get("addition_embed_type")
    state = single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), told)
    if unet.time_cond:
        name = "cond_proj.weight"
        state[f"time_embedding.{name}"] = tensors[f"{original.UNET}time_embed.{name}"]
    module.load_state_dict(state)
    return module.eval()


def make_vae(params: ModelParams, tensors: Mapping[str, Tensor]) -> AutoencoderKL:
    levels = len(params.vae.ch_mult)
    down, up = ["DownEncoderBlock2D"] * levels, ["UpDecoderBlock2D"] * levels
    module = AutoencoderKL(
        block_out_channels=[params.vae.ch * mult for mult in params.vae.ch_mult],
        down_block_types=down,
        up_block_types=up,
        layers_per_block=params.vae.num_res_blocks,
        latent_channels=params.vae.z_channels,
        sample_size=SIDE * 2 ** (levels - 1),
        scaling_factor=0.13025 if params.unet.adm_in_channels else 0.18215,
        force_upcast=False,
    )
    told = {"down_block_types": down, "up_block_types": up}
    module.load_state_dict(single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), told))
    return module.eval()


def make_text_encoder(params: ModelParams, tensors: Mapping[str, Tensor], encoder: str) -> Any:
    """Make the encoder that is "CLIP" or "OpenCLIP"."""
    is_clip, is_xl = encoder == "CLIP", params.unet.adm_in_channels is not None
    text = params.clip if is_clip else params.open_clip
    assert text is not None
    config = CLIPTextConfig(
        vocab_size=text.vocab,
        hidden_size=text.width,
        intermediate_size=4 * text.width,
        num_hidden_layers=text.layers - (not is_clip and not is_xl),
        num_attention_heads=max(text.width // 64, 1),
        max_position_embeddings=text.positions,
        hidden_act="quick_gelu" if is_clip else "gelu",
        projection_dim=text.projection or text.width,
        bos_token_id=text.vocab - 2,
        eos_token_id=text.vocab - 1,
    )
    if is_clip:
        state = single_file_utils.convert_ldm_clip_checkpoint(dict(tensors))
    else:
        place = next(p for p in original.parts(params) if p.endswith(".model."))
        shape = type("Shape", (), {"config": config})()
        state = single_file_utils.convert_open_clip_checkpoint(shape, dict(tensors), prefix=place)
    kind = CLIPTextModelWithProjection if not is_clip and is_xl else CLIPTextModel
    module = kind(config).eval()
    expected = module.state_dict()
    bare = not any(name.startswith("text_model.") for name in expected)
    named = {n.removeprefix("text_model.") if bare else n: v for n, v in state.items()}
    module.load_state_dict({name: named[name] for name in expected})
    return module


def make_tokenizer(pad_token: str) -> CLIPTokenizer:
    vocabulary = Vocabulary.clip(pad_token)
    return CLIPTokenizer(
        vocab=dict(vocabulary.ids),
        merges=list(vocabulary.merges),
        pad_token=pad_token,
        model_max_length=vocabulary.max_length,
    )


def trace_graphs(model: Model, folder: Path, parts: Sequence[Part] = ()) -> None:
    """Trace a model's parts into a folder, less those that are there."""
    usual: list[Part] = [*model.text_encoders, "step", "vae_decoder", "vae_encoder"]
    for part in parts or usual:
        config = model.config(part)
        name = graph_name(part, config, "float32")
        if not (folder / name).exists():
            data = trace_once(part, config, "float32").model.SerializeToString()
            (folder / name).write_bytes(data)


SMALL: Mapping[str, SmallModel] = {
    "sd1": SmallModel("v1-5-pruned", SD1, "StableDiffusion", SCHEDULE),
    "sd2 base": SmallModel("512-base-ema", SD2, "StableDiffusion", SCHEDULE),
    "sd2 768": SmallModel("v2-1_768-ema-pruned", SD2, "StableDiffusion", V_PREDICTION, seed=1),
    "xl": SmallModel("sd_xl_base_1.0", XL, "StableDiffusionXL", LEADING),
    "xl refiner": SmallModel("sd_xl_refiner_1.0", REFINER, "StableDiffusionXLImg2Img", LEADING),
    "inpainting": SmallModel(
        "sd-v1-5-inpainting", original.inpainting(SHALLOW), "StableDiffusionInpaint", SCHEDULE
    ),
    "editing": SmallModel(
        "instruct-pix2pix-00-22000",
        original.editing(SHALLOW),
        "StableDiffusionInstructPix2Pix",
        SCHEDULE,
    ),
    "lcm": SmallModel(
        "dreamshaper-v7", original.consistency(SHALLOW), "StableDiffusion", CONSISTENCY
    ),
    "turbo": SmallModel("sd_turbo", SD2, "StableDiffusion", TRAILING, seed=2),
}
