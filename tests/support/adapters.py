"""Small models, and adapters for them as the training programs name their tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from engine.adapters.adapter import Adapted, AdapterChoice, adapt, read_adapter
from tests.support.parity import text_checkpoint
from tests.support.tolerances import ADAPTER_RTOL

DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SD15: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": (DOWN, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", UP),
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
}
XL = SD15 | {
    "down_block_types": ("DownBlock2D", DOWN),
    "up_block_types": (UP, "UpBlock2D"),
    "use_linear_projection": True,
    "transformer_layers_per_block": [1, 2],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 48,
}
RANK, ALPHA = 4, 3.0
Weights = dict[str, NDArray[Any]]


def make_unet(config: Mapping[str, Any] = SD15) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**config).eval()


def make_text_encoder(kind: type[Any] = CLIPTextModel, width: int = 12) -> Any:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=20,
        eos_token_id=19,
    )
    return kind(config).eval()


def arrays(state: Mapping[str, Tensor]) -> Weights:
    """Copy a state dict, under the names it has without an adapter."""
    return {
        name.replace(".base_layer.", "."): value.detach().numpy().copy()
        for name, value in state.items()
        if "lora_" not in name
    }


def shapes_of(bases: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, tuple[int, ...]]]:
    return {c: {name: a.shape for name, a in base.items()} for c, base in bases.items()}


def adapted(bases: Mapping[str, Weights], *files: Path | tuple[Path, float]) -> dict[str, Adapted]:
    chosen = [file if isinstance(file, tuple) else (file, 1.0) for file in files]
    choices = [AdapterChoice(path=p, unet=w, text_encoder=w) for p, w in chosen]
    return adapt(bases, shapes_of(bases), [(read_adapter(c.path), c) for c in choices])


def agrees(
    actual: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]], base: Weights
) -> int:
    """Compare the changes of the base, name by name; return how many names are changed."""
    assert list(actual) == list(base)
    changed = 0
    for name, value in base.items():
        if np.array_equal(expected[name], value):
            assert np.array_equal(actual[name], value), name
            continue
        changed += 1
        assert actual[name].dtype == np.float32
        difference = np.linalg.norm(actual[name] - expected[name])
        assert difference <= ADAPTER_RTOL * np.linalg.norm(expected[name]), name
        assert np.linalg.norm(expected[name] - value) > 0.01 * np.linalg.norm(value), name
    return changed


def random_factors(shape: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    """Make the factors of a linear layer or a convolution, as all dialects store them."""
    generator = torch.Generator().manual_seed(seed)
    kernel = (1,) * (len(shape) - 2)
    return {
        "up": torch.randn((shape[0], RANK, *kernel), generator=generator) / 2,
        "down": torch.randn((RANK, *shape[1:]), generator=generator) / 2,
    }


def modules_of(shapes: Mapping[str, tuple[int, ...]], *ends: str) -> dict[str, tuple[int, ...]]:
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(tuple(f"{end}.weight" for end in ends)) and len(shape) > 1
    }


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
EVERYTHING = (*ATTENTION, "proj", "net.2", "proj_in", "proj_out", "conv1", "conv2", "conv")
EVERYTHING += ("time_emb_proj", "conv_shortcut", "linear_1", "linear_2", "conv_in", "conv_out")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def kohya_names(prefix: str, module: str) -> dict[str, str]:
    flat = prefix + module.replace(".", "_")
    names = {part: f"{flat}.lora_{part}.weight" for part in ("up", "down")}
    return names | {"alpha": f"{flat}.alpha"}


def write_kohya(
    path: Path, modules: Mapping[str, tuple[int, ...]], seed: int = 0, **options: Any
) -> dict[str, Tensor]:
    """Write factors for modules named `lora_unet_…` and the like; their dots are flattened."""
    state = {}
    for i, (module, shape) in enumerate(modules.items()):
        name = module.replace(".", "_")
        factors = random_factors(shape, 1000 * seed + i)
        state |= {f"{name}.lora_{part}.weight": factor for part, factor in factors.items()}
        state[f"{name}.alpha"] = torch.tensor(ALPHA)
    save_file(state, path, **options)
    return state


class Model:
    """A small model, with its weights as they were before any adapter."""

    def __init__(self, family: str = "sd15") -> None:
        self.unet = make_unet(XL if family == "xl" else SD15)
        self.encoders = [make_text_encoder()]
        if family == "xl":
            self.encoders.append(make_text_encoder(CLIPTextModelWithProjection, 16))
        self.bases = self.weights()
        self.shapes = shapes_of(self.bases)

    def weights(self) -> dict[str, Weights]:
        names = ("text_encoder", "text_encoder_2")
        encoders = zip(names, self.encoders, strict=False)
        return {"unet": arrays(self.unet.state_dict())} | {
            name: arrays(text_checkpoint(encoder)) for name, encoder in encoders
        }

    def agrees(self, weights: Mapping[str, Mapping[str, NDArray[Any]]]) -> dict[str, int]:
        """Compare with what the reference has made of the model; count what it has changed."""
        fused = self.weights()
        return {c: agrees(weights[c], fused[c], base) for c, base in self.bases.items()}


TO_K = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def factors(name: str, up: tuple[int, ...], down: tuple[int, ...]) -> dict[str, Tensor]:
    return {f"{name}.lora_up.weight": torch.ones(up), f"{name}.lora_down.weight": torch.ones(down)}


# A LoRA of one convolution.
GOOD = factors("lora_unet_conv_in", (8, 2, 1, 1), (2, 4, 3, 3))


def write_attention(model: Model, path: Path, seed: int = 0, **options: Any) -> Path:
    modules = modules_of(model.shapes["unet"], *ATTENTION)
    text = modules_of(model.shapes["text_encoder"], *TEXT)
    named = {f"lora_unet_{m}": s for m, s in modules.items()}
    write_kohya(path, named | {f"lora_te_{m}": s for m, s in text.items()}, seed, **options)
    return path
