"""What an engine's process is told before its first order."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from engine.backends.settings import ComputePrecision
from serving.limits import Limits
from serving.model_files import Files
from serving.row_limits import ROWS, Aim

FIRST = "is_first"  # in the frame of the settings: whether no engine was ready before
FAILED = 3  # exit status: a model cannot be loaded, which another try would not change


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What an engine's process draws with; all of it can be written as JSON.

    models, loras, controls, ip_adapters, upscalers: paths, or names of models that ship, by the
        names that requests use; image_encoders: folders, by the names of the IP-Adapters
    card: number of an NVIDIA GPU, None for what the backend takes by itself
    files: what tells models' and adapters' files from others, by their paths
    rows: in a step, as `serving.row_limits.RowLimits` takes them
    model_bytes: of weights that stay loaded, None for any number
    c2pa_cert, c2pa_key: files that sign pictures, or None; watermark: that all pictures hold
    """

    models: Mapping[str, str]
    loras: Mapping[str, str] = field(default_factory=dict)
    controls: Mapping[str, str] = field(default_factory=dict)
    ip_adapters: Mapping[str, str] = field(default_factory=dict)
    image_encoders: Mapping[str, str] = field(default_factory=dict)
    upscalers: Mapping[str, str] = field(default_factory=dict)
    backend: str | None = None
    device: str | None = None
    card: int | None = None
    precision: ComputePrecision | None = None
    threads: int | None = None
    build_missing: bool = False
    graphs: str | None = None
    files: Mapping[str, Files] = field(default_factory=dict)
    wildcard_dir: str | None = None
    rows: int | Aim = ROWS
    model_bytes: int | None = None
    c2pa_cert: str | None = None
    c2pa_key: str | None = None
    watermark: str | None = None
    limits: Limits = field(default_factory=Limits)

    def as_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Self:
        """Return the settings that were written."""
        return cls(**{**given, "limits": Limits(**given["limits"])})
