"""Controls: pictures that steer the drawing, each by a ControlNet or a T2I-Adapter.

Three modes, as in Automatic1111's sd-webui-controlnet: "balanced"; "prompt", where the residuals
count less the farther they are from the middle; "control", which does the same and leaves what
guidance moves away from without control, so that guidance strengthens it.
"""

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import RequestError
from runtime.checks import check_choice, check_image, check_number
from runtime.images.files import as_rgb, upright

if TYPE_CHECKING:
    from runtime.preprocessors.named import Preprocessor

__all__ = [
    "MODES",
    "NONE",
    "Control",
    "StepControl",
    "check_course",
    "checked_controls",
    "control_fields",
    "course",
    "parse_control",
    "parse_weighed",
    "points_of",
    "written",
]

NONE = "none"  # as a preprocessor
BALANCED, PROMPT, CONTROL = MODES = ("balanced", "prompt", "control")
MAX_WEIGHT = 10
MAX_CONTROLS = 16
DECAY = 0.825  # from each residual to the one before it, the middle's counting whole
# Of a T2I-Adapter's features in the same modes; more have the last.
FEATURE_COUNTS = (0.25, 0.62, 0.825, 1.0)
_NUMBER = r"(?:\d+\.?\d*|\.\d+)"
_TEXT = re.compile(
    rf"(?P<name>.+?)(?::(?P<weight>{_NUMBER}(?:,{_NUMBER})*)"
    rf"(?:@(?P<start>{_NUMBER}):(?P<end>{_NUMBER}))?)?",
    re.ASCII | re.DOTALL,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Control:
    """A picture, and the net that sees it. Raises RequestError when it is made wrongly.

    net: the ControlNet's or T2I-Adapter's name in the pipeline
    image: what the net was trained to see: edges, depth, a pose; it is brought to the size of what
        is drawn. Where it is transparent the net sees -1, which an inpainting ControlNet fills.
    weight: how much what it adds counts, 1 as trained; several numbers are a curve over the run
    start, end: the part of the run in which it steers, at the calls that lie whole in it, as
        diffusers' `control_guidance_start` and `control_guidance_end`
    mode: "balanced", "prompt" or "control": what is more important
    type: what the picture is, for a union of ControlNets, which sees several types: "openpose",
        "depth" and so on (`engine.configs.control_net_union`), or a number as text; None where the
        preprocessor tells, and for other nets
    preprocessor: makes what the net sees of the picture, at the size of what is drawn: a name as
        "canny" or "canny:low=50", an ONNX file, or what `runtime.preprocessors.named` makes; "none"
        takes the picture as it is, and so does None, unless the net's file names one
    """

    net: str
    image: Image.Image
    weight: float | Sequence[float] = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: str = BALANCED
    type: str | None = None
    preprocessor: "str | Preprocessor | None" = None
    _made: "Preprocessor | None" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what no net could do."""
        if not isinstance(self.net, str) or not self.net:
            raise RequestError(f"a control's net is {self.net!r}; give a ControlNet's name")
        check_image("a control's image", self.image)
        object.__setattr__(self, "image", upright(self.image))
        check_course("a control", "weight", self.weights, self.start, self.end)
        check_choice("a control's mode", self.mode, MODES)
        if self.type is not None:
            self._check_type(self.type)
        if isinstance(self.preprocessor, str):
            self._find_preprocessor(self.preprocessor)
        elif self.preprocessor is not None and not callable(self.preprocessor):
            raise RequestError(
                f"a control's preprocessor is {self.preprocessor!r}; give a name, such as 'canny', "
                "or what makes a hint of pixels"
            )
        else:
            object.__setattr__(self, "_made", self.preprocessor)

    def _find_preprocessor(self, text: str) -> None:
        from runtime.preprocessors.choice import find_preprocessor  # no plain prompt needs them

        object.__setattr__(self, "_made", None if text == NONE else find_preprocessor(text))

    @staticmethod
    def _check_type(name: str) -> None:
        from engine.configs.control_net_union import listed_types, type_place  # nor these

        if not isinstance(name, str) or type_place(name) is None:
            raise RequestError(f"a control's type is {name!r:.60}; choose one of {listed_types()}")

    def or_else(self, preprocessor: str | None) -> "Control":
        """Return the control with the preprocessor that its net's file names, where it has none."""
        if self.preprocessor is not None or preprocessor is None:
            return self
        from runtime.preprocessors.named import PREPROCESSORS  # no plain prompt needs them

        return replace(self, preprocessor=preprocessor) if preprocessor in PREPROCESSORS else self

    def shown(self, image: Image.Image) -> Image.Image:
        """Return what the net sees of its picture, which lies over what is drawn.

        Raises RequestError or BackendError where the preprocessor cannot make it.
        """
        if self._made is None:
            return image
        return Image.fromarray(self._made(np.asarray(as_rgb(image))))

    @property
    def weights(self) -> tuple[float, ...]:
        """The points of the curve that the weight is."""
        return points_of(self.weight)

    @property
    def text(self) -> str:
        """The control as the command line writes it: NET:WEIGHT@START:END."""
        return written(self.net, self.weights, self.start, self.end)

    @property
    def preprocessor_text(self) -> str:
        """The preprocessor as the command line writes it; of one that has no name its type's."""
        if isinstance(self.preprocessor, str):
            return self.preprocessor
        return NONE if self.preprocessor is None else type(self.preprocessor).__name__

    def over(self, calls: int) -> NDArray[np.float64]:
        """Return its weight at each call of a run: (calls,) float64."""
        return course(self.weights, self.start, self.end, calls)

    def by_map(
        self, counts: NDArray[np.float64], groups: int, prompts: int, *, pooled: bool = False
    ) -> NDArray[np.float64]:
        """Return how much each map counts in each group of guidance: (maps, groups).

        counts: (maps,), of the maps where the prompt or the control is more important
        prompts: groups that guidance moves to, which are the last
        pooled: whether the net's residuals count in the mean, which steers those groups alone
        """
        if self.mode == BALANCED:
            counts = np.ones_like(counts)
        counts = np.repeat(counts[:, None], groups, axis=1)
        if self.mode == CONTROL or pooled:
            counts[:, : groups - prompts] = 0
        return counts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepControl:
    """How one of a run's controls steers a call.

    net: the net's name; place: of the control in the run
    weights: (N, g, 1) float32, how much each residual or feature counts in each group of guidance
    """

    net: str
    place: int
    weights: NDArray[np.float32]


def control_fields(
    controls: Sequence[Control],
    adapters: Mapping[str, int],
    residuals: int,
    conditioning: Sequence[Mapping[str, NDArray[np.float32]]],
    prompts: int,
    pooled: Container[str] = (),
) -> dict[str, Any]:
    """Return the fields of a run's plan that say what steers it; one that never counts is left out.

    adapters: how many features each T2I-Adapter makes, by name; residuals: of a ControlNet
    conditioning: of each call, guidance (g, B, ...) and perturbed (g, B): the last `prompts` groups
        are texts that guidance moves to, and before them are perturbed ones
    pooled: names of ControlNets whose residuals count in the mean
    """
    over = [(control, control.over(len(conditioning))) for control in controls]
    over = [(control, scale) for control, scale in over if scale.any()]
    decay = DECAY ** np.arange(residuals - 1, -1, -1.0)
    calls = []
    for number, call in enumerate(conditioning):
        groups, steering = len(call["guidance"]), []
        seen = prompts + int(call["perturbed"][:, 0].sum() if "perturbed" in call else 0)
        for place, (control, scale) in enumerate(over):
            if not scale[number]:
                continue
            counts = decay
            if control.net in adapters:
                more = max(adapters[control.net] - len(FEATURE_COUNTS), 0)
                counts = np.array((*FEATURE_COUNTS, *[1.0] * more)[: adapters[control.net]])
            moved = min(seen, groups)
            counts = control.by_map(counts, groups, moved, pooled=control.net in pooled)
            weights = (scale[number] * counts)[..., None].astype(np.float32)
            steering.append(StepControl(net=control.net, place=place, weights=weights))
        calls.append(steering)
    return {
        "controls": [control for control, _ in over],
        "control_calls": calls if over else (),
        "is_controlled": any(control.net not in adapters for control, _ in over),
    }


def points_of(weight: float | Sequence[float]) -> tuple[float, ...]:
    """Return the points of the curve that a weight is: one, or those that came."""
    several = isinstance(weight, Sequence) and not isinstance(weight, str) and len(weight)
    return tuple(weight) if several else (weight,)  # type: ignore[return-value, arg-type]


def check_course(what: str, name: str, points: Sequence[float], start: float, end: float) -> None:
    """Refuse what is no curve over a part of a run; raises RequestError.

    what: is weighed, as "a control"; name: of its weight
    """
    for point in points:
        check_number(f"{what}'s {name}", point, Real, 0, MAX_WEIGHT)
    check_number(f"{what}'s start", start, Real, 0, 1)
    check_number(f"{what}'s end", end, Real, 0, 1)
    if start > end:
        raise RequestError(
            f"{what} starts at {start} and ends at {end}; it must not end before it starts"
        )


def course(points: Sequence[float], start: float, end: float, calls: int) -> NDArray[np.float64]:
    """Return a curve at each call of a run, (calls,), 0 at those that lie not whole in a part."""
    places = np.linspace(0, len(points) - 1, calls)
    weights = np.interp(places, np.arange(len(points)), np.asarray(points, np.float64))
    call = np.arange(calls)
    steers = (call / calls >= start) & ((call + 1) / calls <= end)
    return np.where(steers, weights, 0.0)


def written(name: str, points: Sequence[float], start: float, end: float) -> str:
    """Write NAME:WEIGHT@START:END, as `parse_weighed` reads it."""
    weights = ",".join(f"{point:g}" for point in points)
    return f"{name}:{weights}@{start:g}:{end:g}"


def parse_weighed(text: str) -> tuple[str, tuple[float, ...], float, float] | None:
    """Read NAME, NAME:WEIGHT or NAME:WEIGHT@START:END: name, weights, start, end; None if neither.

    Colons in NAME are its own unless such numbers follow.
    """
    match = _TEXT.fullmatch(text)
    if match is None or not match["name"].strip() or "\0" in text:
        return None
    weights = tuple(float(number) for number in (match["weight"] or "1").split(","))
    return match["name"], weights, float(match["start"] or 0), float(match["end"] or 1)


def parse_control(text: str) -> tuple[str, tuple[float, ...], float, float]:
    """Read NET, NET:WEIGHT or NET:WEIGHT@START:END as `parse_weighed` does. RequestError."""
    found = parse_weighed(text)
    if found is None:
        raise RequestError(
            f"{text[:200]!r} names no ControlNet; give FILE or FILE:WEIGHT@START:END"
        )
    return found


def checked_controls(controls: object) -> tuple[Control, ...]:
    """Return a request's controls; raises RequestError for what are none."""
    if isinstance(controls, Control):
        return (controls,)
    if not isinstance(controls, Sequence) or isinstance(controls, str):
        raise RequestError(f"controls came as {type(controls).__name__}; give a list of Control")
    for control in controls:
        if not isinstance(control, Control):
            raise RequestError(
                f"controls hold a {type(control).__name__}; give Control(net=..., image=...)"
            )
    if len(controls) > MAX_CONTROLS:
        raise RequestError(f"controls are {len(controls)}; give {MAX_CONTROLS} at most")
    return tuple(controls)
