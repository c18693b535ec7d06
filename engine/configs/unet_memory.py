"""How many numbers a UNet keeps alive at once, level by level."""

from collections.abc import Collection, Iterator, Sequence

from engine.configs.base import resnet_activations

__all__ = ["alive", "block_activations"]


def alive(
    widths: Sequence[int], layers: Sequence[int], attends: Collection[int], latents: int
) -> Iterator[int]:
    """Go through the levels; yields the numbers alive in each block of one row of the batch.

    layers: residual blocks by level on the way down, one more on the way up; attends: the levels
    with transformers; latents: positions of the first level
    """
    levels, inputs = len(widths), widths[0]
    skips = [(widths[0], latents)]
    for level, width in enumerate(widths):
        area = latents // 4**level
        for _ in range(layers[level]):
            yield block_activations(inputs, width, level in attends) * area + _sum(skips)
            skips.append((width, area))
            inputs = width
        if level < levels - 1:
            skips.append((width, area // 4))
    for level in reversed(range(levels)):
        width, area = widths[level], latents // 4**level
        for _ in range(layers[level] + 1):
            skip, _ = skips.pop()
            yield block_activations(inputs + skip, width, level in attends) * area + _sum(skips)
            inputs = width
        if level:
            yield 2 * width * 4 * area + _sum(skips)


def block_activations(inputs: int, outputs: int, attends: bool) -> int:
    """Count the channels alive in a residual block, and in a transformer behind it."""
    transformer = _transformer_activations(outputs) if attends else 0
    return max(resnet_activations(inputs, outputs), transformer)


def _transformer_activations(width: int) -> int:
    """Channels alive in a gated feed-forward layer, 8 wide in and 4 out, around two residuals."""
    return (2 + 8 + 4) * width


def _sum(skips: Sequence[tuple[int, int]]) -> int:
    return sum(width * area for width, area in skips)
