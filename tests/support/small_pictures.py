"""Small pictures of small models: what tests ask for, and pipelines of diffusers of the same."""

import inspect

import numpy as np
import pytest
from PIL import Image

import engine.engines
from engine.backends.settings import BackendSettings
from engine.model import Model
from tests.support.pictures import drawing
from tests.support.small_models import SIDE, SMALL, trace_graphs

PIXELS, SEED, PROMPT = 8 * SIDE, 3, "a lighthouse at dusk"
SETTINGS = BackendSettings(threads=1, backend="cpu")
FIELDS = {
    "negative_prompt": "blurry",
    "num_inference_steps": 4,
    "guidance_scale": 5.0,
    "height": PIXELS,
    "width": PIXELS,
}
HINT = drawing(PIXELS, PIXELS)
TURNED = HINT.transpose(0)
LEFT = Image.fromarray(np.uint8(255 * (np.indices((PIXELS, PIXELS))[1] < PIXELS // 2)))
# Older protocols of the libraries that are compared with, which are not ours to mend.
DEPRECATIONS = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def write_small(name, place, folder=None):
    """Write a small model into a folder, of its own unless one is given, and trace its graphs.

    Returns the model, its file and the folder of graphs.
    """
    small, graphs = SMALL[name], place / "graphs"
    folder = folder or place / name.replace(" ", "-")
    for each in (folder, graphs):
        each.mkdir(exist_ok=True)
    file = small.write_file(folder)
    trace_graphs(Model.open(file), graphs)
    return small, file, graphs


def draw(pipeline, prompt=PROMPT, **fields):
    """Draw a small picture; a few-step model would choose another sampler by itself."""
    return pipeline(prompt, **{"sampler": "ddim", "seed": SEED, **FIELDS, **fields}).images[0]


def reference_pipeline(kind, small, **parts):
    """Make diffusers' pipeline of a kind, of a small model's parts and these."""
    own = small.reference
    given = {**own.components, "add_watermarker": False, "requires_safety_checker": False, **parts}
    takes = inspect.signature(kind).parameters
    pipeline = kind(**{name: part for name, part in given.items() if name in takes})
    pipeline.scheduler = own.scheduler
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def changes_of_engines(pipeline, monkeypatch):
    """Return a list that grows with every engine that is opened, or given other weights."""
    changes = []
    monkeypatch.setattr(engine.engines, "_open", lambda spec: changes.append(spec))
    engines = pipeline.engines
    for part in (*engines.opened.values(), *engines.opened_variants.values()):
        monkeypatch.setattr(part, "rebind", lambda *given: changes.append(given), raising=False)
    return changes
