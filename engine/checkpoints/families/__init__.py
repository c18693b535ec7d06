"""The families: the one place that lists them."""

from collections.abc import Container, Mapping
from pathlib import Path
from types import MappingProxyType

from engine.checkpoints.architecture import Stored
from engine.checkpoints.families.base import Family
from engine.checkpoints.families.pictogram import PICTOGRAM_FAMILY
from engine.checkpoints.families.sd import SD1_FAMILY, SD2_FAMILY
from engine.checkpoints.families.xl import REFINER_FAMILY, XL_FAMILY
from engine.checkpoints.parts import Shapes
from engine.configs.diffusion import UNetConfig
from engine.errors import ModelError

__all__ = ["FAMILIES", "Family", "family_of", "find_family"]

# The first that recognises a model counts.
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.name: family
        for family in (PICTOGRAM_FAMILY, SD1_FAMILY, SD2_FAMILY, XL_FAMILY, REFINER_FAMILY)
    }
)


def find_family(path: Path, shapes: Shapes) -> Family:
    """Return the family of a file; raises ModelError when it is of none.

    shapes: of all its tensors, by name
    """
    file = Stored.of(path, "", shapes)
    for family in FAMILIES.values():
        if family.recognises(file):
            return family
    raise ModelError(
        f"{path} is of no family that is known here ({', '.join(FAMILIES)}); "
        "use a Stable Diffusion 1.x, 2.x or XL model"
    )


def family_of(unet: UNetConfig, parts: Container[str] = ()) -> Family:
    """Return the family of a folder, whose configurations say what its UNet is.

    parts: the components that it has; XL with a score beside its sizes is told from its refiner
        by its two text encoders
    """
    family = next(
        family
        for family in FAMILIES.values()
        if all(getattr(unet, name) == value for name, value in family.unet.items())
    )
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in parts]
    if not family.parts or all(name in family.parts for name in encoders):
        return family
    embed = unet.addition_embed_type
    kin = (f for f in FAMILIES.values() if f.unet["addition_embed_type"] == embed)
    return next((f for f in kin if all(name in f.parts for name in encoders)), family)
