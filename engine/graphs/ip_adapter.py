"""The graph of an IP-Adapter: an encoded picture becomes the keys and values of a UNet's layers."""

from engine.configs.ip_adapter import FULL, HEAD, LINEAR, IPAdapterConfig
from engine.graphs.graph import Graph, Precision
from engine.graphs.writer import GraphWriter

__all__ = ["ip_adapter_graph"]

NAME = "image_proj"


def ip_adapter_graph(config: IPAdapterConfig, precision: Precision) -> Graph:
    """Write the graph: features (1, n, E) -> keys and values (1, t, W), the layers' in a row."""
    writer = GraphWriter("ip_adapter", config, precision)
    x = writer.given("features")
    if config.kind == LINEAR:
        x = writer.linear(x, f"{NAME}.proj")
        shape = writer.whole(1, config.tokens, config.cross_attention_dim)
        tokens = writer.layer_norm(writer.op("Reshape", x, shape), f"{NAME}.norm")
    elif config.kind == FULL:
        x = writer.op("Gelu", writer.linear(x, f"{NAME}.proj.0"))
        tokens = writer.layer_norm(writer.linear(x, f"{NAME}.proj.2"), f"{NAME}.proj.3")
    else:
        tokens = _resampled(writer, config, x)
    for name, projection in (("keys", "to_k_ip"), ("values", "to_v_ip")):
        layers = [
            writer.linear(tokens, f"ip_adapter.{2 * i + 1}.{projection}", bias=False)
            for i in range(len(config.layer_widths))
        ]
        writer.give(name, writer.op("Concat", *layers, axis=-1))
    return writer.graph()


def _resampled(writer: GraphWriter, config: IPAdapterConfig, x: str) -> str:
    """Let latents attend to the picture's tokens and themselves (arXiv:2204.14198, section 2.1)."""
    x = writer.linear(x, f"{NAME}.proj_in")
    latents = writer.weight(f"{NAME}.latents")
    for i in range(config.resampler_depth):
        attention, feed_forward = f"{NAME}.layers.{i}.0", f"{NAME}.layers.{i}.1"
        latents = writer.op("Add", _attention(writer, config, x, latents, attention), latents)
        y = writer.layer_norm(latents, f"{feed_forward}.0")
        y = writer.op("Gelu", writer.linear(y, f"{feed_forward}.1", bias=False))
        latents = writer.op("Add", writer.linear(y, f"{feed_forward}.3", bias=False), latents)
    return writer.layer_norm(writer.linear(latents, f"{NAME}.proj_out"), f"{NAME}.norm_out")


def _attention(
    writer: GraphWriter, config: IPAdapterConfig, x: str, latents: str, name: str
) -> str:
    seen = writer.layer_norm(x, f"{name}.norm1")
    own = writer.layer_norm(latents, f"{name}.norm2")
    both = writer.op("Concat", seen, own, axis=1)
    heads = writer.whole(1, -1, config.resampler_heads, HEAD)

    def parted(value: str, layer: str, perm: list[int]) -> str:
        projected = writer.linear(value, f"{name}.{layer}", bias=False)
        return writer.op("Transpose", writer.op("Reshape", projected, heads), perm=perm)

    q, k = parted(own, "to_q", [0, 2, 1, 3]), parted(both, "to_k", [0, 2, 3, 1])
    scores = writer.op("MatMul", writer.op("Mul", q, writer.numbers(HEAD**-0.5)), k)
    shares = writer.op("Softmax", scores, axis=-1)
    found = writer.op("MatMul", shares, parted(both, "to_v", [0, 2, 1, 3]))
    joined = writer.op("Transpose", found, perm=[0, 2, 1, 3])
    whole = writer.whole(1, config.tokens, HEAD * config.resampler_heads)
    return writer.linear(writer.op("Reshape", joined, whole), f"{name}.to_out", bias=False)
