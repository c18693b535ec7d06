"""One part's weights under the names of its graph, wherever and however the file holds them.

A tensor that is neither used nor listed here as known to be unused, each kind with its reason, is
an error: it would be left out in silence.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from numpy.typing import NDArray

from engine.checkpoints.formats.files import Weights
from engine.configs.base import Config, Shape
from engine.errors import MissingTensorError, ModelError

__all__ = [
    "UNUSED",
    "Component",
    "ComponentName",
    "Source",
    "assemble",
    "diffusers_component",
    "left_over",
    "refuse_left_over",
    "shown",
]

# Where a whole model keeps its text encoders; a folder's part has no such prefix.
_TEXT = (
    r"(cond_stage_model\.(1\.)?(model\.|transformer\.)?|text_encoders\.clip_[lg]\.transformer\."
    r"|conditioner\.embedders\.\d\.(model\.|transformer\.)?)?(text_model\.)?"
)

# pattern of the whole name: reason
UNUSED: Mapping[str, str] = MappingProxyType(
    {
        r"(first_stage_model\.)?model_ema\..+": "averages of weights, of which the better are used",
        r"betas|(sqrt_|log_)?(one_minus_)?alphas_cumprod(_prev)?"
        r"|sqrt_recip(m1)?_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])"
        r"|denoiser\.(log_)?sigmas": "the noise schedule, which a rule gives",
        r"logvar|lvlb_weights|scale_factor|epoch|global_step": "settings of the training",
        r"(first_stage_model\.)?loss\..+": "the discriminator and the losses of the training",
        r"embedding_manager\..+": "words learnt beside the model",
        rf"{_TEXT}(embeddings\.)?position_ids": "the numbers 0, 1, 2 and so on",
        rf"{_TEXT}attn_mask": "the causal mask, which a rule gives",
        rf"{_TEXT}logit_scale": "the temperature of CLIP's comparison with pictures",
        rf"{_TEXT}(vision_model|visual_projection|visual)\..+": "CLIP's half for pictures",
        r"(cond_stage_model\.(transformer\.|model\.)?|conditioner\.embedders\.0\.(transformer\.)?"
        r"|text_encoders\.clip_l\.transformer\.)?(text_model\.)?text_projection(\.weight)?": (
            "the projection into CLIP's space, which is not attended to"
        ),
        r"v_pred|ztsnr": "a mark that says what the model predicts",
        r"(.+\.)?scaled_fp8|.+\.comfy_quant": "a mark that says that weights have scales",
        r".+\.(scale_input|input_scale|output_scale)": "the range of what a layer reads or gives, "
        "for kernels that compute in float8",
    }
)
_PATTERN = re.compile("|".join(f"(?:{pattern})" for pattern in UNUSED))


def left_over(names: Iterable[str], used: set[str], unused: str | None = None) -> list[str]:
    """Return the names that are neither used nor known to be unused.

    unused: one more pattern, of this model alone.
    """
    own = re.compile(unused or r"(?!)")
    return [
        name
        for name in names
        if name not in used and not _PATTERN.fullmatch(name) and not own.fullmatch(name)
    ]


def shown(name: str, length: int = 200) -> str:
    """Write a tensor's name, whatever characters a file puts into it, on one line."""
    return repr(name)[1:-1][:length]


ComponentName = Literal["text_encoder", "text_encoder_2", "unet", "vae", "preview_decoder"]
TEXT_MODEL = "text_model."  # what transformers 5 leaves out of a text encoder's names
# The autoencoder's attention in diffusers since 0.15, and before.
OLD_ATTENTION = (
    (".to_q.", ".query."),
    (".to_k.", ".key."),
    (".to_v.", ".value."),
    (".to_out.0.", ".proj_attn."),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a tensor of a graph comes from: a stored one, a part of its rows, or its transpose.

    third, half: which third or half of the rows it is, None for all
    """

    name: str
    third: int | None = None
    half: int | None = None
    transposed: bool = False

    @property
    def _pieces(self) -> int:
        return 3 if self.third is not None else 1 if self.half is None else 2

    def shape(self, stored: Shape) -> Shape | None:
        """Return the shape of what is taken from a tensor of this shape; None if it cannot be."""
        if self._pieces > 1:
            whole = stored and stored[0] % self._pieces == 0
            return (stored[0] // self._pieces, *stored[1:]) if whole else None
        return stored[::-1] if self.transposed else stored

    def view(self, stored: NDArray[Any], shape: Shape) -> NDArray[Any]:
        """Take what this source means, in the graph's shape; a view wherever numpy can."""
        if self._pieces > 1:
            rows, piece = stored.shape[0] // self._pieces, (self.third or 0) + (self.half or 0)
            stored = stored[piece * rows : (piece + 1) * rows]
        return (stored.T if self.transposed else stored).reshape(shape)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Component(Mapping[str, NDArray[Any]]):
    """A part's tensors under its graph's names and in its graph's shapes, taken on access.

    sources: which stored tensor, or piece of one, each name means
    shapes: what the graph takes; float16, float32 or float64 as stored, bfloat16 as float32
    """

    weights: Weights
    sources: Mapping[str, Source]
    shapes: Mapping[str, Shape]

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Take a tensor; raises KeyError when the graph has none of this name."""
        source = self.sources[name]
        return source.view(self.weights[source.name], self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        """Go through the graph's names, in its order."""
        return iter(self.shapes)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        """Tell whether the graph has a tensor of this name, without touching it."""
        return name in self.shapes

    def __eq__(self, other: object) -> bool:
        """Equal is only itself: a mapping's equality would compare every number."""
        return self is other

    def __hash__(self) -> int:
        """Hash by identity, as `==` compares."""
        return id(self)

    def release(self) -> None:
        """Give back the memory of what was read, of whichever dtype; it is read again."""
        self.weights.release(used_in_place=())

    def used(self) -> set[str]:
        """Return the names of the stored tensors that are taken."""
        return {source.name for source in self.sources.values()}


def assemble(
    path: Path, weights: Weights, config: Config, sources: Mapping[str, Source]
) -> Component:
    """Find every tensor of a part.

    Raises MissingTensorError naming one that is missing, ModelError for one that does not fit.

    sources: of all its tensors, or of the half of an autoencoder that there is
    """
    shapes = {name: shape for name, shape in config.tensor_shapes().items() if name in sources}
    for name, source in sources.items():
        stored = weights.tensors.get(source.name)
        if stored is None:
            names = {s.name for s in sources.values()}
            missing = names - weights.tensors.keys()
            more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
            raise MissingTensorError(
                f"{path} lacks {source.name}{more} of {len(names)}; the file is incomplete or of "
                "an architecture that is not supported: download it or save it again"
            )
        if not fits(source.shape(stored.shape), shapes[name]):
            raise ModelError(
                f"{path}: {source.name} has shape {list(stored.shape)}, and {name}, which is made "
                f"of it, {list(shapes[name])}; the file is damaged or of another architecture"
            )
        if not stored.is_float:
            raise ModelError(
                f"{path}: {source.name} has dtype {stored.dtype}, which is no weight's; take the "
                "model in float32, float16, bfloat16 or float8, or as GGUF"
            )
    return Component(weights=weights, sources=sources, shapes=shapes)


def fits(stored: Shape | None, expected: Shape) -> bool:
    """A convolution of one pixel and a linear layer hold the same numbers."""
    return stored is not None and _matrix(stored) == _matrix(expected)


def _matrix(shape: Shape) -> Shape:
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def refuse_left_over(
    path: Path, names: Iterable[str], used: set[str], unused: str | None = None
) -> None:
    """Raise ModelError when a file holds a tensor that is neither used nor known to be unused.

    unused: a pattern of more names that this model does not use
    """
    if left := left_over(names, used, unused):
        more = f" and {len(left) - 1} more tensors" if len(left) > 1 else ""
        raise ModelError(
            f"{path} holds {shown(left[0])}{more}, for which this architecture has no place; the "
            "model would not do what it was trained for: use a file without it"
        )


def diffusers_component(path: Path, weights: Weights, config: Config) -> Component:
    """Take a part from a folder in diffusers' layout, of whatever version wrote it.

    transformers 5 leaves out `text_model.`, and diffusers before 0.15 had other names for the
    autoencoder's attention. Raises ModelError naming a tensor that is missing, left over or of
    another shape.
    """
    bare = not any(name.startswith(TEXT_MODEL) for name in weights)
    old = any(".attentions.0.query." in name for name in weights)
    sources = {}
    for name in config.tensor_shapes():
        stored = name.removeprefix(TEXT_MODEL) if bare else name
        for ours, theirs in OLD_ATTENTION if old else ():
            stored = stored.replace(ours, theirs)
        sources[name] = Source(name=stored)
    component = assemble(path, weights, config, sources)
    refuse_left_over(path, weights, component.used(), config.unused)
    return component
