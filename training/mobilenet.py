"""MobileNet-v2 as nsfwjs publishes it, a network that saw no picture of ours, as a judge.

The npm package carries the weights as bytes with a scale and an offset for each tensor, in Keras'
names (Sandler et al. 2018, arXiv:1801.04381). What is taken is what the network sees on the way,
at four sizes, not what it was trained to say.
"""

import base64
import re
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import ModelError
from training.packages import JUDGE, fetch

SIDE = 224
EPSILON = 1e-3
# Output channels, how many blocks, and the stride of the first: table 2 of the paper.
STAGES = ((16, 1, 1), (24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
SEEN = (1, 2, 4, 6)  # after which stages features are taken: 56, 28, 14 and 7 wide

Weights = dict[str, Tensor]
_TENSOR = re.compile(
    r'\{name:"([^"]+)",shape:\[([\d,]+)\],dtype:"float32",'
    r'quantization:\{min:([-.\de]+),scale:([-.\de]+),dtype:"uint8"\}\}'
)
_BYTES = re.compile(r'exports="([A-Za-z0-9+/=]+)"')


class MobileNet(nn.Module):
    """The convolutions of MobileNet-v2, with the weights that `load` reads."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weights = nn.ParameterDict(
            {name.replace(".", "_"): value for name, value in weights.items()}
        ).requires_grad_(False)

    @classmethod
    def load(cls, folder: Path) -> "MobileNet":
        """Fetch the package into `folder`, unless it is there; raises ModelError."""
        model, shard = (
            _member(fetch(JUDGE, folder), f"package/dist/models/mobilenet_v2/{name}.min.js")
            for name in ("model", "group1-shard1of1")
        )
        found = _BYTES.search(shard)
        data = np.frombuffer(base64.b64decode(found.group(1)) if found else b"", np.uint8)
        weights, start = {}, 0
        for name, shape, least, scale in _TENSOR.findall(model):
            sizes = [int(size) for size in shape.split(",")]
            end = start + int(np.prod(sizes))
            if end > len(data):
                raise ModelError(f"{JUDGE.name}'s MobileNet-v2 ends before {name}")
            values = data[start:end].astype(np.float32) * float(scale) + float(least)
            weights[name.replace("/", ".")] = torch.from_numpy(values.reshape(sizes))
            start = end
        return cls(weights).eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return what is seen of images (B, 3, H, W) of -1 to 1: (B, C, h, w) for each of SEEN."""
        x = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True) / 2 + 0.5
        x = self._convolve(F.pad(x, (0, 1, 0, 1)), "Conv1", "bn_Conv1", stride=2).clamp(0, 6)
        seen, block = [], 0
        for stage, (channels, count, stride) in enumerate(STAGES):
            for index in range(count):
                x = self._block(x, block, channels, stride if index == 0 else 1)
                block += 1
            if stage in SEEN:
                seen.append(x)
        return seen

    def _block(self, x: Tensor, block: int, channels: int, stride: int) -> Tensor:
        """Widen by a factor of six (not in the first block), convolve each channel, narrow."""
        name, h = f"block_{block}" if block else "expanded_conv", x
        if block:
            h = self._convolve(h, f"{name}_expand", f"{name}_expand_BN").clamp(0, 6)
        h = F.pad(h, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
        h = self._convolve(h, f"{name}_depthwise", f"{name}_depthwise_BN", stride=stride)
        h = self._convolve(h.clamp(0, 6), f"{name}_project", f"{name}_project_BN")
        return x + h if stride == 1 and x.shape[1] == channels else h

    def _convolve(self, x: Tensor, name: str, norm: str, stride: int = 1) -> Tensor:
        """Convolve as Keras' layer `name` does, then normalise by the moments of `norm`."""
        depthwise = f"{name}_depthwise_kernel" in self.weights
        kernel = self.weights[f"{name}_depthwise_kernel" if depthwise else f"{name}_kernel"]
        # Keras has (height, width, in, out), and (height, width, channels, 1) for each by itself.
        weight = kernel.permute(2, 3, 0, 1) if depthwise else kernel.permute(3, 2, 0, 1)
        x = F.conv2d(x, weight, stride=stride, groups=len(weight) if depthwise else 1)
        mean, variance, gamma, beta = (
            self.weights[f"{norm}_{part}"]
            for part in ("moving_mean", "moving_variance", "gamma", "beta")
        )
        return F.batch_norm(x, mean, variance, gamma, beta, eps=EPSILON)


def _member(archive: Path, name: str) -> str:
    """Read one text out of a package."""
    with tarfile.open(archive) as tar:
        file = tar.extractfile(name)
        assert file is not None
        return file.read().decode()
