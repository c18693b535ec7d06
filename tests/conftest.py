"""What every test shares: one thread, so that tests disturb nobody and results repeat.

What a processor runs fastest is not chosen by the tests' machine: it is ONNX Runtime's float32
wherever a test does not say.
"""

import torch

from engine import opening

torch.set_num_threads(1)
opening.capabilities = frozenset
