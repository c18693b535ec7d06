"""What a builder is asked for, as values of JSON: which part of which model, for which sizes."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from engine.backends.tensorrt.library import LIBRARIES, check_target
from engine.backends.tensorrt.profiles import Profile
from engine.errors import BackendError
from engine.graphs.graph import Part

TERMINATION_GRACE_S = 3.0  # that a cancelled builder has to stop by itself
LEVELS = range(6)
PIECES = ("vae", "preview_decoder", "unet", "text_encoder", "text_encoder_2")
PATHS = ("graph", "model", *PIECES, "timings")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSettings:
    """Choices of a build.

    profiles: the sizes it serves; with several, the one that fits a request is used
    refit: whether weights may be changed later, by adapters or another checkpoint; TensorRT-RTX
        builds such an engine only beside a GPU
    optimization_level: 0 builds soonest, 5 runs fastest; None leaves it to the library
    workspace_bytes: GPU memory that one layer may take beside its tensors; None sets no limit
    target: the GPU, "sm89"; None is the one at hand with TensorRT, and with TensorRT-RTX every
        GPU from Ampere on but Hopper
    """

    profiles: tuple[Profile, ...]
    refit: bool = False
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    target: str | None = None

    def __post_init__(self) -> None:
        """Refuse what no builder takes."""
        if not self.profiles:
            raise BackendError("an engine needs one shape profile or more; give a height and width")
        if self.optimization_level not in (None, *LEVELS):
            raise BackendError(
                f"optimization_level is {self.optimization_level!r}; give a number from 0, which "
                "builds soonest, to 5, which runs fastest"
            )
        if self.workspace_bytes is not None and (
            type(self.workspace_bytes) is not int or self.workspace_bytes < 1
        ):
            raise BackendError(
                f"workspace_bytes is {self.workspace_bytes!r}; give a number of bytes from 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """One engine to be built: which part of which model, from which graph, and how.

    library: "tensorrt" or "tensorrt_rtx"
    model, prediction_type, vae, unet and so on: as `engine.model.Model.open` takes them
    loras: adapters to build in, as `engine.adapters.parse_adapter` reads them
    timings: a file of kernels' times to read and add to, for the library that keeps them
    """

    library: str
    part: Part
    graph: Path
    model: Path
    settings: BuildSettings
    vae: Path | None = None
    preview_decoder: Path | None = None
    unet: Path | None = None
    text_encoder: Path | None = None
    text_encoder_2: Path | None = None
    prediction_type: str | None = None
    loras: tuple[str, ...] = ()
    timings: Path | None = None

    def __post_init__(self) -> None:
        """Refuse unknown libraries, and targets that they do not build for."""
        if self.library not in LIBRARIES:
            raise BackendError(
                f"the library {self.library!r} is not known; choose {' or '.join(LIBRARIES)}"
            )
        if self.settings.target is not None:
            check_target(self.library, self.settings.target)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON's values, from which `from_dict` makes the same request."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        settings = {
            field.name: getattr(self.settings, field.name) for field in fields(BuildSettings)
        }
        settings["profiles"] = [profile.to_dict() for profile in self.settings.profiles]
        paths = {name: values[name] and str(values[name]) for name in PATHS}
        return {**values, **paths, "loras": list(self.loras), "settings": settings}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` returned."""
        profiles = tuple(map(Profile.from_dict, values["settings"]["profiles"]))
        settings = BuildSettings(**{**values["settings"], "profiles": profiles})
        paths = {name: values[name] and Path(values[name]) for name in PATHS}
        return cls(**{**values, **paths, "loras": tuple(values["loras"]), "settings": settings})
