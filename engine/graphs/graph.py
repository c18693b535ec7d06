"""Graphs: an architecture without weights, as ONNX, and the signature of each.

A graph's file name says the part, the architecture's key and the precision, so one graph serves
every checkpoint of its architecture. Graphs of known architectures ship with the package,
compressed; `python -m export` traces the others. Those of upscalers, CLIP's image encoders, IP- and
T2I-Adapters are written when one is opened (`engine/graphs/writer.py`).

The inputs and outputs of every graph, their names, dtypes and symbolic shapes, are written once,
here. Symbols: B images, g groups of conditioning (order [uncond, cond]), r registers of a sampler,
C latent channels, h and w the latent's size, n tokens, D the width of the context, P that of the
pooled text, T the sizes that XL is told, e tokens of textual inversion, X channels that an
inpainting UNet sees beside the latent, F channels of the UNet's first level, N residuals of a
ControlNet, h1, w1 and so on the sides of the latent at the UNet's lower levels, H = 8 h and
W = 8 w pixels (or whatever the autoencoder's compression is).
"""

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Self, get_args

from engine.configs.base import Config
from engine.errors import GraphError, OutputError
from engine.graphs.onnx_bytes import input_shapes, metadata, outputs
from engine.graphs.steering import IP_PARTS, STEERED, steering_shapes
from engine.shipped import GRAPHS
from engine.store.cache import cache_folder

Part = Literal[
    "text_encoder",
    "text_encoder_2",
    "step",
    "step_shallow",
    "step_controlled",
    "step_shallow_controlled",
    "step_shrunk",
    "step_ip",
    "step_shallow_ip",
    "step_controlled_ip",
    "step_shallow_controlled_ip",
    "control_hint",
    "control",
    "t2i_adapter",
    "feature_sum",
    "image_encoder",
    "ip_adapter",
    "vae_decoder",
    "vae_encoder",
    "preview_decoder",
    "language_model",
    "upscaler",
    "upsampler",
    "safety_checker",
]
TextPart = Literal["text_encoder", "text_encoder_2"]
Symbol = str | int
Dtype = Literal["float32", "int64", "uint8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A graph's input or output as an app sees it, whatever precision the graph computes in."""

    dtype: Dtype
    shape: tuple[Symbol, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What goes into a graph and what comes out, in the order of its arguments."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


def _tensor(dtype: Dtype, *shape: Symbol) -> Tensor:
    return Tensor(dtype=dtype, shape=shape)


_TEXT_ENCODER = Signature(
    inputs={
        "input_ids": _tensor("int64", "B", "n"),
        # Rows for the ids from vocab_size on: textual inversion changes no weight.
        "extra_embeddings": _tensor("float32", "e", "D"),
    },
    outputs={
        "last_hidden_state": _tensor("float32", "B", "n", "D"),
        "penultimate_hidden_state": _tensor("float32", "B", "n", "D"),
        "pooled": _tensor("float32", "B", "P"),
    },
)
_STEP_INPUTS = {
    "registers": _tensor("float32", "B", "r", "C", "h", "w"),
    "matrices": _tensor("float32", "B", "r", "r + 2"),
    "timestep": _tensor("float32", "B"),
    "input_scale": _tensor("float32", "B"),
    "context": _tensor("float32", "g", "B", "n", "D"),
    # One number for a picture, or a map over the cells of its latents.
    "guidance": _tensor("float32", "g", "B", 1, "h or 1", "w or 1"),
    "guidance_rescale": _tensor("float32", "B"),
    "noise": _tensor("float32", "B", "C", "h", "w"),
    "mask": _tensor("float32", "B", 1, "h", "w"),
    "outside": _tensor("float32", "B", "r + 2"),
}
_NEXT = {"next_registers": _tensor("float32", "B", "r", "C", "h", "w")}
# What enters the last residual block of the UNet: a step gives it, a shallow step begins there.
_DEEP = _tensor("float32", "g", "B", "F", "h", "w")
_STEP = Signature(inputs=_STEP_INPUTS, outputs={**_NEXT, "deep": _DEEP})
_SHALLOW = Signature(inputs={**_STEP_INPUTS, "deep": _DEEP}, outputs=_NEXT)
_DECODER = Signature(
    inputs={"latents": _tensor("float32", "B", "C", "h", "w")},
    outputs={"pixels": _tensor("uint8", "B", "H", "W", 3)},
)
_SQUARES = _tensor("float32", 1, "X", "h", "w")  # of a picture, their pixels as channels
_CONTROL_INPUTS = ("registers", "timestep", "input_scale", "context")  # that a ControlNet sees
SIGNATURES: Mapping[Part, Signature] = MappingProxyType(
    {
        "text_encoder": _TEXT_ENCODER,
        "text_encoder_2": _TEXT_ENCODER,
        "step_shrunk": _STEP,  # whose lower levels see half the width and height (deep shrink)
        # What these and `control` take beside, by level, `signature` adds.
        **dict.fromkeys(("step", "step_controlled", "step_ip", "step_controlled_ip"), _STEP),
        **dict.fromkeys(("step_shallow", "step_shallow_controlled", "step_shallow_ip"), _SHALLOW),
        "step_shallow_controlled_ip": _SHALLOW,
        "control_hint": Signature(
            inputs={"picture": _tensor("float32", "B", 3, "H", "W")},
            outputs={"hint": _tensor("float32", "B", "F", "h", "w")},
        ),
        # Gives the residuals that it is given, and its own, weighed.
        "control": Signature(
            inputs={
                **{name: _STEP_INPUTS[name] for name in _CONTROL_INPUTS},
                "hint": _tensor("float32", "B", "F", "h", "w"),
                "weights": _tensor("float32", "N", "g", "B"),
            },
            outputs={},  # the next residuals
        ),
        **dict.fromkeys(("vae_decoder", "preview_decoder"), _DECODER),
        "vae_encoder": Signature(
            inputs={
                "pixels": _tensor("uint8", "B", "H", "W", 3),
                "noise": _tensor("float32", "B", "C", "h", "w"),
            },
            outputs={"latents": _tensor("float32", "B", "C", "h", "w")},
        ),
        # Keys and values of the p tokens so far go in, those of all p + n come out; logits follow
        # the last token. l layers, a heads of width d, V tokens in the vocabulary.
        "language_model": Signature(
            inputs={
                "input_ids": _tensor("int64", "B", "n"),
                "past": _tensor("float32", "l", 2, "B", "a", "p", "d"),
            },
            outputs={
                "logits": _tensor("float32", "B", "V"),
                "present": _tensor("float32", "l", 2, "B", "a", "p + n", "d"),
            },
        ),
        # Of a picture or a tile of one: RGB of 0 to 1 goes in, and comes out larger, not clamped.
        "upscaler": Signature(
            inputs={"pixels": _tensor("float32", 1, 3, "h", "w")},
            outputs={"upscaled": _tensor("float32", 1, 3, "H", "W")},
        ),
        # What is denoised and the low picture behind it; the timesteps of the noise in both.
        "upsampler": Signature(
            inputs={"sample": _tensor("float32", 1, "X", "h", "w"), "times": _tensor("float32", 2)},
            outputs={"out": _tensor("float32", 1, "C", "h", "w")},
        ),
        # A picture of S pixels a side becomes M tokens of the width E, and a place in CLIP's space.
        "image_encoder": Signature(
            inputs={"pixel_values": _tensor("float32", 1, 3, "S", "S")},
            outputs={
                "penultimate_hidden_state": _tensor("float32", 1, "M", "E"),
                "image_embeds": _tensor("float32", 1, "P"),
            },
        ),
        # What an image encoder gives becomes keys and values for all layers of a UNet.
        "ip_adapter": Signature(
            inputs={"features": _tensor("float32", 1, "n", "E")},
            outputs={name: _tensor("float32", 1, "t", "W") for name in ("keys", "values")},
        ),
        "t2i_adapter": Signature(inputs={"squares": _SQUARES}, outputs={}),
        "feature_sum": Signature(inputs={"weights": _tensor("float32", "N", "g", "B")}, outputs={}),
        "safety_checker": Signature(
            inputs={"pixel_values": _tensor("float32", 1, 3, "S", "S")},
            outputs={"image_embeds": _tensor("float32", 1, "P")},
        ),
    }
)

# What only some architectures take: `Config.extra_inputs` names them.
EXTRA_INPUTS: Mapping[str, Tensor] = MappingProxyType(
    {
        # XL's second conditioning, with `addition_embed_type: text_time`.
        "text_embeds": _tensor("float32", "g", "B", "P"),
        "time_ids": _tensor("float32", "g", "B", "T"),
        # The embedded guidance scale of a distilled model, with `time_cond_proj_dim`.
        "timestep_cond": _tensor("float32", "B", "E"),
        # What an inpainting model sees unscaled: the mask, the masked picture's latents.
        "image_conditioning": _tensor("float32", "B", "X", "h", "w"),
        # What a model that follows instructions edits: its latents, zeros in the first group.
        "edited_image": _tensor("float32", "g", "B", "X", "h", "w"),
    }
)


def signature(part: Part, config: Config) -> Signature:
    """Return what a part of this architecture takes and gives."""
    described = SIGNATURES[part]
    told = config.extra_inputs if "context" in described.inputs else ()
    extra = {name: EXTRA_INPUTS[name] for name in told}
    shapes, made = steering_shapes(part, config) if part in STEERED else ({}, {})
    steering = {name: _tensor("float32", *shape) for name, shape in shapes.items()}
    more = {name: _tensor("float32", *shape) for name, shape in made.items()}
    return Signature(
        inputs={**described.inputs, **extra, **steering}, outputs={**described.outputs, **more}
    )


Precision = Literal["float32", "float16"]
METADATA_KEY = "latentrt"
COMPRESSED = ".gz"


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """An ONNX file and what it says of itself.

    inputs, outputs: their names; graphs of other versions have others
    shapes: of the inputs that the file states; a size that is not fixed is a symbol
    weights: the checkpoint's tensors that it wants, by name, with their shapes
    content: the serialised ModelProto of a graph that was written in memory, which no file holds
    """

    path: Path
    part: Part
    architecture: str
    precision: Precision
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: Mapping[str, tuple[Symbol, ...]]
    weights: Mapping[str, tuple[int, ...]]
    content: bytes | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a graph's description; raises GraphError when the file is none of ours."""
        try:
            data = _read(path)
            described = json.loads(metadata(data)[METADATA_KEY])
            return cls(
                path=path,
                part=described["part"],
                architecture=described["architecture"],
                precision=described["precision"],
                inputs=tuple(described.get("inputs", ())),
                outputs=outputs(data),
                shapes=input_shapes(data),
                weights={name: tuple(shape) for name, shape in described["weights"].items()},
            )
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise GraphError(
                f"{path} is not a graph of this project ({type(error).__name__}: {error}); "
                "make it anew with `python -m export MODEL`"
            ) from error

    def has(self, wanted: Signature) -> bool:
        """Whether its inputs and outputs are these, those inputs that the file states by rank."""
        names = (tuple(wanted.inputs), tuple(wanted.outputs))
        return (self.inputs, self.outputs) == names and all(
            len(shape) == len(wanted.inputs[name].shape)
            for name, shape in self.shapes.items()
            if name in wanted.inputs
        )

    def data(self) -> bytes:
        """Read the serialised ModelProto; raises GraphError."""
        return _read(self.path) if self.content is None else self.content


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == COMPRESSED else data
    except (OSError, EOFError, zlib.error) as error:
        raise GraphError(
            f"{path} cannot be read ({error}); restore the file, or make the graph anew with "
            "`python -m export MODEL`"
        ) from error


def graph_name(part: Part, config: Config, precision: Precision) -> str:
    """Return the file name of a graph; XL's second text encoder is a text encoder like others."""
    kind = "text_encoder" if part == "text_encoder_2" else part
    return f"{kind}-{config.key()}-{precision}.onnx"


def graph_folders(chosen: str | Path | None = None) -> Sequence[Path]:
    """Return where graphs are looked for: the chosen folder, else the cache and the package."""
    if chosen:
        return (Path(chosen),)
    try:
        return (cache_folder() / "graphs", GRAPHS)
    except OutputError:  # there is no home; what ships is enough for most
        return (GRAPHS,)


# What makes the graphs of some parts; {} is what they are of.
MAKES: Mapping[str, str] = MappingProxyType(
    {
        **{part: f"export {{}} --parts {part}" for part in (*IP_PARTS, "step_shrunk")},
        "language_model": "export language-model {}",
        "step_controlled": "export control-net CONTROLNET --model {}",
        "step_shallow_controlled": "export control-net CONTROLNET --model {}",
        **dict.fromkeys(("control_hint", "control"), "export control-net {} --model MODEL"),
    }
)


def find_graph(
    part: Part, config: Config, precision: Precision, folders: Sequence[Path], model: Path
) -> Graph:
    """Find the graph of an architecture; raises GraphError when no folder has it.

    One that another version of this project made is passed over.
    """
    if precision not in get_args(Precision):
        raise GraphError(
            f"the precision {precision!r} is not known; choose {' or '.join(get_args(Precision))}"
        )
    name, wanted = graph_name(part, config, precision), signature(part, config)
    stale = ""
    for path in (folder / f"{name}{suffix}" for folder in folders for suffix in ("", COMPRESSED)):
        if path.is_file():
            graph = Graph.read(path)
            if graph_name(graph.part, config, graph.precision) != name or (
                graph.architecture != config.key()
            ):
                raise GraphError(f"{path} holds another graph than its name says; delete it")
            if graph.has(wanted):
                return graph
            stale = f" ({path.name} there is of another version)"
    command = MAKES.get(part, "export {}").format(model)
    raise GraphError(
        f"no {precision} graph for the {part} of {model} in {' or '.join(map(str, folders))}"
        f"{stale}; make it with `python -m {command} --precision {precision}`"
    )
