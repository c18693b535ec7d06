"""The architectures whose graphs ship: those that the families publish, in all their forms."""

from collections.abc import Iterator

from engine.checkpoints.families import FAMILIES
from engine.configs.diffusion import Config, TinyAutoencoderConfig, TinyDecoderConfig
from engine.graphs.graph import CONTROLLED_LEVELS, Part
from engine.model import COMPONENTS


def published_parts() -> Iterator[tuple[Part, Config]]:
    """List the parts whose graphs ship, the model that ships aside."""
    for part, component in COMPONENTS.items():
        if part in CONTROLLED_LEVELS:  # traced by `python -m export control-net`
            continue
        configs = (
            config for family in FAMILIES.values() for config in family.published.get(component, ())
        )
        yield from ((part, config) for config in dict.fromkeys(configs))
    # TAESD, for every family: in the place of its autoencoder, and for previews
    yield "vae_decoder", TinyAutoencoderConfig()
    yield "vae_encoder", TinyAutoencoderConfig()
    yield "preview_decoder", TinyDecoderConfig()
