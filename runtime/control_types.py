"""Types of pictures that a union of ControlNets sees: said, or told by a control's preprocessor."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from engine.configs.control_net_union import listed_types, type_place
from engine.errors import RequestError
from runtime.control import Control

__all__ = ["check_type", "control_types"]

# What preprocessors make, as unions call it.
MADE: Mapping[str, str] = MappingProxyType(
    {"canny": "canny", "scribble": "scribble", "tile": "tile", "blur": "tile"}
)


def check_type(control: Control, count: int) -> None:
    """Refuse a control without a type that its net knows, or with one where there are none.

    count: of the types that its net knows, 0 of a net that is no union. Raises RequestError.
    """
    if count:
        control_types(control, count)
    elif control.type is not None:
        raise RequestError(
            f"the control {control.net!r} came with the type {control.type!r}, and is no union of "
            "ControlNets, which alone has types; leave the type out"
        )


def control_types(control: Control, count: int) -> NDArray[np.float32]:
    """Return what a union is told of a control's picture: (1, count), 1 in its type's place.

    Raises RequestError where nothing tells the type, or the net has none of it.
    """
    preprocessor = control.preprocessor_text.partition(":")[0].lower()
    name = control.type or MADE.get(preprocessor)
    place = None if name is None else type_place(name)
    if place is None:
        raise RequestError(
            f"the control {control.net!r} is a union of ControlNets, and nothing tells what its "
            f"picture is; give its type (--control-type on a command line): {listed_types(count)}"
        )
    if place >= count:
        raise RequestError(
            f"the control {control.net!r} knows {count} types of pictures, and {name!r} is none of "
            f"them; choose one of {listed_types(count)}"
        )
    row = np.zeros((1, count), np.float32)
    row[0, place] = 1
    return row
