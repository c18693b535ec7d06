"""What every test shares: one thread, so that tests disturb nobody and results repeat.

What a processor runs fastest is not chosen by the tests' machine: it is ONNX Runtime's float32
wherever a test does not say.
"""

import sys

import torch

from engine import engines

torch.set_num_threads(1)
engines.capabilities = frozenset

if sys.platform == "darwin":  # for which NVIDIA's libraries are not made
    collect_ignore_glob = [
        "engine/devices/test_cuda.py",
        "engine/backends/onnxruntime/test_cuda.py",
        "engine/backends/onnxruntime/test_group_norm.py",
        "engine/backends/tensorrt/*",
        "export/test_engines.py",
    ]
