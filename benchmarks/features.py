"""A distance between pictures as a network sees them."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.configs.diffusion import AutoencoderConfig
from engine.model import Model, find_model

Distance = Callable[[NDArray[np.uint8], NDArray[np.uint8]], float]
EPSILON = 1e-10  # keeps a position without activation from being divided by nothing


def feature_distance() -> Distance | None:
    """Open the distance of two pictures, (H, W, 3) of 8 bits; None where torch is not installed.

    Zhang et al. 2018, arXiv:1801.03924, equation 1, with all weights w_l one: activations are
    normalised to length one over the channels, and the squares of their differences are averaged
    over the positions and added up over the levels. This is not LPIPS, and its values are none of
    LPIPS's: the activations are those of the shipped autoencoder's encoder at each of its levels,
    which knows pictograms and was trained for no classes, and no weight was fitted to what people
    say. 0 is for equal pictures, and each level adds 4 at the most.
    """
    try:
        import torch

        from export.modules.autoencoder import Autoencoder
        from export.writing import load_weights
    except ImportError:
        return None
    model = Model.open(find_model("pictogram"))
    assert isinstance(model.vae, AutoencoderConfig)
    autoencoder = Autoencoder(model.vae).eval()
    load_weights(autoencoder, model.find("vae"), f"autoencoder of {model.path}")

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def distance(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
        pixels = torch.from_numpy(np.stack([a, b])).permute(0, 3, 1, 2) / 127.5 - 1
        return sum(_apart(level) for level in _levels(autoencoder.encoder, pixels))

    return distance


def _levels(encoder: Any, pixels: Any) -> Any:
    """Give the activations of each level, (2, C, h, w), before the next halves them."""
    hidden_states = encoder.conv_in(pixels)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            hidden_states = resnet(hidden_states)
        yield hidden_states
        if not block.last:
            hidden_states = block.downsamplers[0](hidden_states)


def _apart(level: Any) -> float:
    unit = level / (level.norm(dim=1, keepdim=True) + EPSILON)
    return float((unit[0] - unit[1]).square().sum(0).mean())
