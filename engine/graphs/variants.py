"""Variants of a part's graph: the same weights, and something more is computed.

A variant is made from the bytes of the part's graph when it is first asked for, so nothing is
traced, shipped or stored for it, and the plain graph has none of its operations.
"""

from dataclasses import dataclass, replace

from engine.configs.t2i_adapter import adapted_places
from engine.graphs.graph import Graph
from engine.graphs.guidance import GUIDED_INPUTS, PERTURBED_INPUTS, guided, perturbed
from engine.graphs.seamless import made_seamless
from engine.graphs.steering import feature_names
from engine.graphs.t2i_adapter import adapted

__all__ = ["Variant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What a part computes beside what its plain graph does.

    seamless: the axes along which opposite edges of the picture join: "x", "y" or "both"
    perturbed: whether groups of a step may leave the middle's self-attention out
    guided: whether a step takes projected guidance, and what uncond adds to the registers
    adapted: whether the features of T2I-Adapters are added to a step's way down
    """

    seamless: str = ""
    perturbed: bool = False
    guided: bool = False
    adapted: bool = False

    def of(self, graph: Graph) -> Graph:
        """Return a part's plain graph as this variant, in memory; raises GraphError."""
        data, inputs = graph.data(), graph.inputs
        if self.adapted:  # first: its places are told by what reads the weights
            data = adapted(data, graph.weights, graph.precision)
            inputs = (*inputs, *feature_names(len(adapted_places(graph.weights))))
        if self.seamless:
            data = made_seamless(data, self.seamless)
        if self.perturbed:
            data, inputs = perturbed(data), (*inputs, *PERTURBED_INPUTS)
        if self.guided:
            data, inputs = guided(data), (*inputs, *GUIDED_INPUTS)
        return replace(graph, content=data, inputs=inputs)
