"""PEFT's configuration of an adapter: the alphas, which its tensors' names leave out.

It lies beside the file as `adapter_config.json`, or in the file's metadata, where diffusers puts
those of all components as `lora_adapter_metadata` with keys such as `unet.lora_alpha`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.checkpoints.formats.tensors import short
from engine.errors import ModelError

__all__ = ["AdapterConfig", "read_configs"]

BESIDE = "adapter_config.json"
IN_METADATA = "lora_adapter_metadata"
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
KINDS = ("LORA", "LOHA", "LOKR")
# PEFT reads a pattern's keys as regular expressions; the names that trainers write are plain.
PLAIN = re.compile(r"\^?[\w.\-]+\$?", re.ASCII)
MAX_NUMBER = 1e9
MAX_BYTES = 1 << 24  # of a configuration; real ones have some 10 kB


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """Alphas and ranks of an adapter's modules, by the ends of their names.

    rank_stabilised: the scale is alpha / √rank (Kalajdzievski 2023, arXiv:2312.03732)
    """

    alpha: float | None = None
    rank: float | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False

    def alpha_of(self, module: str) -> float | None:
        """Return a module's alpha; None where the configuration does not say."""
        return _match(self.alphas, module, self.alpha)

    def rank_of(self, module: str) -> float | None:
        """Return a module's rank, for those whose tensors do not show it."""
        return _match(self.ranks, module, self.rank)


def read_configs(
    path: Path, metadata: Mapping[str, str], names: Sequence[str]
) -> Mapping[str | None, AdapterConfig]:
    """Read the configurations of an adapter's components; that of all is under None.

    path: the adapter's file
    names: its tensors; only PEFT's own files have a configuration beside them
    Raises ModelError when there is one and it cannot be read.
    """
    if IN_METADATA in metadata:
        values = _parse(path, metadata[IN_METADATA])
    elif any(name.startswith("base_model.model.") for name in names):
        beside = path.with_name(BESIDE)
        if not beside.is_file():
            return {}
        path = beside
        values = _read(beside)
    else:
        return {}
    configs: dict[str | None, AdapterConfig] = {}
    for component in COMPONENTS:
        prefix = f"{component}."
        own = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
        if own:
            configs[component] = _config(path, own)
    return configs or {None: _config(path, values)}


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ModelError(f"{path} is larger than any adapter's configuration; check the file")
        return _parse(path, path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read ({error}); check the file") from error


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ModelError(f"the adapter's configuration in {path} is no JSON object; save it again")
    return values


def _config(path: Path, values: Mapping[str, Any]) -> AdapterConfig:
    """Check what is needed of a configuration."""
    kind = values.get("peft_type", "LORA")
    if not isinstance(kind, str) or kind.upper().rpartition(".")[2] not in KINDS:
        raise ModelError(f"{path} is of PEFT's kind {short(kind)}; known are {', '.join(KINDS)}")
    alpha = values.get("lora_alpha", values.get("alpha"))
    return AdapterConfig(
        alpha=None if alpha is None else _number(path, "alpha", alpha),
        rank=None if values.get("r") is None else _number(path, "r", values["r"]),
        alphas=_numbers(path, "alpha_pattern", values.get("alpha_pattern")),
        ranks=_numbers(path, "rank_pattern", values.get("rank_pattern")),
        rank_stabilised=values.get("use_rslora") is True,
    )


def _numbers(path: Path, name: str, value: Any) -> dict[str, float]:
    if value is not None and not isinstance(value, dict):
        raise ModelError(f"{path} has {short(value)} as {name}; it must be an object of numbers")
    for key in value or {}:
        if not PLAIN.fullmatch(key):
            raise ModelError(
                f"{path} has {short(key)} in {name}; only names of modules are known there"
            )
    return {key: _number(path, name, number) for key, number in (value or {}).items()}


def _number(path: Path, name: str, value: Any) -> float:
    """Check a number; ranks are counts, and a scale divides by them."""
    low = -MAX_NUMBER if "alpha" in name else 1
    if type(value) in (int, float) and low <= value <= MAX_NUMBER:
        return float(value)
    raise ModelError(f"{path} has {short(value)} as {name}; it must be a number from {low:g} on")


def _match(pattern: Mapping[str, float], module: str, default: float | None) -> float | None:
    """Find a module's own value: a key is the name's end from a dot on, or after ^ all of it."""
    for key, value in pattern.items():
        name = key.strip("^$")
        if module == name or (not key.startswith("^") and module.endswith(f".{name}")):
            return value
    return default
