"""The modules that an adapter's file changes, each with the kind of its change."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from engine.adapters.bundled import BUNDLED
from engine.adapters.config import AdapterConfig, read_configs
from engine.adapters.lora import (
    Change,
    Difference,
    Factor,
    Hadamard,
    Kronecker,
    LowRank,
    Transposed,
)
from engine.adapters.names import REFUSED, TRAINING, flat_name, split_name
from engine.checkpoints.formats.tensors import StoredTensor, short
from engine.errors import ModelError

__all__ = ["ModuleChange", "Norms", "read_modules"]

FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Norms:
    """DoRA's magnitudes as PEFT stores them: one for each output, in a vector of odd shape."""

    stored: Factor

    @property
    def shape(self) -> tuple[int, ...]:
        """(out,)."""
        return (math.prod(self.stored.shape),)

    def array(self) -> NDArray[Any]:
        """Read the numbers: (n,), in the dtype of the file."""
        return self.stored.array().reshape(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleChange:
    """What an adapter does to one module of a model.

    source: the module and the file, for messages
    component: "unet", "text_encoder", "text_encoder_2", or None when the file does not say
    module: the name, in the file's own words
    weight, bias: the changes of the module's two tensors
    stored_alpha: the numerator of the scale, where the file holds one; stated_alpha: as a number
    magnitude: DoRA's norms, of each output or each input
    """

    source: str
    component: str | None
    module: str
    weight: Change | None
    bias: Difference | None = None
    stored_alpha: StoredTensor | None = None
    stated_alpha: float | None = None
    magnitude: Factor | None = None
    config: AdapterConfig = field(default_factory=AdapterConfig)

    def alpha(self) -> float | None:
        """Read alpha, from the file's tensor or its configuration.

        None where there is none, or where it is 0: trainers write 0 for "the rank". Raises
        ModelError when it is no finite number.
        """
        if self.stored_alpha is None:
            alpha = self.stated_alpha
            if alpha is None:
                alpha = self.config.alpha_of(self.module)
        else:
            alpha = float(self.stored_alpha.array().reshape(-1)[0])
        if alpha is not None and not math.isfinite(alpha):
            raise ModelError(f"{self.source} has the alpha {alpha}; it must be a finite number")
        return alpha or None

    def rank(self) -> float | None:
        """Return the inner dimension; of a Kronecker product of whole matrices what is stated."""
        if self.weight is None or isinstance(self.weight, Difference):
            return None
        return self.weight.rank or self.config.rank_of(self.module)

    def scale(self) -> float:
        """Return the factor of the weight's change: alpha / rank, or 1 without either."""
        rank, alpha = self.rank(), self.alpha()
        if rank is None or alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.config.rank_stabilised else rank)


def read_modules(
    path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]
) -> tuple[ModuleChange, ...]:
    """Group an adapter's tensors by the modules that they change, without reading the tensors.

    Raises ModelError when one has no known use, or a module's are not complete.
    """
    groups: dict[tuple[str | None, str], dict[str, StoredTensor]] = defaultdict(dict)
    names: dict[tuple[str | None, str], str] = {}
    for name, tensor in tensors.items():
        if name.startswith(BUNDLED) or TRAINING.fullmatch(name):
            continue
        split = split_name(name)
        if split is None:
            raise _unknown(path, name)
        component, module, part = split
        _check_numbers(path, name, part, tensor)
        key = component, flat_name(module)
        if part in groups[key]:
            raise ModelError(f"{path} holds a tensor twice, the second time as {short(name)}")
        groups[key][part] = tensor
        names.setdefault(key, module)
    configs = read_configs(path, metadata, list(tensors))
    alphas = _stated_alphas(path, metadata)
    return tuple(
        replace(
            _module_change(path, key[0], names[key], parts, configs), stated_alpha=alphas.get(key)
        )
        for key, parts in groups.items()
    )


def _stated_alphas(
    path: Path, metadata: Mapping[str, str]
) -> Mapping[tuple[str | None, str], float]:
    """Read alphas that a pickled file holds as plain numbers and not as tensors."""
    alphas = {}
    for name, text in metadata.items():
        split = split_name(name)
        if split is None or split[2] != "alpha":
            continue
        try:
            alphas[split[0], flat_name(split[1])] = float(text)
        except ValueError:
            raise ModelError(
                f"{path} holds {short(text)} as {short(name)}; an alpha is one number"
            ) from None
    return alphas


def _check_numbers(path: Path, name: str, part: str, tensor: StoredTensor) -> None:
    """Refuse integers and other codes, which would need more than arithmetic, and odd alphas."""
    if part == "alpha" and math.prod(tensor.shape) != 1:
        raise ModelError(
            f"{path} holds {short(name)} of the shape {list(tensor.shape)}; an alpha is one number"
        )
    if part != "alpha" and not tensor.is_float:
        raise ModelError(
            f"{path} holds {short(name)} as {tensor.dtype}; an adapter's tensors are "
            "floating-point numbers"
        )


def _module_change(
    path: Path,
    component: str | None,
    module: str,
    parts: Mapping[str, StoredTensor],
    configs: Mapping[str | None, AdapterConfig],
) -> ModuleChange:
    """Make a module's change of its tensors; every one of them must have a use."""
    source = f"{short(module)} in {path}"
    left = dict(parts)
    alpha = left.pop("alpha", None)
    norms = left.pop("norms", None)
    magnitude: Factor | None = left.pop("dora_scale", None)
    magnitude = Norms(stored=norms) if norms else magnitude
    try:
        weight = _weight_change(left)
        bias = next((Difference(diff=left.pop(p)) for p in ("diff_b", "b_norm") if p in left), None)
    except KeyError as error:
        raise ModelError(
            f"{source} is incomplete: it has {', '.join(sorted(parts))} and no {error.args[0]}; "
            "download the file again"
        ) from None
    except ValueError as error:
        raise ModelError(f"{source} cannot be used: {error}") from None
    if left or not (weight or bias) or (magnitude and not weight):
        raise ModelError(
            f"{source} is made of {', '.join(sorted(parts))}, which is no adapter that is known; "
            "known are LoRA, LoCon, LoHa, LoKr, DoRA and differences"
        )
    return ModuleChange(
        source=source,
        component=component,
        module=module,
        weight=weight,
        bias=bias,
        stored_alpha=alpha,
        magnitude=magnitude,
        config=configs.get(component) or configs.get(None) or AdapterConfig(),
    )


def _weight_change(left: dict[str, StoredTensor]) -> Change | None:
    """Take the tensors of one kind out of a module's; KeyError names one that is missing."""
    if left.keys() & {"up", "down", "mid"}:
        return LowRank(up=left.pop("up"), down=left.pop("down"), core=left.pop("mid", None))
    if any(part.startswith("hada_") for part in left):
        return Hadamard(first=_side(left, "hada_", "1"), second=_side(left, "hada_", "2"))
    if any(part.startswith("lokr_") for part in left):
        whole = {n: left.pop(f"lokr_w{n}", None) for n in "12"}
        first, second = (
            Difference(diff=diff) if diff else _side(left, "lokr_", n) for n, diff in whole.items()
        )
        return Kronecker(first=first, second=second)
    for part in ("diff", "w_norm"):
        if part in left:
            return Difference(diff=left.pop(part))
    return None


def _side(left: dict[str, StoredTensor], kind: str, number: str) -> LowRank:
    """Take one of the two low-rank matrices that LoHa and LoKr multiply."""
    up, down = left.pop(f"{kind}w{number}_a"), left.pop(f"{kind}w{number}_b")
    core = left.pop(f"{kind}t{number}", None)
    return LowRank(up=Transposed(stored=up) if core else up, down=down, core=core)


def _unknown(path: Path, name: str) -> ModelError:
    """Say which kind of file this is instead, as far as a tensor's name tells."""
    for mark, kind in REFUSED.items():
        if mark in name:
            return ModelError(
                f"{path} is an adapter of the kind {kind} (it holds {short(name)}), which is not "
                "known here; known are LoRA, LoCon, LoHa, LoKr, DoRA and differences"
            )
    if name == "emb_params" or name.startswith(("string_to_param.", "<", "clip_l", "clip_g")):
        return ModelError(
            f"{path} is a textual inversion (it holds {short(name)}); give it as an embedding"
        )
    return ModelError(
        f"{path} is no adapter that is known: it holds {short(name)}; known are LoRA, LoCon, "
        "LoHa, LoKr, DoRA and differences in the naming of kohya, diffusers and PEFT"
    )
