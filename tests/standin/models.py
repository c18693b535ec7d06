"""Which parts are run on the stand-in, and at which sizes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from engine.checkpoints.families.sd import CLIP_L, OPEN_CLIP_H, SD1, SD2
from engine.checkpoints.families.xl import OPEN_CLIP_G, XL, XL_SCALING_FACTOR
from engine.configs.base import Config
from engine.configs.control_net import control_net_of
from engine.configs.diffusion import AutoencoderConfig
from engine.devices.device import Shape
from engine.graphs.graph import Graph, Part, find_graph, graph_folders
from engine.graphs.onnx_bytes import input_shapes
from engine.graphs.steering import MAX_LEVELS
from engine.model import Model, find_model

COMPRESSION = 8  # pixels of a ControlNet's picture for one of the latents
PARTS: tuple[Part, ...] = ("text_encoder", "step", "step_shallow", "vae_decoder")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, at a size; side: of its latents; tokens: of its texts."""

    configs: Mapping[Part, Config]
    side: int
    tokens: int = 77

    def shapes(self, graph: Graph, *, pictures: int = 1, registers: int = 3) -> dict[str, Shape]:
        """Return the shapes of a graph's inputs, guided by two texts."""
        texts = pictures * (2 if graph.part == "text_encoder" else 1)
        sizes = {"B": texts, "g": 2, "n": self.tokens, "e": 0, "r": registers}
        sizes |= {"r + 2": registers + 2, "h": self.side, "w": self.side, "h or 1": 1, "w or 1": 1}
        sizes |= {f"{s}{n}": self.side // 2**n for s in "hw" for n in range(1, MAX_LEVELS)}
        sizes |= dict.fromkeys("HW", COMPRESSION * self.side)
        return {
            name: tuple(symbol if isinstance(symbol, int) else sizes[symbol] for symbol in stated)
            for name, stated in input_shapes(graph.data()).items()
        }

    def graphs(self) -> Iterator[tuple[str, Graph]]:
        """Yield the parts' graphs, float16, by their names."""
        for part, config in self.configs.items():
            yield (
                part,
                find_graph(part, config, "float16", graph_folders(), find_model("pictogram")),
            )


def cases() -> dict[str, Case]:
    """Return all models by name."""
    pictogram = Model.open(find_model("pictogram"))
    net = control_net_of(SD1)
    decoder, wide = AutoencoderConfig(), AutoencoderConfig(scaling_factor=XL_SCALING_FACTOR)
    steps = {
        name: {"step": c, "step_shallow": c} for name, c in (("1", SD1), ("2", SD2), ("xl", XL))
    }
    return {
        "pictogram": Case(
            configs={part: pictogram.config(part) for part in PARTS}, side=16, tokens=32
        ),
        "sd15": Case(
            configs={"text_encoder": CLIP_L, **steps["1"], "vae_decoder": decoder}, side=64
        ),
        "sd15-control": Case(
            configs={
                "control_hint": net,
                "control": net,
                "step_controlled": SD1,
                "step_shallow_controlled": SD1,
            },
            side=64,
        ),
        "sd21": Case(
            configs={"text_encoder": OPEN_CLIP_H, **steps["2"], "vae_decoder": decoder}, side=96
        ),
        "xl": Case(
            configs={
                "text_encoder": CLIP_L,
                "text_encoder_2": OPEN_CLIP_G,
                **steps["xl"],
                "vae_decoder": wide,
            },
            side=128,
        ),
    }
