"""The held-out match of a setting: does its picture look like the original it was asked for?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import RequestError
from runtime import Pipeline


def read_pictograms(path: Path) -> Any:
    """Read the pairs that `python -m training data` makes; raises RequestError when it has not."""
    if not path.is_file():
        raise RequestError(
            f"there is no data set {path}; make it with `python -m training data --work "
            f"{path.parent}` (it needs the extra 'train'), or leave --match out"
        )
    from training.pictograms import Pictograms

    try:
        return Pictograms.load(path)
    except (KeyError, ValueError, OSError) as error:
        raise RequestError(
            f"{path} holds no pictograms, of which some are held out ({error}); run `python -m "
            "training data` without captions"
        ) from error


def held_out_match(pipeline: Pipeline, options: Mapping[str, Any], data: Any) -> dict[str, float]:
    """Draw every held-out pair as `python -m training evaluate` does; return the shares matched.

    options: of each request, beside the steps and the guidance that the evaluation has
    """
    from training.pictograms import STYLES, caption
    from training.quality import BATCH, GUIDANCE_SCALE, STEPS, TOPS, ranks

    pairs = np.argwhere(data.held_out)
    captions = [caption(data.names[subject], STYLES[style]) for subject, style in pairs]
    given = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE_SCALE, **options}
    drawn = [
        np.asarray(image)
        for start in range(0, len(captions), BATCH)
        for image in pipeline(captions[start : start + BATCH], seed=start, **given).images
    ]
    places = ranks(np.stack(drawn), data.images[pairs[:, 0], pairs[:, 1]])
    shares = {f"top_{k}": round(float((places <= k).mean()), 4) for k in TOPS}
    return {"pictures": len(pairs), **shares}
