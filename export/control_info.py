"""What a ControlNet's or T2I-Adapter's file is: its kind, its UNets' family, what is used."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.checkpoints.component import Component
from engine.checkpoints.control_lora import MARK, ControlLora
from engine.checkpoints.control_net import is_pooled, open_control_net
from engine.checkpoints.families import FAMILIES
from engine.checkpoints.formats.files import Weights
from engine.checkpoints.t2i_adapter import open_t2i_adapter
from engine.configs.base import Shape
from engine.configs.control_net import ControlNetConfig
from engine.configs.control_net_union import listed_types
from engine.configs.unet import UNetConfig
from engine.errors import ModelError
from engine.model import Model, find_model, shipped_models
from engine.steering.control_nets import PREPROCESSOR

__all__ = ["describe_control_net", "describe_t2i_adapter"]


def describe_control_net(
    path: Path, weights: Weights
) -> tuple[dict[str, Any], Mapping[str, Shape], list[str]]:
    """Return the facts of a ControlNet, its tensors' shapes, and notes on what is not used.

    Raises ModelError where it steers the UNet of no family that is known here.
    """
    reasons = list[str]()
    for title, unet in _unets():
        try:
            unread = Component(weights=weights, sources={}, shapes=unet.tensor_shapes())
            config, net = open_control_net(path, unet, unread)
        except ModelError as error:
            reasons.append(str(error))
            continue
        kind, use = _kind_and_use(config, net)
        facts = {
            "kind": kind,
            "file": str(path),
            "family": title,
            "use": f"give it as --control, with a --control-image{use}",
            "preprocessor": weights.metadata.get(PREPROCESSOR),
            "residuals": [sum(widths) for widths in config.residual_widths()],
            "used_tensors": len(net.used()),
        }
        if is_pooled(path):
            facts["pooled"] = "its residuals count in the mean over all places"
        if config.control_types:
            facts["types"] = listed_types(config.control_types)
        unused = sorted(set(weights) - net.used() - {MARK})
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        notes = [f"not used: {unused[0]}{more}"] if unused else []
        return facts, net.shapes, notes
    raise _refusal(path, reasons)


def _kind_and_use(config: ControlNetConfig, net: Mapping[str, Any]) -> tuple[str, str]:
    """Return what a ControlNet is called, and what is given beside its picture."""
    if config.control_types:
        return "union of ControlNets", " and a --control-type"
    return ("control-LoRA" if isinstance(net, ControlLora) else "ControlNet"), ""


def describe_t2i_adapter(path: Path) -> tuple[dict[str, Any], Mapping[str, Shape]]:
    """Return the facts of a T2I-Adapter and its tensors' shapes, of which all are used.

    Raises ModelError where it is for the UNet of no family that is known here.
    """
    reasons = list[str]()
    for title, unet in _unets():
        try:
            config, adapter = open_t2i_adapter(path, unet)
        except ModelError as error:
            reasons.append(str(error))
            continue
        facts = {
            "kind": "T2I-Adapter",
            "file": str(path),
            "family": title,
            "use": "give it as --control, with a --control-image",
            "light": config.light,
            "sees": "gray" if config.in_channels == 1 else "colours",
            "features": list(config.channels),
            "used_tensors": len(adapter.used()),
        }
        return facts, adapter.shapes
    raise _refusal(path, reasons)


def _refusal(path: Path, reasons: list[str]) -> ModelError:
    """Choose, of why each family's UNet takes it not, what says most."""
    own = [reason for reason in reasons if reason.startswith(str(path))]
    of_what = [reason for reason in own if "of another family" not in reason]
    return ModelError((of_what or own)[0])


def _unets() -> Iterator[tuple[str, UNetConfig]]:
    """Yield every UNet that is known here, with its family's title."""
    for family in FAMILIES.values():
        for config in family.published.get("unet", ()):
            if isinstance(config, UNetConfig):
                yield family.title, config
    for name in shipped_models():
        model = Model.open(find_model(name))
        yield model.family.title, model.unet
