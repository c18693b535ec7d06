"""Facts of the autoencoder that a model in pixels lacks: its latents are the pixels themselves."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from engine.configs.base import Config, Shape, Sizes
from engine.errors import ModelError

__all__ = ["IDENTITY_CLASS", "IdentityAutoencoderConfig"]

IDENTITY_CLASS = "IdentityAutoencoder"
CHANNELS = (1, 3)  # gray, and red, green and blue


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityAutoencoderConfig(Config):
    """Pixels of -1 to 1 in the place of latents; latent_channels: 1 for gray, 3 for colours."""

    latent_channels: int = 3

    def __post_init__(self) -> None:
        """Refuse pixels that are neither gray nor of three colours."""
        super(IdentityAutoencoderConfig, self).__post_init__()
        if self.latent_channels not in CHANNELS:
            raise ModelError(
                f"{IDENTITY_CLASS}: latent_channels is {self.latent_channels}; 1 (gray) or 3 "
                "(colours) is expected: check the model's config.json"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read its configuration. Raises ModelError for that of another class."""
        if values.get("_class_name") != IDENTITY_CLASS:
            raise ModelError(
                f"config.json is of the class {values.get('_class_name')!r}; an {IDENTITY_CLASS}'s "
                "is expected"
            )
        return super(IdentityAutoencoderConfig, cls).from_dict(values)

    @property
    def draws_posterior(self) -> bool:
        """Whether latents of a picture are drawn from a distribution; these are the picture's."""
        return False

    def tensor_shapes(self) -> dict[str, Shape]:
        """Return the shape of every tensor, of which there is none."""
        return {}

    def symbols(self) -> dict[str, int]:
        """Return the channels of the latents."""
        return {"C": self.latent_channels}

    def activations(self, part: str, sizes: Sizes) -> int:
        """Count the numbers alive at once: pixels of three colours before and after rounding."""
        return 6 * sizes.pixels
