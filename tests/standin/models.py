"""Which parts are run on the stand-in, and at which sizes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from engine.checkpoints.families.sd import CLIP_L, EDITING_CHANNELS, OPEN_CLIP_H, SD1, SD2
from engine.checkpoints.families.xl import OPEN_CLIP_G, XL, XL_SCALING_FACTOR
from engine.configs.base import Config, Sizes
from engine.configs.control_net import control_net_of
from engine.configs.diffusion import AutoencoderConfig
from engine.configs.t2i_adapter import T2IAdapterConfig, feature_sum_of
from engine.devices.device import Shape
from engine.graphs.graph import Graph, Part, Precision, find_graph, graph_folders
from engine.graphs.onnx_bytes import input_shapes
from engine.graphs.steering import MAX_LEVELS
from engine.graphs.t2i_adapter import feature_sum_graph, t2i_adapter_graph
from engine.graphs.variants import Variant
from engine.model import Model, find_model

COMPRESSION = 8  # pixels of a ControlNet's picture for one of the latents
PARTS: tuple[Part, ...] = ("text_encoder", "step", "step_shallow", "vae_decoder")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, at a size; side: of its latents; tokens: of its texts.

    precision: of its graphs; variants: by name, of which part, and what it computes beside
    written: parts by name whose graphs are written when one is opened
    """

    configs: Mapping[Part, Config]
    side: int
    tokens: int = 77
    precision: Precision = "float16"
    variants: Mapping[str, tuple[Part, Variant]] = field(default_factory=dict)
    written: Mapping[str, tuple[Config, Graph]] = field(default_factory=dict)

    def shapes(self, graph: Graph, *, pictures: int = 1, registers: int = 3) -> dict[str, Shape]:
        """Return the shapes of a graph's inputs, guided by two texts."""
        texts = pictures * (2 if graph.part == "text_encoder" else 1)
        sizes = {"B": texts, "g": 2, "n": self.tokens, "e": 0, "r": registers}
        sizes |= {"r + 1": registers + 1, "r + 2": registers + 2, "h or 1": 1, "w or 1": 1}
        sizes |= dict.fromkeys("hw", self.side)
        sizes |= {f"{s}{n}": self.side // 2**n for s in "hw" for n in range(1, MAX_LEVELS)}
        sizes |= dict.fromkeys("HW", COMPRESSION * self.side)
        sizes |= {"k": 2, "t": 4}
        if graph.part == "t2i_adapter":  # it sees one picture
            sizes["h"] *= pictures
        return {
            name: tuple(symbol if isinstance(symbol, int) else sizes[symbol] for symbol in stated)
            for name, stated in input_shapes(graph.data()).items()
        }

    def sizes(self, pictures: int = 1) -> Sizes:
        """Return the same sizes as the estimate of memory takes them."""
        side = COMPRESSION * self.side
        return Sizes(height=side, width=side, batch=pictures, tokens=self.tokens, registers=3)

    def graphs(self) -> Iterator[tuple[str, Config, Graph]]:
        """Yield the parts' names, architectures and graphs; of a case with variants these alone."""
        for part, config in () if self.variants else self.configs.items():
            yield part, config, self.graph(part)
        for name, (part, variant) in self.variants.items():
            yield name, self.configs[part], variant.of(self.graph(part))
        for name, (config, graph) in self.written.items():
            yield name, config, graph

    def graph(self, part: Part) -> Graph:
        """Find a part's graph."""
        folders, model = graph_folders(), find_model("pictogram")
        return find_graph(part, self.configs[part], self.precision, folders, model)


def cases() -> dict[str, Case]:
    """Return all models by name."""
    pictogram = Model.open(find_model("pictogram"))
    net, adapter = control_net_of(SD1), T2IAdapterConfig(channels=(320, 640, 1280, 1280))
    decoder, wide = AutoencoderConfig(), AutoencoderConfig(scaling_factor=XL_SCALING_FACTOR)
    steps = {
        name: {"step": c, "step_shallow": c} for name, c in (("1", SD1), ("2", SD2), ("xl", XL))
    }
    return {
        "pictogram": Case(
            configs={part: pictogram.config(part) for part in PARTS}, side=16, tokens=32
        ),
        "pictogram-float32": Case(
            configs={part: pictogram.config(part) for part in ("step", "step_shrunk")},
            side=16,
            tokens=32,
            precision="float32",
        ),
        "sd15": Case(
            configs={
                "text_encoder": CLIP_L,
                **steps["1"],
                "vae_decoder": decoder,
                "vae_encoder": decoder,
            },
            side=64,
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
        "sd15-variants": Case(
            configs={"step": SD1, "step_shallow": SD1, "vae_decoder": decoder},
            side=64,
            variants={
                "step seamless": ("step", Variant(seamless="both")),
                "step perturbed": ("step", Variant(perturbed=True)),
                "step guided": ("step", Variant(guided=True)),
                "step_shallow guided": ("step_shallow", Variant(guided=True)),
                "vae_decoder seamless": ("vae_decoder", Variant(seamless="both")),
                "step adapted": ("step", Variant(adapted=True)),
            },
            written={
                "t2i_adapter": (adapter, t2i_adapter_graph(adapter, "float16")),
                "feature_sum": (
                    feature_sum_of(adapter),
                    feature_sum_graph(feature_sum_of(adapter)),
                ),
            },
        ),
        "sd15-float32": Case(
            configs=dict.fromkeys(
                ("step_ip", "step_shallow_ip", "step_controlled_ip", "step_shrunk"), SD1
            ),
            side=64,
            precision="float32",
        ),
        "sd15-editing": Case(
            configs={"step": replace(SD1, in_channels=EDITING_CHANNELS)},
            side=64,
            precision="float32",
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
