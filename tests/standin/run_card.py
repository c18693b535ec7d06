"""Run the sections of `python -m benchmarks card` dry on the stand-in; prints them as JSON.

LD_LIBRARY_PATH=STANDIN LATENTRT_CUDA_LOG=FILE python run_card.py
"""

import json
import sys

from benchmarks.card import Card, measure
from benchmarks.contenders import load_pipeline
from benchmarks.scenarios import Scenario
from engine.backends.settings import BackendSettings
from runtime import Pipeline
from tests.standin.run_pictures import on_the_stand_in

SECTIONS = ("parts", "pictures", "request", "batches", "sizes", "settings", "sanitizer", "webgpu")
PRECISIONS = {"cuda": "float16", "cpu": "float32"}


def load(scenario: Scenario, precision: str, settings: BackendSettings) -> Pipeline:
    """Load the model that ships as a card would be given it."""
    return load_pipeline(scenario, PRECISIONS[settings.backend or "cpu"], settings)


def main() -> None:
    """Print what the sections found that need no torch."""
    on_the_stand_in()
    card = Card(backend="cuda", dry=True, load=load)
    report = measure(card, only=SECTIONS, show=lambda line: print(line, file=sys.stderr))
    print(json.dumps(report["sections"]))


if __name__ == "__main__":
    main()
