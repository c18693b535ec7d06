"""Facts of upscalers: networks that enlarge a picture, read off the shapes in their files.

The names of tensors are those of BasicSR (https://github.com/XPixelGroup/BasicSR) and of SwinIR's
authors; pictures are RGB of 0 to 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.configs.base import Config, Shape, Sizes, Tensors, weight

__all__ = ["COLOURS", "CompactConfig", "ESRGANConfig", "SwinIRConfig", "UpscalerConfig"]

COLOURS = 3
GROWTH_CONVS = 5  # of a dense block
FEATURES = 64  # of SwinIR where it enlarges


@dataclass(frozen=True, slots=True, kw_only=True)
class UpscalerConfig(Config):
    """What all upscalers answer."""

    @property
    def scale(self) -> int:
        """How many times larger both sides become."""
        raise NotImplementedError

    @property
    def multiple(self) -> int:
        """What both sides of its input must be a multiple of."""
        return 1

    @property
    def compression(self) -> int:
        """The same as `scale`: pixels of the result along a side of one that goes in."""
        return self.scale

    def symbols(self) -> dict[str, int]:
        """Return no sizes: those of its pictures are free, and its colours are three."""
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class ESRGANConfig(UpscalerConfig):
    """ESRGAN (Wang et al. 2018, arXiv:1809.00219): residual-in-residual dense blocks (RRDB).

    num_feat, num_block, num_grow_ch: width, blocks, and channels that each dense layer adds
    doublings: of the sides, at its end
    unshuffle: by how much pixels are laid into channels first, as Real-ESRGAN x2 does (2)
    plus: whether dense blocks have the further connections of ESRGAN+ (Rakotonirina and Rasoanaivo
        2020, arXiv:2001.08073)
    """

    num_feat: int = 64
    num_block: int = 23
    num_grow_ch: int = 32
    doublings: int = 0
    unshuffle: int = 1
    plus: bool = False

    @property
    def scale(self) -> int:
        """How many times larger both sides become."""
        return int(2**self.doublings) // self.unshuffle

    @property
    def multiple(self) -> int:
        """Both sides are taken apart evenly."""
        return self.unshuffle

    def tensor_shapes(self) -> dict[str, Shape]:
        """Return the shape of every tensor, by the name in BasicSR's RRDBNet."""
        return dict(_esrgan(self))

    def activations(self, part: str, sizes: Sizes) -> int:
        """Estimate the most numbers alive at once: in a dense block, or at the end."""
        dense = 3 * self.num_feat + GROWTH_CONVS * self.num_grow_ch
        end = 3 * self.num_feat * int(4**self.doublings)
        return max(dense, end) * sizes.pixels // self.unshuffle**2


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactConfig(UpscalerConfig):
    """SRVGGNetCompact (Real-ESRGAN, Wang et al. 2021, arXiv:2107.10833): convolutions in a row.

    num_conv: between the first and the last, each with a PReLU behind it
    upscale: of both sides
    """

    num_feat: int = 64
    num_conv: int = 32
    upscale: int = 4

    @property
    def scale(self) -> int:
        """How many times larger both sides become."""
        return self.upscale

    def tensor_shapes(self) -> dict[str, Shape]:
        """Return the shape of every tensor, by the name in Real-ESRGAN's SRVGGNetCompact."""
        return dict(_compact(self))

    def activations(self, part: str, sizes: Sizes) -> int:
        """Estimate the most numbers alive at once: between two layers, or at the end."""
        return max(3 * self.num_feat, 3 * COLOURS * self.upscale**2) * sizes.pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class SwinIRConfig(UpscalerConfig):
    """SwinIR (Liang et al. 2021, arXiv:2108.10257): attention within windows that are shifted.

    depths, num_heads: transformer blocks of each group, and heads of their attention
    hidden_dim: width of the MLPs
    upsampler: "pixelshuffle" (classical), "pixelshuffledirect" (light), "nearest+conv" (real
        pictures) or "" (denoising, no larger)
    three_convs: whether groups end in three convolutions, as the large model's do
    img_range: of the numbers that the network sees, 1 or 255
    """

    embed_dim: int = 180
    depths: tuple[int, ...] = (6, 6, 6, 6, 6, 6)
    num_heads: tuple[int, ...] = (6, 6, 6, 6, 6, 6)
    hidden_dim: int = 360
    window_size: int = 8
    upscale: int = 4
    upsampler: str = "pixelshuffle"
    num_feat: int = FEATURES
    three_convs: bool = False
    img_range: int = 1

    @property
    def scale(self) -> int:
        """How many times larger both sides become."""
        return self.upscale

    @property
    def multiple(self) -> int:
        """Both sides are whole windows."""
        return self.window_size

    @property
    def factors(self) -> tuple[int, ...]:
        """By what the sides grow, convolution by convolution: doubled, or times three at once."""
        if self.upscale == 3:
            return (3,)
        return (2,) * (self.upscale.bit_length() - 1)

    def tensor_shapes(self) -> dict[str, Shape]:
        """Return the shape of every tensor, by the name in the authors' SwinIR."""
        return dict(_swinir(self))

    def activations(self, part: str, sizes: Sizes) -> int:
        """Estimate the most numbers alive at once: in an attention, or at the end."""
        keys = self.window_size**2
        attention = max(6 * self.embed_dim + 2 * h * keys for h in self.num_heads)
        mlp = 2 * self.embed_dim + 2 * self.hidden_dim
        end = 3 * self.num_feat * self.upscale**2
        return max(attention, mlp, end) * sizes.pixels


def _conv(name: str, inputs: int, outputs: int, side: int = 3) -> Tensors:
    return weight(name, outputs, inputs, side, side)


def _esrgan(config: ESRGANConfig) -> Tensors:
    width = config.num_feat
    yield from _conv("conv_first", COLOURS * config.unshuffle**2, width)
    for i in range(config.num_block):
        for block in (1, 2, 3):
            yield from _dense_block(f"body.{i}.rdb{block}", width, config.num_grow_ch, config.plus)
    yield from _conv("conv_body", width, width)
    for i in range(config.doublings):
        yield from _conv(f"conv_up{i + 1}", width, width)
    yield from _conv("conv_hr", width, width)
    yield from _conv("conv_last", width, COLOURS)


def _dense_block(name: str, width: int, growth: int, plus: bool) -> Tensors:
    for i in range(GROWTH_CONVS):
        outputs = width if i == GROWTH_CONVS - 1 else growth
        yield from _conv(f"{name}.conv{i + 1}", width + i * growth, outputs)
    if plus:
        yield from weight(f"{name}.conv1x1", growth, width, 1, 1, bias=False)


def _compact(config: CompactConfig) -> Tensors:
    """Every second layer is a PReLU."""
    width = config.num_feat
    for i in range(config.num_conv + 1):
        yield from _conv(f"body.{2 * i}", width if i else COLOURS, width)
        yield f"body.{2 * i + 1}.weight", (width,)
    yield from _conv(f"body.{2 * config.num_conv + 2}", width, COLOURS * config.upscale**2)


def _swinir(config: SwinIRConfig) -> Tensors:
    width = config.embed_dim
    yield from _conv("conv_first", COLOURS, width)
    yield from weight("patch_embed.norm", width)
    for i, (depth, heads) in enumerate(zip(config.depths, config.num_heads, strict=True)):
        for j in range(depth):
            yield from _swin_block(f"layers.{i}.residual_group.blocks.{j}", config, heads)
        yield from _group_end(f"layers.{i}.conv", config)
    yield from weight("norm", width)
    yield from _group_end("conv_after_body", config)
    yield from _enlarging(config)


def _swin_block(name: str, config: SwinIRConfig, heads: int) -> Tensors:
    width = config.embed_dim
    yield from weight(f"{name}.norm1", width)
    table = (2 * config.window_size - 1) ** 2
    yield f"{name}.attn.relative_position_bias_table", (table, heads)
    yield from weight(f"{name}.attn.qkv", 3 * width, width)
    yield from weight(f"{name}.attn.proj", width, width)
    yield from weight(f"{name}.norm2", width)
    yield from weight(f"{name}.mlp.fc1", config.hidden_dim, width)
    yield from weight(f"{name}.mlp.fc2", width, config.hidden_dim)


def _group_end(name: str, config: SwinIRConfig) -> Tensors:
    width = config.embed_dim
    if not config.three_convs:
        yield from _conv(name, width, width)
        return
    yield from _conv(f"{name}.0", width, width // 4)
    yield from _conv(f"{name}.2", width // 4, width // 4, 1)
    yield from _conv(f"{name}.4", width // 4, width)


def _enlarging(config: SwinIRConfig) -> Iterator[tuple[str, Shape]]:
    width, features = config.embed_dim, config.num_feat
    if config.upsampler == "pixelshuffledirect":
        yield from _conv("upsample.0", width, COLOURS * config.upscale**2)
        return
    if not config.upsampler:
        yield from _conv("conv_last", width, COLOURS)
        return
    yield from _conv("conv_before_upsample.0", width, features)
    for i, factor in enumerate(config.factors):
        if config.upsampler == "pixelshuffle":
            yield from _conv(f"upsample.{2 * i}", features, factor**2 * features)
        else:
            yield from _conv(f"conv_up{i + 1}", features, features)
    if config.upsampler == "nearest+conv":
        yield from _conv("conv_hr", features, features)
    yield from _conv("conv_last", features, COLOURS)
