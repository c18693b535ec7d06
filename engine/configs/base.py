"""What every part's architecture answers, the tensors of layers, and the fields of a `config.json`.

A part is told apart nowhere by the class of its configuration: whoever plans, binds, sizes or
traces it asks the methods of `Config`.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Self, get_args, get_origin

from engine.configs.cross_attentions import CrossAttention
from engine.errors import ModelError

ADVICE = "use a Stable Diffusion 1.x, 2.x or XL model"
Shape = tuple[int, ...]
Tensors = Iterator[tuple[str, Shape]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is asked for; batch: pictures at once; height, width: in pixels.

    groups: of conditioning, 2 with guidance; registers: of the sampler, and 2 more where a picture
        is kept outside a mask; steps: whose noise is uploaded before
    """

    height: int
    width: int
    batch: int = 1
    groups: int = 2
    tokens: int = 77
    registers: int = 4
    steps: int = 50

    @property
    def pixels(self) -> int:
        """Pixels of all pictures."""
        return self.batch * self.height * self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The architecture of a part: its fields, and what follows from them.

    A class for a part's architecture has `tensor_shapes` and `symbols`, `activations` where devices
    run it, and of the others those whose answer is not the one here.
    """

    def tensor_shapes(self) -> dict[str, Shape]:
        """Return the shape of every tensor that the part needs, by name, in its graph's order."""
        raise NotImplementedError

    def symbols(self) -> dict[str, int]:
        """Return the sizes that the architecture sets, by the symbols of `engine.graphs.graph`."""
        raise NotImplementedError

    def activations(self, part: str, sizes: Sizes) -> int:
        """Estimate the most numbers that are alive at once while a graph of this part runs."""
        raise NotImplementedError

    def tables(self, sizes: Sizes) -> int:
        """Count the numbers of a run that lie on a device beside activations."""
        return 0

    def residual_widths(self) -> list[list[int]]:
        """Return the channels of every map that a ControlNet adds to one, level by level."""
        return []

    @property
    def control_types(self) -> int:
        """Types of pictures that a union of ControlNets tells apart; 0 of what is none."""
        return 0

    def features(self) -> list[tuple[int, int]]:
        """Return the width of every feature that a T2I-Adapter makes, and the level it is for."""
        return []

    def cross_attentions(self) -> tuple[CrossAttention, ...]:
        """Return the layers that an IP-Adapter gives keys and values, in its order."""
        return ()

    @property
    def extra_inputs(self) -> tuple[str, ...]:
        """Names of the inputs that only graphs of some architectures take."""
        return ()

    @property
    def unused(self) -> str | None:
        """A pattern of tensors that a file may hold beside those that are used."""
        return None

    @property
    def overflows_float16(self) -> bool:
        """Whether activations leave float16's range, so that all is computed in float32."""
        return False

    @property
    def compression(self) -> int:
        """Pixels along one side of the square that one latent value stands for; 1 without any."""
        return 1

    @property
    def latent_multiple(self) -> int:
        """A side of the latents that every level halves evenly."""
        return 4

    @property
    def tokens_per_row(self) -> int:
        """Tokens of every row that the part reads; 0 where that is free."""
        return 0

    def __post_init__(self) -> None:
        """Refuse values of a wrong type, and numbers that are too small to count anything."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _fits(value, field.type):
                expected = field.type.__name__ if isinstance(field.type, type) else field.type
                raise ModelError(
                    f"{type(self).__name__}: {field.name} is {value!r}; {expected} is expected: "
                    "check the model's config.json"
                )
            for number in value if isinstance(value, tuple) else (value,):
                if not _large_enough(number, field.default):
                    raise ModelError(
                        f"{type(self).__name__}: {field.name} has {number}; "
                        f"{'no less than' if field.default == 0 else 'more than'} 0 is expected: "
                        "check the model's config.json"
                    )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Take the known fields of a `config.json`; the others do not shape the graph.

        A null stands for a default of nothing (0, False, None) and for no other.
        Raises ModelError when a value is missing, of the wrong type or not implemented.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        taken = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
            if name in fields and (value is not None or fields[name].default not in (0, None))
        }
        try:
            return cls(**taken)
        except TypeError as error:  # a field without a default is missing
            raise ModelError(f"{cls.__name__}: {error}; check the model's config.json") from error

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `folder/config.json`; raises ModelError when it cannot be read."""
        return cls.from_dict(read_json(folder / "config.json"))

    def key(self) -> str:
        """Name this architecture: 12 hexadecimal digits of the SHA-256 of its fields.

        Fields at their defaults are left out, so a new one does not rename every graph.
        """
        stated = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        text = json.dumps(stated, sort_keys=True)
        return hashlib.sha256(f"{type(self).__name__} {text}".encode()).hexdigest()[:12]


def weight(name: str, *shape: int, bias: bool = True) -> Tensors:
    """Yield a layer's weight, and a bias for each of its outputs."""
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def resnet(name: str, inputs: int, outputs: int, time: int = 0) -> Tensors:
    """Yield the tensors of a residual block; time: width of the embedded timestep, 0 for none."""
    yield from weight(f"{name}.norm1", inputs)
    yield from weight(f"{name}.conv1", outputs, inputs, 3, 3)
    if time:
        yield from weight(f"{name}.time_emb_proj", outputs, time)
    yield from weight(f"{name}.norm2", outputs)
    yield from weight(f"{name}.conv2", outputs, outputs, 3, 3)
    if inputs != outputs:
        yield from weight(f"{name}.conv_shortcut", outputs, inputs, 1, 1)


def attention(name: str, width: int, context: int, *, bias: bool = False) -> Tensors:
    """Yield the projections of an attention to states of the width `context`."""
    yield from weight(f"{name}.to_q", width, width, bias=bias)
    yield from weight(f"{name}.to_k", width, context, bias=bias)
    yield from weight(f"{name}.to_v", width, context, bias=bias)
    yield from weight(f"{name}.to_out.0", width, width)


def resnet_activations(inputs: int, outputs: int) -> int:
    """Count the channels alive in a residual block: its input, what a convolution reads, writes."""
    return inputs + max(inputs + outputs, 2 * outputs)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; raises ModelError naming the file when it cannot."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path} does not exist; a model is a folder in diffusers' layout "
            "(text_encoder/, unet/, vae/, tokenizer/, scheduler/, model_index.json)"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable JSON ({error}); restore the file") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds a {type(values).__name__}; a JSON object is expected")
    return values


def require_among(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise ModelError unless the field `name` has one of the implemented values."""
    if value not in allowed:
        raise ModelError(
            f"{name} names {value!r}; supported are {', '.join(map(str, allowed))}: {ADVICE}"
        )


def require_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Raise ModelError unless `value` is a multiple of `divisor`."""
    if value % divisor:
        raise ModelError(
            f"{name} {value} is not a multiple of {divisor_name} {divisor}; "
            "check the model's config.json"
        )


def require_length(name: str, values: object, length: int) -> None:
    """Raise ModelError unless a list has one entry for each of `block_out_channels`."""
    if isinstance(values, tuple | list) and len(values) != length:
        raise ModelError(
            f"{name} has {len(values)} entries and block_out_channels {length}; "
            "they must be equal: check the model's config.json"
        )


def require_fixed(values: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise ModelError when a field that changes the maths has no implemented value."""
    for name, allowed in fixed.items():
        if values.get(name, allowed[0]) not in allowed:
            raise ModelError(
                f"config.json has {name} = {values[name]!r}; supported is {allowed[0]!r}: {ADVICE}"
            )


def _fits(value: object, hint: Any) -> bool:
    """Tell whether a value has an annotated type; True is no integer, NaN no number."""
    if isinstance(hint, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        each = get_args(hint)[0]
        return isinstance(value, tuple) and bool(value) and all(_fits(v, each) for v in value)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    return type(value) is hint


def _large_enough(value: object, default: object) -> bool:
    """Sizes and counts are above 0, or may be 0 where that is the default; shifts are free."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return True
    if default == 0:
        return value >= 0 or isinstance(default, float)
    return value > 0
