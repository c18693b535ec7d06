"""Inpainting: what the step is told where a picture is to stay.

An ordinary model blends: after every call the latents outside the mask are the picture's own,
noised as the next call expects them (as diffusers does, with the starting noise every time). That
is linear in two more registers, so it needs no call and no branch. A model with nine channels is
shown the picture instead.
"""

import numpy as np
from numpy.typing import NDArray

from runtime.samplers import Program

Matrices = NDArray[np.float64]


def blend(program: Program) -> tuple[Matrices, Matrices]:
    """Return matrices (N, r + 2, r + 4) and `outside` (N, r + 4) of a run that keeps a picture.

    The last two registers hold the picture's latents and the starting noise throughout.
    """
    steps, registers, _ = program.matrices.shape
    matrices = np.zeros((steps, registers + 2, registers + 4))
    matrices[:, :registers, :registers] = program.matrices[:, :, :registers]
    matrices[:, :registers, -2:] = program.matrices[:, :, registers:]
    outside = np.zeros((steps, registers + 4))
    for kept, scales in enumerate((program.signal_scales, program.noise_scales), start=registers):
        matrices[:, kept, kept] = 1.0
        outside[:, kept] = scales[1:]
    return matrices, outside
