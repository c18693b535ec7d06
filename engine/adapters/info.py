"""What an adapter is: the family it was made for, its kinds, ranks and targets, and its words."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from engine.adapters.lora import Difference, Hadamard, Kronecker, LowRank
from engine.adapters.modules import ModuleChange
from engine.adapters.names import flat_name

__all__ = ["describe_modules", "family_of", "family_of_model", "words_of"]

SD1, SD2, XL = "Stable Diffusion 1.x", "Stable Diffusion 2.x", "Stable Diffusion XL"
REFINER = "the refiner of Stable Diffusion XL"
FLUX, SD3 = "FLUX", "Stable Diffusion 3"

# The width of the text that a UNet's cross-attention reads.
FAMILIES: Mapping[int, str] = MappingProxyType({768: SD1, 1024: SD2, 2048: XL, 1280: REFINER})
# Parts of names that no UNet has.
FOREIGN: Mapping[str, str] = MappingProxyType(
    {
        "double_blocks": FLUX,
        "single_blocks": FLUX,
        "single_transformer_blocks": FLUX,
        "joint_blocks": SD3,
        "transformer.transformer_blocks": "a diffusion transformer, such as Stable Diffusion 3",
        "lora_transformer_": "a diffusion transformer, such as FLUX",
    }
)
# Beginnings of what training programs write, without regard to case.
STATED: Mapping[str, str] = MappingProxyType(
    {
        "sdxl": XL,
        "stable-diffusion-xl": XL,
        "sd_v1": SD1,
        "sd_1": SD1,
        "stable-diffusion-v1": SD1,
        "sd_v2": SD2,
        "sd_2": SD2,
        "stable-diffusion-v2": SD2,
        "sd3": SD3,
        "stable-diffusion-3": SD3,
        "flux": FLUX,
    }
)
BASE_KEYS = ("ss_base_model_version", "modelspec.architecture")
TRIGGER_KEYS = ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_words")
MOST_TAGS = 50
KINDS = {LowRank: "LoRA", Hadamard: "LoHa", Kronecker: "LoKr", Difference: "difference"}
TARGETS = (  # the first that is in a module's name
    ("attn", "attention"),
    ("ff_net", "feed-forward"),
    ("mlp", "feed-forward"),
    ("proj_in", "projections"),
    ("proj_out", "projections"),
    ("norm", "norms"),
    ("emb", "embeddings"),
    ("", "convolutions"),
)


def family_of(modules: Iterable[ModuleChange], metadata: Mapping[str, str]) -> str | None:
    """Guess the family that an adapter was made for; None when nothing tells.

    Shapes come first, then what its training program wrote.
    """
    widths = dict[str, int]()
    for module in modules:
        for mark, family in FOREIGN.items():
            if mark in module.module:
                return family
        name = flat_name(module.module)
        if module.weight and name.endswith(("attn2_to_k", "attn2_to_v")):
            widths.setdefault("context", module.weight.matrix_shape[1])
        elif module.component == "text_encoder_2":
            widths.setdefault("second", 0)
        elif module.weight and name.endswith("self_attn_q_proj"):
            widths.setdefault("text", module.weight.matrix_shape[1])
    if widths.get("context") in FAMILIES:
        return FAMILIES[widths["context"]]
    for key in BASE_KEYS:
        value = metadata.get(key, "").lower()
        for beginning, family in STATED.items():
            if value.startswith(beginning):
                return family
    if "second" in widths:
        return XL
    return SD2 if widths.get("text") == 1024 else None


def family_of_model(components: Mapping[str, Mapping[str, tuple[int, ...]]]) -> str | None:
    """Name a model's family by the width of its cross-attention."""
    for name, shape in components.get("unet", {}).items():
        if name.endswith("attn2.to_k.weight"):
            return FAMILIES.get(shape[1])
    return None


def describe_modules(modules: Sequence[ModuleChange]) -> dict[str, Any]:
    """Count an adapter's modules by kind, component and target, as values of JSON."""
    kinds, components, targets = Counter[str](), Counter[str](), Counter[str]()
    for module in modules:
        change = module.weight or module.bias
        assert change is not None
        kind = KINDS[type(change)]
        if isinstance(change, LowRank) and change.core is not None:
            kind = "LoCon"
        kinds[f"{kind} with DoRA" if module.magnitude else kind] += 1
        name = flat_name(module.module)
        text = "text_model" in name or (module.component or "").startswith("text_encoder")
        components[module.component or ("text_encoder" if text else "unet")] += 1
        target = next(target for mark, target in TARGETS if mark in name)
        targets[f"text encoder: {target}" if text else target] += 1
    ranks = {rank for module in modules if (rank := module.rank()) is not None}
    alphas = {alpha for module in modules if (alpha := module.alpha()) is not None}
    return {
        "kinds": dict(kinds),
        "ranks": sorted(ranks),
        "alphas": sorted(alphas),
        "scales": sorted({round(module.scale(), 6) for module in modules}),
        "modules": dict(components),
        "targets": dict(targets),
    }


def words_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Read what a training program wrote about the words that call an adapter's subject.

    Returns `trigger_words`, a list, and `training_tags`, the most frequent with their counts.
    """
    triggers = [metadata[key] for key in TRIGGER_KEYS if metadata.get(key, "").strip()]
    tags = Counter[str]()
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
    except (ValueError, RecursionError):
        folders = {}
    for counts in folders.values() if isinstance(folders, dict) else ():
        for tag, count in counts.items() if isinstance(counts, dict) else ():
            if type(count) is int:
                tags[tag.strip()] += count
    return {"trigger_words": triggers, "training_tags": dict(tags.most_common(MOST_TAGS))}
