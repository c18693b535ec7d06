"""Where a UNet attends to the text: the layers, in the order in which IP-Adapters number them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

__all__ = ["CrossAttention", "cross_attentions"]


class CrossAttention(NamedTuple):
    """A layer: the name of its transformer block, its level of the UNet, its width."""

    name: str
    level: int
    width: int


def cross_attentions(
    widths: Sequence[int],
    down: Sequence[Sequence[int]],
    up: Sequence[Sequence[int]],
    middle: int,
) -> tuple[CrossAttention, ...]:
    """List the layers: the way down, the way up, then the middle, as diffusers goes through them.

    widths: by level; down, up: blocks of the transformers, in the order in which they are run
    middle: blocks of the middle's
    """

    def blocks(name: str, level: int, depths: Sequence[int]) -> Iterator[CrossAttention]:
        for i, depth in enumerate(depths):
            for j in range(depth):
                block = f"{name}.attentions.{i}.transformer_blocks.{j}"
                yield CrossAttention(block, level, widths[level])

    last = len(widths) - 1
    layers = [each for i, d in enumerate(down) for each in blocks(f"down_blocks.{i}", i, d)]
    layers += [each for i, d in enumerate(up) for each in blocks(f"up_blocks.{i}", last - i, d)]
    return (*layers, *blocks("mid_block", last, (middle,)))
