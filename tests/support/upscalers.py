"""The published upscalers in torch, as their papers describe them, with random weights.

RRDBNet: Wang et al. 2018, arXiv:1809.00219; SRVGGNetCompact: Wang et al. 2021, arXiv:2107.10833;
SwinIR: Liang et al. 2021, arXiv:2108.10257. Attributes are named as in their authors' files.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn


def conv(inputs, outputs, side=3):
    return nn.Conv2d(inputs, outputs, side, padding=side // 2)


class DenseBlock(nn.Module):
    def __init__(self, width, growth, plus):
        super().__init__()
        for i in range(5):
            setattr(self, f"conv{i + 1}", conv(width + i * growth, width if i == 4 else growth))
        if plus:
            self.conv1x1 = nn.Conv2d(width, growth, 1, bias=False)
        self.plus = plus

    def forward(self, x):
        x1 = F.leaky_relu(self.conv1(x), 0.2)
        x2 = F.leaky_relu(self.conv2(torch.cat((x, x1), 1)), 0.2)
        if self.plus:
            x2 = x2 + self.conv1x1(x)
        x3 = F.leaky_relu(self.conv3(torch.cat((x, x1, x2), 1)), 0.2)
        x4 = F.leaky_relu(self.conv4(torch.cat((x, x1, x2, x3), 1)), 0.2)
        if self.plus:
            x4 = x4 + x2
        return x + 0.2 * self.conv5(torch.cat((x, x1, x2, x3, x4), 1))


class ResidualDenseBlocks(nn.Module):
    def __init__(self, width, growth, plus):
        super().__init__()
        for i in (1, 2, 3):
            setattr(self, f"rdb{i}", DenseBlock(width, growth, plus))

    def forward(self, x):
        return x + 0.2 * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nn.Module):
    """unshuffle: 2 is Real-ESRGAN's x2, 4 its x1."""

    def __init__(self, width=16, blocks=2, growth=8, doublings=2, unshuffle=1, plus=False):
        super().__init__()
        self.doublings, self.unshuffle = doublings, unshuffle
        self.conv_first = conv(3 * unshuffle**2, width)
        self.body = nn.Sequential(
            *(ResidualDenseBlocks(width, growth, plus) for _ in range(blocks))
        )
        self.conv_body = conv(width, width)
        for i in range(doublings):
            setattr(self, f"conv_up{i + 1}", conv(width, width))
        self.conv_hr = conv(width, width)
        self.conv_last = conv(width, 3)

    def forward(self, x):
        first = self.conv_first(F.pixel_unshuffle(x, self.unshuffle))
        x = first + self.conv_body(self.body(first))
        for i in range(self.doublings):
            larger = F.interpolate(x, scale_factor=2, mode="nearest")
            x = F.leaky_relu(getattr(self, f"conv_up{i + 1}")(larger), 0.2)
        return self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))


def trunk_names(state):
    """Name tensors as the authors' later code does."""
    changes = (
        (r"^body\.(\d+)\.rdb(\d)", r"RRDB_trunk.\1.RDB\2"),
        (r"^conv_body", "trunk_conv"),
        (r"^conv_up(\d)", r"upconv\1"),
        (r"^conv_hr", "HRconv"),
    )
    for pattern, other in changes:
        state = {re.sub(pattern, other, name): tensor for name, tensor in state.items()}
    return state


class OldRRDBNet(nn.Module):
    """The authors' first code is a row of layers; only the numbers of those with weights matter."""

    def __init__(self, network):
        super().__init__()
        body = nn.Sequential(*network.body, network.conv_body)
        rows = [network.conv_first, nn.Module()]
        for i in range(network.doublings):
            rows += [nn.Upsample(scale_factor=2), getattr(network, f"conv_up{i + 1}"), nn.ReLU()]
        rows += [network.conv_hr, nn.ReLU(), network.conv_last]
        rows[1].sub = body
        self.model = nn.Sequential(*rows)

    def state(self):
        """Return the tensors, of dense blocks as that code's blocks of a convolution name them."""
        dense = re.compile(r"\.rdb(\d)\.(conv\d)\.")
        return {
            dense.sub(r".RDB\1.\2.0.", name).replace("rdb", "RDB"): tensor
            for name, tensor in self.state_dict().items()
        }


class SRVGGNetCompact(nn.Module):
    def __init__(self, width=16, convs=3, upscale=4):
        super().__init__()
        self.upscale = upscale
        layers = [conv(3, width), nn.PReLU(width)]
        for _ in range(convs):
            layers += [conv(width, width), nn.PReLU(width)]
        self.body = nn.Sequential(*layers, conv(width, 3 * upscale**2))

    def forward(self, x):
        larger = F.interpolate(x, scale_factor=self.upscale, mode="nearest")
        return larger + F.pixel_shuffle(self.body(x), self.upscale)


class WindowAttention(nn.Module):
    def __init__(self, width, window, heads):
        super().__init__()
        self.window, self.heads = window, heads
        self.relative_position_bias_table = nn.Parameter(
            torch.randn((2 * window - 1) ** 2, heads) * 0.5
        )
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        index = torch.zeros(window**2, window**2, dtype=torch.int64)
        for i in range(window**2):
            for j in range(window**2):
                down = i // window - j // window + window - 1
                across = i % window - j % window + window - 1
                index[i, j] = down * (2 * window - 1) + across
        self.register_buffer("relative_position_index", index)

    def forward(self, x, mask):
        """x: (n, N, C); mask: (n, N, N) of numbers that scores get, or None."""
        n, places, width = x.shape
        q, k, v = self.qkv(x).view(n, places, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q * (width // self.heads) ** -0.5) @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index]
        scores = scores + bias.permute(2, 0, 1)
        if mask is not None:
            scores = scores + mask[:, None]
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, places, width))


class SwinBlock(nn.Module):
    def __init__(self, width, window, heads, hidden, shift):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = WindowAttention(width, window, heads)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def windows(self, x):
        b, h, w, c = x.shape
        s = self.window
        x = x.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(-1, s * s, c)

    def mask(self, h, w):
        """Places of the rolled picture see only those of their own region."""
        regions = torch.zeros(1, h, w, 1)
        count = 0
        ends = slice(0, -self.window), slice(-self.window, -self.shift), slice(-self.shift, None)
        for rows in ends:
            for columns in ends:
                regions[:, rows, columns] = count
                count += 1
        regions = self.windows(regions)[..., 0]
        differs = regions[:, None, :] != regions[:, :, None]
        return torch.where(differs, -100.0, 0.0)

    def forward(self, x):
        """x: (1, h, w, C)."""
        b, h, w, c = x.shape
        s, y, mask = self.window, self.norm1(x), None
        if self.shift:
            y, mask = torch.roll(y, (-self.shift,) * 2, (1, 2)), self.mask(h, w)
        y = self.attn(self.windows(y), mask)
        y = y.view(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        if self.shift:
            y = torch.roll(y, (self.shift,) * 2, (1, 2))
        x = x + y
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


def ending(width, three):
    if not three:
        return conv(width, width)
    slope = nn.LeakyReLU(0.2)
    narrow = width // 4
    return nn.Sequential(
        conv(width, narrow), slope, conv(narrow, narrow, 1), slope, conv(narrow, width)
    )


class SwinIR(nn.Module):
    def __init__(
        self, upsampler="pixelshuffle", upscale=4, width=24, window=4, three=False, features=16
    ):
        super().__init__()
        self.upsampler, self.upscale = upsampler, upscale
        self.range = 255 if not upsampler and window == 7 else 1  # of the model for JPEG's traces
        self.conv_first = conv(3, width)
        self.patch_embed = nn.Module()
        self.patch_embed.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList()
        for heads in (2, 3):
            group = nn.Module()
            group.residual_group = nn.Module()
            group.residual_group.blocks = nn.ModuleList(
                SwinBlock(width, window, heads, 2 * width, window // 2 * (i % 2)) for i in range(2)
            )
            group.conv = ending(width, three)
            self.layers.append(group)
        self.norm = nn.LayerNorm(width)
        self.conv_after_body = ending(width, three)
        if upsampler in ("pixelshuffle", "nearest+conv"):
            self.conv_before_upsample = nn.Sequential(conv(width, features), nn.LeakyReLU())
            self.conv_last = conv(features, 3)
        if upsampler == "pixelshuffle":
            factors = [3] if upscale == 3 else [2] * (upscale // 2)
            rows = [(conv(features, f * f * features), nn.PixelShuffle(f)) for f in factors]
            self.upsample = nn.Sequential(*(layer for row in rows for layer in row))
        elif upsampler == "pixelshuffledirect":
            self.upsample = nn.Sequential(conv(width, 3 * upscale**2), nn.PixelShuffle(upscale))
        elif upsampler == "nearest+conv":
            self.conv_up1 = conv(features, features)
            if upscale == 4:
                self.conv_up2 = conv(features, features)
            self.conv_hr = conv(features, features)
        else:
            self.conv_last = conv(width, 3)

    def forward(self, pixels):
        mean = torch.tensor((0.4488, 0.4371, 0.4040)).view(1, 3, 1, 1)
        first = self.conv_first((pixels - mean) * self.range)
        x = self.patch_embed.norm(first.permute(0, 2, 3, 1))
        for group in self.layers:
            y = x
            for block in group.residual_group.blocks:
                y = block(y)
            x = x + group.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = first + self.conv_after_body(self.norm(x).permute(0, 3, 1, 2))
        if self.upsampler == "pixelshuffle":
            x = self.conv_last(self.upsample(self.conv_before_upsample(x)))
        elif self.upsampler == "pixelshuffledirect":
            x = self.upsample(x)
        elif self.upsampler == "nearest+conv":
            x = self.conv_before_upsample(x)
            for name in ("conv_up1", "conv_up2")[: self.upscale // 2]:
                larger = F.interpolate(x, scale_factor=2, mode="nearest")
                x = F.leaky_relu(getattr(self, name)(larger), 0.2)
            x = self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))
        else:
            return pixels + self.conv_last(x) / self.range
        return x + mean


def seeded(kind, **options):
    """Build a network whose weights are always the same."""
    torch.manual_seed(0)
    return kind(**options).eval()
