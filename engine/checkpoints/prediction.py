"""What a model predicts, for which size and in how many steps: what its weights do not say.

Everything around the weights is asked, the surest first, and every answer comes with its reason
as the end of a sentence, so that a program can say what it took and why.
"""

import json
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from engine.checkpoints.families.base import Family, PredictionType, Variant
from engine.checkpoints.families.variants import EMBEDDED_GUIDANCE
from engine.checkpoints.few_steps import find_variant, name_words
from engine.errors import ModelError

__all__ = ["Evidence", "PredictionType", "TrainingFacts", "conclude"]

Answer = tuple[PredictionType, str]

MAX_CONFIG = 1_000_000  # bytes of a configuration beside the file that are read
SPELLINGS: Mapping[str, PredictionType] = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "noise": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "v_pred": "v_prediction",
    "vpred": "v_prediction",
    "velocity": "v_prediction",
    "sample": "sample",
    "x0": "sample",
}
# Of metadata: the model specification's key and the one that ComfyUI writes.
METADATA_KEYS = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type")
# The specification's names of architectures that imply an answer, as the programs write them.
ARCHITECTURES: Mapping[str, PredictionType] = {
    "stable-diffusion-v2-768-v": "v_prediction",
    "stable-diffusion-v2-512": "epsilon",
}
# A file's name, of whatever family.
V_NAME = re.compile(r"(?<![a-z])v[-_ ]?pred|v[-_ ]?param|768[-_ ]?v(?![a-z0-9])")
EPSILON_NAME = re.compile(r"(?<![a-z])eps(ilon)?(?![a-z])")
# Lines of the training code's YAML. Without the first the training code predicts noise.
PARAMETERIZATION = re.compile(r"""^\s*parameterization\s*:\s*["']?(\w+)""", re.MULTILINE)
SCALING = re.compile(r"denoiser_scaling\.(V|Eps)Scaling\b")
LATENT_DIFFUSION = re.compile(r"^\s*target\s*:\s*ldm\.models\.diffusion\.", re.MULTILINE)
TRUE = ("true", "1", "yes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What there is beside the weights: the file's name and place, metadata and tensors' names."""

    path: Path
    metadata: Mapping[str, str]
    names: Container[str]

    @property
    def stem(self) -> str:
        """The words of the file's name without its suffix, in small letters with "_" between."""
        return "_".join(name_words(self.path.stem))

    def flag(self, key: str) -> bool:
        """Tell whether the metadata say yes."""
        return self.metadata.get(key, "").lower() in TRUE


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFacts:
    """What was concluded.

    variant: of a model distilled to few steps
    scheduler: a `scheduler_config.json`
    sample_size: side of the latents in training
    notes: what was concluded, and why, a sentence each
    """

    variant: Variant | None
    scheduler: Mapping[str, Any]
    sample_size: int
    notes: tuple[str, ...]


def conclude(
    evidence: Evidence,
    family: Family,
    *,
    sees_picture: bool,
    time_condition: bool,
    compression: int,
    asked: str | None,
) -> TrainingFacts:
    """Conclude how a model was trained; raises ModelError when `asked` is no prediction type.

    sees_picture, time_condition: the UNet takes a picture, as for inpainting, or an embedded
        guidance scale
    compression: pixels along one side of the square that a latent stands for
    """
    notes = []
    scheduler, size = dict(family.scheduler), family.sample_size
    few_steps, why = variant(evidence, family, time_condition=time_condition)
    if few_steps:
        scheduler |= few_steps.scheduler
        notes.append(f"it is distilled to few steps ({few_steps.name}), {why}")
    kind, why = prediction_type(
        evidence, family, usual=not sees_picture and few_steps is None, asked=asked
    )
    scheduler["prediction_type"] = kind
    notes.append(f"its prediction type is {kind}, {why}")
    if why := zero_snr(evidence):
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        notes.append(f"its noise schedule ends in pure noise, {why}")
    if family.v_sample_size and kind == "v_prediction":
        size = family.v_sample_size
    if few_steps and few_steps.sample_size:
        size = few_steps.sample_size
    stated, why = resolution(evidence, compression)
    if stated:
        size = stated
        notes.append(f"it was trained on {size * compression} pixels, {why}")
    return TrainingFacts(
        variant=few_steps,
        scheduler=MappingProxyType(scheduler),
        sample_size=size,
        notes=tuple(notes),
    )


def prediction_type(
    evidence: Evidence, family: Family, *, usual: bool, asked: str | None
) -> Answer:
    """Decide what a model predicts; raises ModelError when what is asked for is none.

    usual: the model takes no picture and is not distilled to few steps
    """
    if asked is not None:
        if asked not in get_args(PredictionType):
            raise ModelError(
                f"the prediction type {asked!r} is unknown; "
                f"{', '.join(get_args(PredictionType))} are allowed"
            )
        return SPELLINGS[asked], "as asked for"
    answers = chain(
        _beside(evidence), _metadata(evidence), _tensors(evidence), _name(evidence, family)
    )
    for answer in answers:
        return answer
    if family.prediction_type != "epsilon" and usual:
        reason = "as of most of its family: nothing says so, and the weights cannot"
        return family.prediction_type, reason
    return "epsilon", "as of most of its kind: nothing says otherwise"


def _beside(evidence: Evidence) -> Iterator[Answer]:
    """Read the configuration beside the file: `model.yaml` or `model.json`."""
    for suffix in (".yaml", ".yml", ".json"):
        path = evidence.path.parent / f"{evidence.path.stem}{suffix}"
        if path == evidence.path or not (text := _read(path)):
            continue
        found = _spelt(_json_field(text)) if suffix == ".json" else _yaml(text)
        if found:
            yield found, f"from {path.name} beside the file"


def _read(path: Path) -> str:
    """Read a small file; one that is not there, or cannot be read, says nothing."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_CONFIG).decode("utf-8", "replace")
    except OSError:
        return ""


def _yaml(text: str) -> PredictionType | None:
    if match := PARAMETERIZATION.search(text):
        return _spelt(match[1])
    if match := SCALING.search(text):
        return _spelt(match[1].lower())
    return "epsilon" if LATENT_DIFFUSION.search(text) else None


def _json_field(text: str) -> str:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    found = values.get("prediction_type") if isinstance(values, dict) else None
    return found if isinstance(found, str) else ""


def _spelt(text: str) -> PredictionType | None:
    return SPELLINGS.get(text.strip().lower())


def _metadata(evidence: Evidence) -> Iterator[Answer]:
    for key in METADATA_KEYS:
        if found := _spelt(evidence.metadata.get(key, "")):
            yield found, f"from {key} in the file's metadata"
    for key in ("ss_v_parameterization", "v_pred"):
        if evidence.flag(key):
            yield "v_prediction", f"from {key} in the file's metadata"
    key = "modelspec.architecture"
    if found := ARCHITECTURES.get(evidence.metadata.get(key, "").split("/")[0]):
        yield found, f"from {key} in the file's metadata"


def _tensors(evidence: Evidence) -> Iterator[Answer]:
    if "v_pred" in evidence.names:
        yield "v_prediction", "from the tensor v_pred in the file"


def _name(evidence: Evidence, family: Family) -> Iterator[Answer]:
    reason = "from the file's name"
    if V_NAME.search(evidence.stem):
        yield "v_prediction", reason
    if EPSILON_NAME.search(evidence.stem):
        yield "epsilon", reason
    for pattern, kind in family.prediction_names:
        if pattern.search(evidence.stem):
            yield kind, reason


def zero_snr(evidence: Evidence) -> str:
    """Say why the schedule ends in pure noise (Lin et al. 2023, arXiv:2305.08891); "" if not."""
    if "ztsnr" in evidence.names:
        return "from the tensor ztsnr in the file"
    for key in ("ss_zero_terminal_snr", "ztsnr"):
        if evidence.flag(key):
            return f"from {key} in the file's metadata"
    return ""


def resolution(evidence: Evidence, compression: int) -> tuple[int, str]:
    """Read the side of the latents in training from the metadata, 0 if not there; and where."""
    key = "modelspec.resolution"
    match = re.fullmatch(r"\s*(\d{2,4})(?:\s*x\s*(\d{2,4}))?\s*", evidence.metadata.get(key, ""))
    side = max(int(match[1]), int(match[2] or 0)) if match else 0
    return (0 if side % compression else side // compression), f"from the metadata's {key}"


def variant(
    evidence: Evidence, family: Family, *, time_condition: bool
) -> tuple[Variant | None, str]:
    """Tell whether a model is distilled to few steps, and why."""
    lcm = next((variant for variant in family.variants if variant.name == "lcm"), None)
    if time_condition and lcm:
        reason = "as time_embed.cond_proj says, which is told the guidance scale"
        return replace(lcm, guidance_scale=EMBEDDED_GUIDANCE), reason
    title = evidence.metadata.get("modelspec.title", "")
    for text, reason in (
        (evidence.path.stem, "from the file's name"),
        (title, "from the metadata's modelspec.title"),
    ):
        if found := find_variant(text, family.variants):
            return found, reason
    return None, ""
