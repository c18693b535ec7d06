"""The architectures whose graphs ship: those that the families publish, in all their forms."""

from collections.abc import Iterator
from typing import get_args

from engine.checkpoints.families import FAMILIES
from engine.configs.control_net import control_net_of
from engine.configs.diffusion import (
    Config,
    TinyAutoencoderConfig,
    TinyDecoderConfig,
    UNetConfig,
)
from engine.graphs.graph import Part, Precision
from engine.graphs.steering import CONTROLLED_LEVELS, IP_PARTS
from engine.model import COMPONENTS

STEERED = ("sd1",)  # families whose steered and shrunk steps' graphs ship, and ControlNets'


def published_parts() -> Iterator[tuple[Part, Config]]:
    """List the parts whose graphs ship, the model that ships aside."""
    for part, component in COMPONENTS.items():
        if part in (*CONTROLLED_LEVELS, "step_shrunk"):
            continue
        configs = (
            config for family in FAMILIES.values() for config in family.published.get(component, ())
        )
        yield from ((part, config) for config in dict.fromkeys(configs))
    for family in (family for name, family in FAMILIES.items() if name in STEERED):
        unet = family.published["unet"][0]  # as first trained
        assert isinstance(unet, UNetConfig)
        yield "step_shrunk", unet
        yield from ((part, unet) for part in COMPONENTS if part in CONTROLLED_LEVELS)
        yield "control_hint", control_net_of(unet)
        yield "control", control_net_of(unet)
    # TAESD, for every family: in the place of its autoencoder, and for previews
    yield "vae_decoder", TinyAutoencoderConfig()
    yield "vae_encoder", TinyAutoencoderConfig()
    yield "preview_decoder", TinyDecoderConfig()


def precisions(part: Part, config: Config) -> tuple[Precision, ...]:
    """Return the precisions in which a part's graph ships: float32 alone where no GPU runs it."""
    on_processor = part == "step_shrunk" or part in IP_PARTS
    on_processor |= "edited_image" in config.extra_inputs
    return ("float32",) if on_processor else get_args(Precision)
