"""What a file is, told without torch and without running anything in it."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.adapters.adapter import FILES as ADAPTER_FILES
from engine.adapters.adapter import read_adapter
from engine.adapters.textual_inversion import FILES as EMBEDDING_FILES
from engine.adapters.textual_inversion import read_embedding
from engine.checkpoints.control_net import is_control_net
from engine.checkpoints.families import FAMILIES
from engine.checkpoints.families.sd import SD1_FAMILY
from engine.checkpoints.few_steps import find_variant_of_adapter
from engine.checkpoints.formats.files import Weights, open_weights
from engine.checkpoints.image_encoder import is_image_encoder, open_image_encoder
from engine.checkpoints.ip_adapter import is_ip_adapter, open_ip_adapter
from engine.checkpoints.parts import VAE
from engine.checkpoints.pieces import is_piece, open_piece
from engine.checkpoints.single_file import open_vae
from engine.checkpoints.t2i_adapter import is_t2i_adapter
from engine.checkpoints.tiny_autoencoder import find_halves, has_tiny_decoder
from engine.checkpoints.upscaler import is_upscaler, open_upscaler
from engine.model import Model, find_model
from engine.shipped import find_control
from export.control_info import describe_control_net, describe_t2i_adapter

ADAPTER_MARKS = ("lora", "hada_", "lokr_", ".diff", "w_norm", "b_norm", "dora_scale")
# Formats of numbers by their names in files; GGML's (Q8_0 and so on) keep theirs.
DTYPES = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I8": "int8",
}


def describe(file: str | Path) -> dict[str, Any]:
    """Say what a checkpoint, a part of one, an adapter or a textual inversion is.

    file: its path, a folder, or the name of a model or a control that ships
    Returns values of JSON, `kind` first. Raises ModelError when it is nothing that is known here.
    """
    control = find_control(Path(file))
    path = control if control.exists() else find_model(file)
    if (path / "model_index.json").is_file():
        return _model(Model.open(path), "a folder in diffusers' layout")
    if any((path / name).is_file() for name in EMBEDDING_FILES):
        return _embedding(path, open_weights(next(path.glob("learned_embeds.*"))))
    if path.is_dir() and any((path / name).is_file() for name in ADAPTER_FILES):
        return _adapter(path, read_adapter(path).weights)
    weights = open_weights(path)
    if path.is_dir() and is_image_encoder(path):
        return _image_encoder(path, weights)
    kind = _KINDS[_kind(weights)]
    facts: dict[str, Any] = kind(path, weights)
    return facts


def _kind(weights: Weights) -> str:
    """Tell what a file seems to be by the names of its tensors."""
    names = list(weights)
    if is_ip_adapter(names):
        return "IP-Adapter"
    if is_control_net(weights):  # beside which there may be the model of its training
        return "ControlNet"
    if is_t2i_adapter(weights):
        return "T2I-Adapter"
    if any(name.startswith("model.diffusion_model.") for name in names):
        return "checkpoint"
    if any(f"{prefix}encoder.conv_in.weight" in weights for prefix in (*VAE, "")):
        return "autoencoder"
    if has_tiny_decoder(weights):
        return "tiny autoencoder"
    if is_piece(weights):
        return "piece"
    if is_upscaler(names):
        return "upscaler"
    # An embedding is a few tensors of one or two axes whose names no module has.
    if len(names) <= 4 and all(not n.endswith((".weight", ".bias", ".alpha")) for n in names):
        return "embedding"
    if any(mark in name for name in names for mark in ADAPTER_MARKS):
        return "adapter"
    return "checkpoint"


def _checkpoint(path: Path, weights: Weights) -> dict[str, Any]:
    file = Model.read(path)
    facts = {
        "kind": "model",
        "file": str(path),
        "layout": "one file in the original layout",
        "family": file.family.title,
        "variant": file.variant.name if file.variant else None,
        "inpainting": file.is_inpainting,
        "editing": file.is_editing,
        "prediction_type": file.scheduler["prediction_type"],
        "picture": [file.sample_size * 8] * 2,
    }
    components = {str(name): file.component(name).shapes for name in file.configs}
    return facts | _numbers(weights, components) | {"notes": list(file.notes)}


def _model(model: Model, layout: str) -> dict[str, Any]:
    parts = {str(name): model.find(name) for name in model.configs}
    side = model.sample_size * model.vae.compression
    facts = {
        "kind": "model",
        "file": str(model.path),
        "layout": layout,
        "family": _family(model),
        "variant": None,
        "inpainting": model.is_inpainting,
        "editing": model.is_editing,
        "prediction_type": model.scheduler.get("prediction_type", "epsilon"),
        "picture": [side, side],
        **_formats([part.weights for part in parts.values()]),
        "parameters": {name: _count(part.shapes) for name, part in parts.items()},
        "hash": {name: part.weights.content_hash() for name, part in parts.items()},
    }
    return facts | {"notes": list(model.notes)}


def _family(model: Model) -> str:
    """Name a folder's family, unless its UNet attends to another width than published ones."""
    width = model.unet.cross_attention_dim
    published = model.family.published.get("unet", ())
    known = {unet.symbols()["D"] for unet in published}
    title = f"another latent-diffusion model (context of {width})"
    return model.family.title if width in known else title


def _piece(path: Path, weights: Weights) -> dict[str, Any]:
    """Describe a UNet or a text encoder alone, which `--unet` and its kin take."""
    name, config, component = open_piece(path)
    facts = {
        "kind": name.replace("_", " "),
        "file": str(path),
        "use": f"give it as --{name.replace('_', '-')}",
        "architecture": {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(config).items()
        },
    }
    return facts | _numbers(weights, {name: component.shapes})


def _autoencoder(path: Path, weights: Weights) -> dict[str, Any]:
    config, component = open_vae(path)
    facts = {
        "kind": "autoencoder",
        "file": str(path),
        "latent_channels": config.latent_channels,
        "compression": config.compression,
    }
    return facts | _numbers(weights, {"vae": component.shapes})


def _tiny_autoencoder(path: Path, weights: Weights) -> dict[str, Any]:
    """Describe TAESD and its kin, of which a file may hold one half."""
    halves = find_halves(path)
    facts: dict[str, Any] = {
        "kind": "tiny autoencoder",
        "file": str(path),
        "halves": list(halves),
    }
    if "decoder" not in halves:
        advice = "put it beside the file of its decoder, which --vae takes"
        return facts | {"use": advice} | _numbers(weights, halves)
    config, _ = open_vae(path)
    facts |= {
        "use": "give it as --vae, or as --preview-decoder",
        "latent_channels": config.latent_channels,
        "compression": config.compression,
    }
    return facts | _numbers(weights, halves)


def _upscaler(path: Path, weights: Weights) -> dict[str, Any]:
    file = open_upscaler(path)
    facts = {
        "kind": "upscaler",
        "file": str(path),
        "network": file.kind,
        "scale": file.config.scale,
        "use": "give it as --upscale, or to `latentrt upscale`",
        "architecture": {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(file.config).items()
        },
    }
    used = {"upscaler": file.weights.shapes}
    return facts | _numbers(weights, used) | {"notes": list(file.notes)}


def _ip_adapter(path: Path, weights: Weights) -> dict[str, Any]:
    config, component = open_ip_adapter(path)
    families = [
        family.title
        for family in FAMILIES.values()
        if any(
            config.cross_attention_dim == unet.symbols()["D"]
            and config.layer_widths == tuple(layer.width for layer in unet.cross_attentions())
            for unet in family.published.get("unet", ())
        )
    ]
    what = "tokens" if config.sees_tokens else "embedding"
    facts = {
        "kind": "IP-Adapter",
        "file": str(path),
        "family": families[0] if families else f"another (context of {config.cross_attention_dim})",
        "projection": config.kind,
        "image_encoder": f"one whose {what} has the width {config.embed_dim}",
        "tokens": config.tokens or "as many as the image encoder's",
        "use": "give it as --ip-adapter, with --image-prompt and --image-encoder",
    }
    return facts | _numbers(weights, {"ip_adapter": component.shapes})


def _image_encoder(path: Path, weights: Weights) -> dict[str, Any]:
    config, component = open_image_encoder(path)
    facts = {
        "kind": "image encoder",
        "file": str(path),
        "picture": [config.image_size] * 2,
        "widths": {"tokens": config.hidden_size, "embedding": config.projection_dim},
        "use": "give it as --image-encoder, with --ip-adapter",
    }
    return facts | _numbers(weights, {"image_encoder": component.shapes})


def _control_net(path: Path, weights: Weights) -> dict[str, Any]:
    facts, shapes, notes = describe_control_net(path, weights)
    return facts | _numbers(weights, {"control": shapes}) | {"notes": notes}


def _t2i_adapter(path: Path, weights: Weights) -> dict[str, Any]:
    facts, shapes = describe_t2i_adapter(path)
    return facts | _numbers(weights, {"t2i_adapter": shapes}) | {"notes": []}


def _adapter(path: Path, weights: Weights) -> dict[str, Any]:
    facts = {"kind": "adapter", "file": str(path), **read_adapter(path).describe()}
    variant = find_variant_of_adapter(path, SD1_FAMILY.variants)
    facts["few_steps"] = variant and {
        "name": variant.name,
        "steps": variant.steps[1],
        "guidance_scale": variant.guidance_scale,
    }
    return facts | _numbers(weights, {})


def _embedding(path: Path, weights: Weights) -> dict[str, Any]:
    embedding = read_embedding(path)
    facts = {
        "kind": "textual inversion",
        "file": str(path),
        "word": embedding.name,
        "words": list(embedding.rows),
        "vectors": {name: list(array.shape) for name, array in embedding.vectors.items()},
        "unused": list(embedding.unused),
    }
    return facts | _numbers(weights, {})


_KINDS = {
    "checkpoint": _checkpoint,
    "autoencoder": _autoencoder,
    "tiny autoencoder": _tiny_autoencoder,
    "ControlNet": _control_net,
    "T2I-Adapter": _t2i_adapter,
    "adapter": _adapter,
    "embedding": _embedding,
    "piece": _piece,
    "IP-Adapter": _ip_adapter,
    "upscaler": _upscaler,
}


def _numbers(
    weights: Weights, components: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> dict[str, Any]:
    stored = {name: tensor.shape for name, tensor in weights.tensors.items()}
    counted = {name: _count(shapes) for name, shapes in components.items()}
    return {
        **_formats([weights]),
        "parameters": counted or {"in all": _count(stored)},
        "hash": weights.content_hash(),
    }


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _formats(files: Iterable[Weights]) -> dict[str, Any]:
    """Name the number formats of weights, that of the most numbers first; count their tensors.

    Whole numbers are left out, unless a scale makes weights of them.
    """
    numbers, tensors = Counter[str](), Counter[str]()
    for weights in files:
        for tensor in weights.tensors.values():
            if tensor.is_float:
                name = DTYPES.get(tensor.dtype, tensor.dtype)
                numbers[name] += math.prod(tensor.shape)
                tensors[f"{name} with scales" if tensor.scale else name] += 1
    precision = ", ".join(name for name, _ in numbers.most_common()) or "none"
    return {"precision": precision, "tensors": dict(tensors.most_common())}


def as_table(facts: Mapping[str, Any]) -> str:
    """Lay facts out as lines of a name and a value."""
    rows = [
        (name.replace("_", " "), line)
        for name, value in facts.items()
        for line in ([_one(value)] if name == "picture" else _lines(value))
    ]
    width = max(len(name) for name, _ in rows)
    lines, last = [], ""
    for name, line in rows:
        lines.append(f"{'' if name == last else name:{width}}  {line}")
        last = name
    return "\n".join(lines)


def _lines(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{name}: {_one(entry)}" for name, entry in value.items()]
    if isinstance(value, list):
        texts = all(isinstance(entry, str) for entry in value)
        return [str(v) for v in value] if texts else [", ".join(map(str, value))]
    return [] if value is None else [_one(value)]


def _one(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and value >= 1_000_000:
        return f"{value:,} ({value / 1e6:.1f} million)"
    return " × ".join(map(str, value)) if isinstance(value, list) else str(value)
