"""What ships with the package: a model, and the graphs of the published architectures."""

from pathlib import Path

MODELS = Path(__file__).parent  # each a folder in diffusers' layout
GRAPHS = MODELS / "graphs"
