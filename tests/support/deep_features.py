"""DeepCache (Ma et al. 2024, arXiv:2312.00858) over diffusers' own UNet."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn


@contextmanager
def keeping_deep_features(unet: UNet2DConditionModel, interval: int) -> Iterator[list[bool]]:
    """Give the last residual block what it was given at the last call that an interval begins.

    It takes the deep features before the first skip. What made those of the calls in between is
    computed and thrown away, which a cache only saves. Yields whether each call was whole.
    """
    width, kept, whole = unet.config.block_out_channels[0], [], []

    def replace(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_states: Tensor = given[0]
        whole.append(len(whole) % interval == 0)
        if whole[-1]:
            kept[:] = [hidden_states[:, :width].clone()]
        return torch.cat([*kept, hidden_states[:, width:]], dim=1), *given[1:]

    hook = unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(replace)
    try:
        yield whole
    finally:
        hook.remove()
