"""An IP-Adapter's file: the authors' names, `image_proj` and `ip_adapter`, or diffusers'.

What is read off the names and shapes is the whole architecture; the UNet tells whether it fits.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.checkpoints.architecture import Stored
from engine.checkpoints.component import Component, Source, assemble, refuse_left_over, shown
from engine.checkpoints.formats.files import open_weights
from engine.configs.ip_adapter import FULL, HEAD, LINEAR, RESAMPLER, IPAdapterConfig
from engine.configs.unet import UNetConfig
from engine.errors import ModelError

__all__ = ["check_unet", "is_ip_adapter", "open_ip_adapter"]

ADVICE = "give the file of an IP-Adapter, such as ip-adapter_sd15.safetensors"
OWN, LAYERS = "image_proj.", r"ip_adapter\.(\d+)\.to_k_ip\.weight"  # as the authors name them
DIFFUSERS = "encoder_hid_proj.image_projection_layers."
DIFFUSERS_LAYERS = r"(.+)\.attn2\.processor\.to_k_ip\.0\.weight"
UNET = r"(conv_in|conv_out|conv_norm_out|time_embedding|add_embedding|down_blocks|up_blocks"
UNET += r"|mid_block)\..+(?<!_ip\.0\.weight)"  # what a UNet saved by diffusers holds beside
# pattern of a tensor's name below `image_proj`: what diffusers calls it
RENAMED: Mapping[str, str] = MappingProxyType(
    {
        r"^proj\.(?=[wb])": "image_embeds.",
        r"^proj\.0\.": "ff.net.0.proj.",
        r"^proj\.2\.": "ff.net.2.",
        r"^proj\.3\.": "norm.",
        r"^layers\.(\d+)\.0\.norm1\.": r"layers.\1.ln0.",
        r"^layers\.(\d+)\.0\.norm2\.": r"layers.\1.ln1.",
        r"^layers\.(\d+)\.0\.to_out\.": r"layers.\1.attn.to_out.0.",
        r"^layers\.(\d+)\.0\.to_": r"layers.\1.attn.to_",
        r"^layers\.(\d+)\.1\.0\.": r"layers.\1.ff.0.",
        r"^layers\.(\d+)\.1\.1\.": r"layers.\1.ff.1.net.0.proj.",
        r"^layers\.(\d+)\.1\.3\.": r"layers.\1.ff.1.net.2.",
    }
)
FACE = "an IP-Adapter FaceID, which wants a face's features of insightface"
INSTANT_ID = "InstantID's IP-Adapter, which wants a face's features of insightface"
FACE_WIDTH = 512  # of those features; no image encoder of CLIP has tokens of this width
# pattern found in a name: what the file is, of those that have an IP-Adapter's names and more
KINDS: Mapping[str, str] = MappingProxyType(
    {
        r"^image_proj\.perceiver_resampler\.|\.to_[kqv]_lora\.|\.to_out_lora\.": FACE,
        rf"^{re.escape(DIFFUSERS)}0\.proj\.net\.": FACE,
        rf"^{re.escape(DIFFUSERS)}1\.": "a UNet with several IP-Adapters",
    }
)
# and of others that are given in an IP-Adapter's place
OTHERS: Mapping[str, str] = MappingProxyType(
    {
        r"^(control_model\.|controlnet_|input_hint_block\.)": "a ControlNet",
        r"^(adapter\.)?body\.\d+\.": "a T2I-Adapter",
        r"lora_(unet|te\d?)_|\.lora_(up|down|[AB])\b": "a LoRA",
        r"^(vision_model|visual_projection)\.": "an image encoder",
        r"^(model\.diffusion_model|unet|up_blocks|output_blocks|double_blocks)\.": "a model or a "
        "UNet",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Names:
    """How a file names its tensors.

    projection: what stands before those of the projection; renamed: whether these are diffusers'
    layers: what stands before `to_k_ip` and `to_v_ip`, layer by layer; ending: what stands behind
    """

    projection: str
    renamed: bool
    layers: tuple[str, ...]
    ending: str

    def stored(self, name: str) -> str:
        """Return what the file calls one of the authors' names."""
        if not name.startswith(OWN):
            _, number, projection, _ = name.split(".")
            return f"{self.layers[int(number) // 2]}{projection}{self.ending}"
        own = name.removeprefix(OWN)
        for pattern, theirs in RENAMED.items() if self.renamed else ():
            if re.search(pattern, own):
                own = re.sub(pattern, theirs, own)
                break
        return self.projection + own


def is_ip_adapter(names: Iterable[str]) -> bool:
    """Tell whether tensors of these names are an IP-Adapter's."""
    return _names(list(names)) is not None


def open_ip_adapter(path: Path) -> tuple[IPAdapterConfig, Component]:
    """Open an IP-Adapter; no weights are read.

    Raises ModelError when it is none, or holds a tensor without a place.
    """
    weights = open_weights(path)
    names = _names(list(weights))
    for pattern, what in (KINDS if names else {**KINDS, **OTHERS}).items():
        if any(re.search(pattern, name[:200]) for name in weights):
            raise ModelError(f"{path} is {what}, which cannot be used as one; {ADVICE}")
    if names is None:
        listed = ", ".join(shown(name, 60) for name in list(weights)[:3]) or "nothing"
        raise ModelError(f"{path} holds no IP-Adapter but {listed}; {ADVICE}")
    stored = Stored.of(path, "", {n: tensor.shape for n, tensor in weights.tensors.items()})
    config = _config(path, stored, names)
    component = assemble(path, weights, config, _sources(config, stored, names))
    refuse_left_over(path, weights, component.used(), UNET if names.ending != ".weight" else None)
    return config, component


def check_unet(path: Path, config: IPAdapterConfig, unet: UNetConfig) -> None:
    """Raise ModelError, with what differs, when an IP-Adapter is not for this UNet."""
    widths = tuple(layer.width for layer in unet.cross_attentions())
    facts = (
        ("makes tokens of the width", config.cross_attention_dim, unet.cross_attention_dim),
        ("has keys for layers in number", len(config.layer_widths), len(widths)),
        ("has keys of the widths", config.layer_widths, widths),
    )
    for what, theirs, ours in facts:
        if theirs != ours:
            raise ModelError(
                f"{path} is an IP-Adapter of another family: it {what} {theirs!s:.200}, and this "
                f"model's UNet takes {ours!s:.200}; give one that was trained for the model's "
                "family"
            )


def _names(names: list[str]) -> _Names | None:
    """Find out how tensors are named; None where they are no IP-Adapter's."""
    held = set(names)
    numbers = sorted(int(m[1]) for n in names if (m := re.fullmatch(LAYERS, n)) and len(m[1]) < 6)
    layers, ending = tuple(f"ip_adapter.{number}." for number in numbers), ".weight"
    projection = OWN
    if not layers:
        found = [m[1] for name in names if (m := re.fullmatch(DIFFUSERS_LAYERS, name))]
        layers = tuple(f"{name}.attn2.processor." for name in sorted(found, key=_place))
        projection, ending = f"{DIFFUSERS}0.", ".0.weight"
    if not layers or not any(name.startswith(projection) for name in names):
        return None
    marks = ("image_embeds.weight", "ff.net.0.proj.weight", "layers.0.ln0.weight")
    renamed = any(f"{projection}{mark}" in held for mark in marks)
    return _Names(projection=projection, renamed=renamed, layers=layers, ending=ending)


def _place(name: str) -> tuple[int, list[int]]:
    """Sort layers as diffusers goes through them: the way down, the way up, the middle."""
    ways = ("down_blocks", "up_blocks", "mid_block")
    way = next((i for i, way in enumerate(ways) if name.startswith(way)), len(ways))
    return way, [int(number) for number in re.findall(r"\d{1,6}", name)]


def _config(path: Path, stored: Stored, names: _Names) -> IPAdapterConfig:
    """Read off an architecture; raises ModelError naming a tensor that is missing."""

    def size(name: str, axis: int = 0) -> int:
        return stored.size(names.stored(f"{OWN}{name}"), axis)

    def has(name: str) -> bool:
        return names.stored(f"{OWN}{name}") in stored.shapes

    keys = [f"{layer}to_k_ip{names.ending}" for layer in names.layers]
    fields: dict[str, Any] = {
        "layer_widths": tuple(stored.size(key) for key in keys),
        "cross_attention_dim": stored.size(keys[0], 1),
    }
    if has("proj.weight"):
        width = max(size("norm.weight"), 1)
        fields |= {"kind": LINEAR, "embed_dim": size("proj.weight", 1)}
        fields["tokens"] = size("proj.weight") // width
    elif has("latents") and size("proj_in.weight", 1) == FACE_WIDTH:
        raise ModelError(f"{path} is {INSTANT_ID}, which cannot be used as one; {ADVICE}")
    elif has("latents"):
        depth = stored.count(f"{names.projection}layers.{{}}")
        fields |= {"kind": RESAMPLER, "embed_dim": size("proj_in.weight", 1)}
        fields |= {"tokens": size("latents", 1), "resampler_dim": size("latents", 2)}
        fields["resampler_depth"] = depth
        if depth:
            fields["resampler_heads"] = size("layers.0.0.to_q.weight") // HEAD
            fields["resampler_ff"] = size("layers.0.1.1.weight")
    elif names.renamed and has("proj.0.weight") and size("proj.2.weight") > size("proj.3.weight"):
        raise ModelError(f"{path} is {FACE}, which cannot be used as one; {ADVICE}")
    elif has("proj.3.weight") and has("proj.0.weight"):
        fields |= {"kind": FULL, "embed_dim": size("proj.0.weight", 1)}
    else:
        what = FACE if has("proj.0.weight") else "an IP-Adapter of a kind that is not known here"
        raise ModelError(f"{path} is {what}, which cannot be used as one; {ADVICE}")
    return IPAdapterConfig(**fields)


def _sources(config: IPAdapterConfig, stored: Stored, names: _Names) -> dict[str, Source]:
    """Say where each tensor is; the authors keep keys and values of a resampler in one."""
    sources = {}
    for name in config.tensor_shapes():
        source = Source(name=names.stored(name))
        if source.name not in stored.shapes and (fused := re.sub(r"\.to_[kv]\.", ".to_kv.", name)):
            both = names.stored(fused)
            if fused != name and both in stored.shapes:
                source = replace(source, name=both, half=int(".to_v." in name))
        sources[name] = source
    return sources
