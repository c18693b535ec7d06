"""Guidance: how much each conditioning counts at each call of the UNet.

Legend
    s   the guidance scale: out = uncond + s (cond - uncond)
        (Ho and Salimans 2022, arXiv:2207.12598, equation 6)
    w   how much each part of a composed prompt counts: out = uncond + s sum_i w_i (cond_i - uncond)
        (Liu et al. 2022, arXiv:2206.01714, equation 11)
    t   the scale of two-sided guidance, which adds t (uncond - negative), and whose uncond is the
        empty prompt
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """How a run is guided.

    scales: s at each call of the UNet; where it is 1 or less the prompts alone are seen
    negative_scale: t, or None where the negative prompt takes the place of the empty one
    always: whether the unconditional output is needed at every call, as by CFG++
    """

    scales: tuple[float, ...]
    negative_scale: float | None = None
    always: bool = False

    @classmethod
    def over(
        cls,
        scale: float | Sequence[float],
        calls: int,
        interval: tuple[float, float] = (0.0, 1.0),
        negative_scale: float | None = None,
        always: bool = False,
    ) -> "Guidance":
        """Spread a scale over a run.

        scale: a number, or several that the run passes through at even distances
        interval: the part of the run that is guided (Kynkäänniemi et al. 2024, arXiv:2404.07724):
            calls from int(start calls) to int(stop calls), the latter left out, as in diffusers
        always: as the field
        """
        points = np.atleast_1d(np.asarray(scale, np.float64))
        scales = np.interp(np.linspace(0, points.size - 1, calls), np.arange(points.size), points)
        start, stop = (int(end * calls) for end in interval)
        scales[:start] = scales[stop:] = 1.0
        return cls(scales=tuple(scales.tolist()), negative_scale=negative_scale, always=always)

    def is_guided(self, scale: float) -> bool:
        """Tell whether a call with this scale sees more than the prompts."""
        return scale > 1 or self.always

    def negatives(self, call: int) -> int:
        """Return how many groups a call has that guidance moves away from."""
        both = 1 + (self.negative_scale is not None)
        return both if self.is_guided(self.scales[call]) else 0

    def weights(self, scale: float, parts: NDArray[np.float64]) -> Array:
        """Return what each group counts at a call with this scale: (g, P, ...) float32.

        parts: w of every prompt, (m, P, ...), cell by cell where it has a map. The order is
        [uncond, cond]: uncond, the negative prompt where it is another, the parts; at a scale of 1
        or less the parts alone.
        """
        if not self.is_guided(scale):
            whole = parts.sum(0)
            return (parts / np.where(whole == 0, 1, whole)).astype(np.float32)
        t = self.negative_scale
        uncond = 1 - scale * parts.sum(0) + (t or 0.0)
        away = [] if t is None else [np.full_like(uncond, -t)]
        return np.stack([uncond, *away, *(scale * parts)]).astype(np.float32)


def embedded_guidance(guidance_scale: float, channels: int) -> Array:
    """Embed a guidance scale as sines and cosines, (channels,), as LCM was trained with it.

    Luo et al. 2023, arXiv:2310.04378, section 4.3, after Kingma et al. 2021 (VDM).
    """
    half = channels // 2
    frequencies = np.exp(-math.log(10000.0) / (half - 1) * np.arange(half))
    angles = (guidance_scale - 1) * 1000.0 * frequencies
    waves = np.concatenate([np.sin(angles), np.cos(angles), np.zeros(channels % 2)])
    return waves.astype(np.float32)
