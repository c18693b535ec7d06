"""Adapters of a model: read a LoRA and its kin, and add it to the weights before they are bound.

    choice = parse_adapter("watercolor.safetensors:0.8")
    adapter = read_adapter(choice.path)
    weights = adapt(bases, shapes, [(adapter, choice)])     # of each component

The bases stay as they are, so taking an adapter off gives back the base's own arrays.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from numpy.typing import NDArray

from engine.adapters.bundled import read_bundled
from engine.adapters.choice import AdapterChoice, as_choice, parse_adapter
from engine.adapters.info import describe_modules, family_of, family_of_model, words_of
from engine.adapters.lora import Change, Factor, with_channels
from engine.adapters.modules import ModuleChange, read_modules
from engine.adapters.names import TRAINING, flat_name, module_index
from engine.adapters.textual_inversion import Embedding
from engine.adapters.updates import Adapted, Update
from engine.checkpoints.component import ComponentName
from engine.checkpoints.formats.files import Weights, open_weights
from engine.checkpoints.formats.tensors import short
from engine.errors import ModelError
from engine.model import Model

__all__ = [
    "Adapted",
    "Adapter",
    "AdapterChoice",
    "Update",
    "adapt",
    "adapt_model",
    "apply_adapters",
    "parse_adapter",
    "read_adapter",
    "read_adapters",
]

Name = TypeVar("Name", bound=str)
Shapes = Mapping[str, tuple[int, ...]]

FILES = (  # in a folder where PEFT or diffusers saved an adapter, in the order of preference
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.bin",
)
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
INPUT = "conv_in"  # of a UNet: models for inpainting take more channels than their kin
MOST_NAMED = 5


class _MisfitError(Exception):
    """What of a change does not fit a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """What an adapter does to a model.

    updates: by component and tensor's name
    notes: what of it the model has no place for, a sentence each
    """

    updates: Mapping[tuple[str, str], Update]
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """An adapter's file, grouped by the modules that it changes; its tensors are read when used.

    weights: its tensors, and as metadata what the training program wrote, unchecked
    embeddings: the textual inversions that came with it
    """

    path: Path
    weights: Weights
    modules: Sequence[ModuleChange]
    embeddings: Sequence[Embedding] = ()

    def resolve(self, components: Mapping[Name, Shapes], *, strict: bool = False) -> Resolution:
        """Find the model's tensor for every change, and check that it fits.

        components: the shapes of the model's tensors by name, for each component
        strict: whether every module must fit, and not only half of them
        Raises ModelError when too few do, and says what the adapter seems to be made for.
        """
        known = {str(component): shapes for component, shapes in components.items()}
        indices = {component: module_index(component, known[component]) for component in known}
        updates: dict[tuple[str, str], Update] = {}
        misfits: dict[str, str] = {}
        for change in self.modules:
            try:
                found = self._updates(change, known, indices)
            except _MisfitError as misfit:
                misfits[change.module] = str(misfit)
                continue
            for key, update in found.items():
                if key in updates:
                    raise ModelError(
                        f"{self.path} changes {key[1]} of the {key[0]} twice, under two names; "
                        "one of them must be removed"
                    )
                updates[key] = update
        fitting = len(self.modules) - len(misfits)
        if misfits and (strict or fitting < len(misfits)):
            raise self._refusal(next(iter(misfits.values())), fitting, known)
        notes = [self._note(list(misfits))] if misfits else []
        if unused := [name for name in self.weights.tensors if TRAINING.fullmatch(name)]:
            notes.append(f"{_named(unused)} in {self.path.name} is a training's and not used")
        return Resolution(updates=MappingProxyType(updates), notes=notes)

    def _updates(
        self,
        change: ModuleChange,
        components: Mapping[str, Shapes],
        indices: Mapping[str, Mapping[str, str]],
    ) -> dict[tuple[str, str], Update]:
        """Find what one module's change does to which tensors."""
        component, module = self._find(change, components, indices)
        updates = {}
        for name, part, factor, norms in (
            (f"{module}.weight", change.weight, change.scale(), change.magnitude),
            (f"{module}.bias", change.bias, 1.0, None),
        ):
            if part is None:
                continue
            shape = components[component].get(name)
            if name == f"{INPUT}.weight" and shape is not None:
                part = with_channels(part, shape)
            self._check(change, part, norms, shape)
            updates[component, name] = Update(
                source=change.source, change=part, scale=factor, magnitude=norms
            )
        return updates

    def describe(self) -> dict[str, Any]:
        """Say what this is, as values of JSON: family, kinds, ranks, alphas, targets, words."""
        return {
            "family": family_of(self.modules, self.weights.metadata),
            **describe_modules(self.modules),
            **words_of(self.weights.metadata),
            "embeddings": {each.name: list(each.vectors) for each in self.embeddings},
        }

    def _find(
        self,
        change: ModuleChange,
        components: Mapping[str, Shapes],
        indices: Mapping[str, Mapping[str, str]],
    ) -> tuple[str, str]:
        """Look a module up; where the file does not name the component, the first that fits."""
        name = flat_name(change.module)
        wanted = [change.component] if change.component else COMPONENTS
        found = [(c, indices[c][name]) for c in wanted if name in indices.get(c, ())]
        if not found:
            where = f" in its {change.component}" if change.component else ""
            raise _MisfitError(
                f"changes {short(change.module)}, which this model does not have{where}"
            )
        for component, module in found:
            shape = components[component].get(f"{module}.weight")
            if change.weight is None or (shape and _fits(change.weight, shape)):
                return component, module
        return found[0]

    def _check(
        self,
        change: ModuleChange,
        part: Change,
        norms: Factor | None,
        shape: tuple[int, ...] | None,
    ) -> None:
        """Refuse a change of another size than the model's tensor."""
        module = short(change.module)
        if shape is None:
            kind = "bias" if part is change.bias else "weight"
            raise _MisfitError(f"changes the {kind} of {module}, which has none here")
        if not _fits(part, shape):
            theirs, ours = part.matrix_shape, " × ".join(map(str, shape))
            raise _MisfitError(
                f"has {theirs[0]} × {theirs[1]} numbers for {module}, and this model {ours}"
            )
        if norms is not None and not _fits_norms(norms.shape, shape):
            raise _MisfitError(
                f"has norms of the shape {list(norms.shape)} for {module}, and this model a "
                f"weight of {list(shape)}"
            )

    def _note(self, misfits: Sequence[str]) -> str:
        return (
            f"{len(misfits)} of the {len(self.modules)} modules of {self.path.name} do not fit the "
            f"model and are not used: {_named(misfits)}"
        )

    def _refusal(self, problem: str, fitting: int, components: Mapping[str, Shapes]) -> ModelError:
        """Say how much fits, what the adapter was made for, and what the model is."""
        made_for = family_of(self.modules, self.weights.metadata)
        model = family_of_model(components)
        seems = f"it seems to be made for {made_for}" if made_for else "its family is not stated"
        is_model = f", and the model is {model}" if model and model != made_for else ""
        return ModelError(
            f"{self.path} {problem}; {fitting} of its {len(self.modules)} modules fit and {seems}"
            f"{is_model}: use an adapter made for this model"
        )


def _named(names: Sequence[str]) -> str:
    """List the first of some names, and count the others."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(short(name) for name in names[:MOST_NAMED]) + more


def read_adapter(path: Path) -> Adapter:
    """Open an adapter, and group its tensors by the modules that they change.

    path: a file (.safetensors, .pt, .bin), or the folder in which PEFT or diffusers saved it
    Raises ModelError when it is no adapter, of a kind that is not known, or incomplete.
    """
    if path.is_dir():
        folder = path
        path = next((folder / name for name in FILES if (folder / name).is_file()), folder)
        if path is folder:
            raise ModelError(
                f"{folder} holds no adapter; give its file, or a folder with "
                f"{' or '.join(FILES[:2])}"
            )
    weights = open_weights(path)
    modules = read_modules(path, weights.tensors, weights.metadata)
    if not modules:
        raise ModelError(f"{path} holds no adapter; a LoRA, LoHa, LoKr or difference is expected")
    embeddings = read_bundled(path, weights)
    return Adapter(path=path, weights=weights, modules=modules, embeddings=embeddings)


def read_adapters(
    loras: Sequence[str | Path | AdapterChoice], *, strict: bool = False
) -> list[tuple[Adapter, AdapterChoice]]:
    """Open the adapters that somebody asks for.

    loras: each a path, a text "FILE:WEIGHT", or an AdapterChoice
    strict: whether every module must fit
    """
    choices = [as_choice(lora) for lora in loras]
    return [
        (read_adapter(choice.path), replace(choice, strict=strict or choice.strict))
        for choice in choices
    ]


def adapt(
    bases: Mapping[Name, Mapping[str, NDArray[Any]]],
    shapes: Mapping[Name, Shapes],
    adapters: Sequence[tuple[Adapter, AdapterChoice]],
) -> dict[Name, Adapted]:
    """Add adapters to the weights of a model's components.

    bases: the weights of each component by name; shapes: the same names' shapes
    Returns a mapping like each base. Raises ModelError when an adapter does not fit.
    """
    resolved = [(adapter.resolve(shapes, strict=c.strict), c) for adapter, c in adapters]
    return _adapted(bases, resolved)


def adapt_model(
    model: Model, loras: Sequence[str | Path | AdapterChoice]
) -> dict[ComponentName, Adapted]:
    """Return the weights of a model's components that adapters may change, with these on.

    loras: each a path, a text "FILE:WEIGHT", or an AdapterChoice
    Raises ModelError when one does not fit.
    """
    adapted, _ = apply_adapters(model, read_adapters(loras))
    return adapted


def apply_adapters(
    model: Model, adapters: Sequence[tuple[Adapter, AdapterChoice]]
) -> tuple[dict[ComponentName, Adapted], list[str]]:
    """Return the weights of a model's components with adapters on, and what is said of these.

    Raises ModelError when one does not fit.
    """
    names = {*model.configs} - {"vae", "preview_decoder"}
    bases = {name: model.component(name) for name in names}
    shapes = {name: base.shapes for name, base in bases.items()}
    resolved = [(adapter.resolve(shapes, strict=c.strict), c) for adapter, c in adapters]
    notes = [note for resolution, _ in resolved for note in resolution.notes]
    return _adapted(bases, resolved), notes


def _adapted(
    bases: Mapping[Name, Mapping[str, NDArray[Any]]],
    resolved: Sequence[tuple[Resolution, AdapterChoice]],
) -> dict[Name, Adapted]:
    """Sum up what adapters add to each tensor of the components."""
    updates: dict[str, dict[str, list[tuple[Update, float]]]] = {
        component: defaultdict(list) for component in bases
    }
    for resolution, choice in resolved:
        for (component, name), update in resolution.updates.items():
            if weight := choice.weight(component):
                updates[component][name].append((update, weight))
    return {
        component: Adapted(base=base, updates=MappingProxyType(dict(updates[component])))
        for component, base in bases.items()
    }


def _fits(change: Change, shape: tuple[int, ...]) -> bool:
    """Tell whether a change has a tensor's size, as a matrix of its first axis and all others."""
    return change.matrix_shape == (math.prod(shape[:1]), math.prod(shape[1:]))


def _fits_norms(norms: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Tell whether DoRA's norms are those of each output, or of each input, of a weight."""
    size = math.prod(norms)
    return norms[:1] == (size,) == shape[:1] or norms[:2] == (1, size) == (1, *shape[1:2])
