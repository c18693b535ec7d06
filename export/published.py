"""The architectures whose graphs ship: those that the families publish, in all their forms."""

from collections.abc import Iterator
from dataclasses import replace

from engine.checkpoints.families import FAMILIES
from engine.configs.control_net import control_net_of
from engine.configs.diffusion import (
    Config,
    TinyAutoencoderConfig,
    TinyDecoderConfig,
    UNetConfig,
)
from engine.graphs.graph import CONTROLLED_LEVELS, Part
from engine.model import COMPONENTS

CONTROLLED = ("sd1", "sd2", "xl")  # the families that ControlNets were published for


def published_parts() -> Iterator[tuple[Part, Config]]:
    """List the parts whose graphs ship, the model that ships aside."""
    for part, component in COMPONENTS.items():
        if part in CONTROLLED_LEVELS:
            continue
        configs = (
            config for family in FAMILIES.values() for config in family.published.get(component, ())
        )
        yield from ((part, config) for config in dict.fromkeys(configs))
    for unet in (config for name in CONTROLLED for config in _controlled(name)):
        yield "step_controlled", unet
        yield "step_shallow_controlled", unet
    for name in CONTROLLED:
        net = control_net_of(_controlled(name)[0])
        yield "control_hint", net
        yield "control", net
    # TAESD, for every family: in the place of its autoencoder, and for previews
    yield "vae_decoder", TinyAutoencoderConfig()
    yield "vae_encoder", TinyAutoencoderConfig()
    yield "preview_decoder", TinyDecoderConfig()


def _controlled(family: str) -> tuple[UNetConfig, ...]:
    """Return the UNets of a family that ControlNets were published for: as first trained, painting.

    (A net of the first kind steers the second as well.)
    """
    unets = [unet for unet in FAMILIES[family].published["unet"] if isinstance(unet, UNetConfig)]
    return tuple(u for u in unets if u == replace(unets[0], in_channels=u.in_channels))
