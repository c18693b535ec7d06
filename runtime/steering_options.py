"""The options of `python -m runtime` on pictures that steer: controls and image prompts."""

import argparse
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from runtime.control_options import CONTROL_FIELDS, CONTROL_OPTIONS, control_files, controls_of
from runtime.image_prompt_options import (
    IMAGE_PROMPT_FIELDS,
    IMAGE_PROMPT_OPTIONS,
    image_prompts_of,
    ip_adapter_arguments,
)

__all__ = ["STEERING_FIELDS", "STEERING_OPTIONS", "steering_arguments", "steering_of"]

STEERING_OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {**CONTROL_OPTIONS, **IMAGE_PROMPT_OPTIONS}
)
STEERING_FIELDS = (*CONTROL_FIELDS, *IMAGE_PROMPT_FIELDS)


def steering_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return what `Pipeline.load` takes of ControlNets and IP-Adapters; raises RequestError."""
    controls = control_files(options) if options.controls else None
    return {"controls": controls, **ip_adapter_arguments(options)}


def steering_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a request; reads the pictures. Raises RequestError."""
    return {"controls": controls_of(options), "image_prompts": image_prompts_of(options)}
