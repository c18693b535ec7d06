"""Facts of an IP-Adapter: what makes tokens of an encoded picture, and keys and values of these."""

from dataclasses import dataclass

from engine.configs.base import Config, Shape, Sizes, Tensors, require_among, weight
from engine.configs.image_encoder import ImageEncoderConfig

__all__ = ["FULL", "LINEAR", "RESAMPLER", "IPAdapterConfig"]

LINEAR, FULL, RESAMPLER = KINDS = ("linear", "full", "resampler")
HEAD = 64  # width of a head of the resampler, which no file states


@dataclass(frozen=True, slots=True, kw_only=True)
class IPAdapterConfig(Config):
    """An IP-Adapter (Ye et al. 2023, arXiv:2308.06721, sections 3.2 and 3.3).

    kind: "linear" makes some tokens of the picture's place in CLIP's space, "full" one of each of
        the image encoder's, "resampler" (Plus) as many as it has latents of all of these
    embed_dim: width of what the image encoder gives
    tokens: of a picture; 0 for as many as the image encoder gives
    layer_widths: of the UNet's cross-attentions, in the order of `Config.cross_attentions`
    resampler_dim, resampler_depth, resampler_heads, resampler_ff: of a resampler, else 0
    """

    kind: str
    embed_dim: int
    cross_attention_dim: int
    layer_widths: tuple[int, ...]
    tokens: int = 0
    resampler_dim: int = 0
    resampler_depth: int = 0
    resampler_heads: int = 0
    resampler_ff: int = 0

    def __post_init__(self) -> None:
        """Refuse kinds that there are not."""
        super(IPAdapterConfig, self).__post_init__()
        require_among("kind", self.kind, KINDS)

    @property
    def sees_tokens(self) -> bool:
        """Whether it is given the image encoder's tokens, and not the place in CLIP's space."""
        return self.kind != LINEAR

    def reads(self, encoder: ImageEncoderConfig) -> bool:
        """Tell whether what an image encoder gives has the width that it reads."""
        return self.embed_dim == (
            encoder.hidden_size if self.sees_tokens else encoder.projection_dim
        )

    def tensor_shapes(self) -> dict[str, Shape]:
        """Return the shape of every tensor, by its name in the authors' files."""
        return dict(self._tensors())

    def symbols(self) -> dict[str, int]:
        """Return the widths of what goes in and comes out."""
        return {"E": self.embed_dim, "W": sum(self.layer_widths)}

    def activations(self, part: str, sizes: Sizes) -> int:
        """Estimate the most numbers alive at once: keys and values."""
        return 2 * max(self.tokens, 257) * sum(self.layer_widths)

    def _tensors(self) -> Tensors:
        name, width = "image_proj", self.cross_attention_dim
        if self.kind == LINEAR:
            yield from weight(f"{name}.proj", self.tokens * width, self.embed_dim)
            yield from weight(f"{name}.norm", width)
        elif self.kind == FULL:
            yield from weight(f"{name}.proj.0", self.embed_dim, self.embed_dim)
            yield from weight(f"{name}.proj.2", width, self.embed_dim)
            yield from weight(f"{name}.proj.3", width)
        else:
            yield from self._resampler(name)
        for i, layer in enumerate(self.layer_widths):
            for projection in ("to_k_ip", "to_v_ip"):
                key = f"ip_adapter.{2 * i + 1}.{projection}"  # even numbers are self-attentions
                yield from weight(key, layer, width, bias=False)

    def _resampler(self, name: str) -> Tensors:
        dim, inner = self.resampler_dim, HEAD * self.resampler_heads
        yield f"{name}.latents", (1, self.tokens, dim)
        yield from weight(f"{name}.proj_in", dim, self.embed_dim)
        for i in range(self.resampler_depth):
            attention, feed_forward = f"{name}.layers.{i}.0", f"{name}.layers.{i}.1"
            yield from weight(f"{attention}.norm1", dim)
            yield from weight(f"{attention}.norm2", dim)
            for projection in ("to_q", "to_k", "to_v"):
                yield from weight(f"{attention}.{projection}", inner, dim, bias=False)
            yield from weight(f"{attention}.to_out", dim, inner, bias=False)
            yield from weight(f"{feed_forward}.0", dim)
            yield from weight(f"{feed_forward}.1", self.resampler_ff, dim, bias=False)
            yield from weight(f"{feed_forward}.3", dim, self.resampler_ff, bias=False)
        yield from weight(f"{name}.proj_out", self.cross_attention_dim, dim)
        yield from weight(f"{name}.norm_out", self.cross_attention_dim)
