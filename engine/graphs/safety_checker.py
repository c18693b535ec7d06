"""The graph of a safety checker: CLIP's half for pictures (arXiv:2103.00020)."""

from engine.configs.safety_checker import SafetyCheckerConfig
from engine.graphs.graph import Graph, Precision
from engine.graphs.image_encoder import write_image_encoder
from engine.graphs.writer import GraphWriter

__all__ = ["safety_checker_graph"]


def safety_checker_graph(config: SafetyCheckerConfig, precision: Precision) -> Graph:
    """Write the graph: pixel_values (1, 3, S, S) float32 -> image_embeds (1, P) float32."""
    writer = GraphWriter("safety_checker", config, precision)
    write_image_encoder(writer, config)
    return writer.graph()
