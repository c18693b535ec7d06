"""The graph of CLIP's half for pictures: vision transformer and projection (arXiv:2103.00020)."""

import numpy as np

from engine.configs.image_encoder import ImageEncoderConfig
from engine.graphs.graph import Graph, Precision
from engine.graphs.writer import GraphWriter

__all__ = ["image_encoder_graph", "write_image_encoder"]

QUICK_GELU = 1.702


def image_encoder_graph(config: ImageEncoderConfig, precision: Precision) -> Graph:
    """Write the graph: pixel_values (1, 3, S, S) -> penultimate states (1, M, E), embeds (1, P)."""
    writer = GraphWriter("image_encoder", config, precision)
    write_image_encoder(writer, config, penultimate="penultimate_hidden_state")
    return writer.graph()


def write_image_encoder(
    writer: GraphWriter, config: ImageEncoderConfig, penultimate: str | None = None
) -> None:
    """Write what makes image_embeds of pixel_values.

    penultimate: the output that the states before the last layer are; None for none
    """
    width, places, vision = config.hidden_size, config.tokens - 1, config.VISION
    embeddings = f"{vision}.embeddings"
    x = writer.given("pixel_values")
    x = writer.conv(x, f"{embeddings}.patch_embedding", bias=False, stride=config.patch_size)
    x = writer.op(
        "Transpose", writer.op("Reshape", x, writer.whole(1, width, places)), perm=[0, 2, 1]
    )
    own = writer.weight(f"{embeddings}.class_embedding")
    x = writer.op("Concat", writer.op("Reshape", own, writer.whole(1, 1, width)), x, axis=1)
    x = writer.op("Add", x, writer.weight(f"{embeddings}.position_embedding.weight"))
    x = writer.layer_norm(x, f"{vision}.pre_layrnorm", config.layer_norm_eps)
    for i in range(config.num_hidden_layers):
        if penultimate and i == config.num_hidden_layers - 1:
            writer.give(penultimate, writer.op("Identity", x))
        x = _layer(writer, config, x, f"{vision}.encoder.layers.{i}")
    pooled = writer.op("Gather", x, writer.array(np.array(0)), axis=1)
    pooled = writer.layer_norm(pooled, f"{vision}.post_layernorm", config.layer_norm_eps)
    writer.give("image_embeds", writer.linear(pooled, "visual_projection", bias=False))


def _layer(writer: GraphWriter, config: ImageEncoderConfig, x: str, name: str) -> str:
    y = writer.layer_norm(x, f"{name}.layer_norm1", config.layer_norm_eps)
    x = writer.op("Add", x, _attention(writer, config, y, f"{name}.self_attn"))
    y = writer.layer_norm(x, f"{name}.layer_norm2", config.layer_norm_eps)
    y = _activated(writer, config, writer.linear(y, f"{name}.mlp.fc1"))
    return writer.op("Add", x, writer.linear(y, f"{name}.mlp.fc2"))


def _attention(writer: GraphWriter, config: ImageEncoderConfig, x: str, name: str) -> str:
    head = config.hidden_size // config.num_attention_heads
    heads = writer.whole(1, config.tokens, config.num_attention_heads, head)

    def parted(layer: str, perm: list[int]) -> str:
        return writer.op(
            "Transpose", writer.op("Reshape", writer.linear(x, f"{name}.{layer}"), heads), perm=perm
        )

    q, k = parted("q_proj", [0, 2, 1, 3]), parted("k_proj", [0, 2, 3, 1])
    scores = writer.op("MatMul", writer.op("Mul", q, writer.numbers(head**-0.5)), k)
    found = writer.op(
        "MatMul", writer.op("Softmax", scores, axis=-1), parted("v_proj", [0, 2, 1, 3])
    )
    joined = writer.op("Transpose", found, perm=[0, 2, 1, 3])
    whole = writer.whole(1, config.tokens, config.hidden_size)
    return writer.linear(writer.op("Reshape", joined, whole), f"{name}.out_proj")


def _activated(writer: GraphWriter, config: ImageEncoderConfig, x: str) -> str:
    if config.hidden_act == "gelu":
        return writer.op("Gelu", x)
    gate = writer.op("Sigmoid", writer.op("Mul", x, writer.numbers(QUICK_GELU)))
    return writer.op("Mul", x, gate)
