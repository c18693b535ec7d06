"""Names of tensors without what programs put before them: where a state dict lay, what wrapped it.

`torch.compile`, `DataParallel` and their kin put a word into every name below them, training loops
keep the model under a name of their own beside the optimiser. Neither says anything of the model.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from engine.checkpoints.formats.tensors import StoredTensor

__all__ = ["unwrap"]

# Between dots, wherever in a name: modules that only pass on what they hold.
MODULES = frozenset(
    {
        "_orig_mod",
        "module",
        "_module",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
    }
)
# Before all names: dictionaries in which a state dict lay.
DICTIONARIES = frozenset(
    {
        "state_dict",
        "model_state_dict",
        "model_state",
        "model_weights",
        "lora_state_dict",
        "network",
        "net",
        "params",
        "weights",
        "pytorch-lightning",
    }
)
# What a whole model has in the original layout, by which the place of its names is told.
WHOLE = (
    "model.diffusion_model.input_blocks.0.0.weight",
    "model.diffusion_model.time_embed.0.weight",
    "model.diffusion_model.out.2.weight",
)


def unwrap(
    tensors: Mapping[str, StoredTensor],
) -> tuple[Mapping[str, StoredTensor], tuple[str, ...]]:
    """Return tensors by their names as a model has them, and what is said of those left out.

    Of several models in one file, the first counts, and what stands outside it is left out.
    """
    plain = _without_modules(tensors)
    prefix = _prefix_of_a_model(plain) or _shared_dictionaries(plain)
    if not prefix:
        return (tensors if plain.keys() == tensors.keys() else MappingProxyType(plain)), ()
    inside = {n.removeprefix(prefix): t for n, t in plain.items() if n.startswith(prefix)}
    outside = dict.fromkeys(name.split(".")[0] for name in plain if not name.startswith(prefix))
    notes = [f"the tensors that are used stand under {prefix.rstrip('.')}"] if outside else []
    if outside:
        notes.append(f"those under {', '.join(map(repr, list(outside)[:5]))} are not used")
    return MappingProxyType(inside), tuple(notes)


def _without_modules(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Leave modules that pass on out of names; names stay where two would become one."""
    names = {
        name: ".".join(part for part in name.split(".") if part not in MODULES) for name in tensors
    }
    if len(set(names.values())) < len(names):
        return dict(tensors)
    return {names[name] or name: tensor for name, tensor in tensors.items()}


def _prefix_of_a_model(names: Iterable[str]) -> str:
    """Return what stands before the names of the first whole model, "" where nothing does."""
    for name in names:
        for known in WHOLE:
            if name == known:
                return ""
            if name.endswith(f".{known}"):
                return name.removesuffix(known)
    return ""


def _shared_dictionaries(names: Iterable[str]) -> str:
    """Return the names of dictionaries that stand before every tensor's name."""
    every = list(names)
    prefix = ""
    while every:
        first = every[0][len(prefix) :].split(".")[0]
        longer = f"{prefix}{first}."
        if first not in DICTIONARIES or not all(name.startswith(longer) for name in every):
            break
        prefix = longer
    return prefix
