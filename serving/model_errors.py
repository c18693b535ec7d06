"""What is said of models and adapters that cannot be drawn with: names of requests, and no paths.

A ModelError's own text names files of this machine, so it stands in the log alone.
"""

from collections.abc import Sequence

from engine.errors import RequestError
from serving.errors import EngineFailedError, UnavailableError


def misfit(model: str, loras: Sequence[str]) -> RequestError:
    """Return the error for adapters of a request that a model cannot be given."""
    return RequestError(
        f"loras: {' or '.join(loras)} does not fit the model {model}; leave it out, give it a "
        "smaller weight, or take a model that it was trained for"
    )


def control_misfit(model: str, nets: Sequence[str]) -> RequestError:
    """Return the error for controls of a request whose nets were made for another family."""
    return RequestError(
        f"controls: {' or '.join(nets)} does not fit the model {model}; leave it out, or take a "
        "model of the family that it was trained for"
    )


def ip_adapter_misfit(model: str, adapters: Sequence[str]) -> RequestError:
    """Return the error for image prompts of a request whose IP-Adapters are of another family."""
    return RequestError(
        f"image_prompts: {' or '.join(adapters)} does not fit the model {model}; leave it out, or "
        "take a model of the family that it was trained for"
    )


def unavailable(name: str, why: str) -> UnavailableError:
    """Return the error for a model, or an adapter's file, that the operator must look after."""
    return UnavailableError(
        f"{name} {why}; the operator must look after it", code="model_unavailable"
    )


def not_finite(model: str) -> EngineFailedError:
    """Return the error for a picture whose latents are no numbers."""
    return EngineFailedError(
        f"the model {model} gave no numbers (NaN) for this request; another prompt, sampler or "
        "guidance_scale may help, or --precision float32 where the server is started",
        code="not_finite",
    )
