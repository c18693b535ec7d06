"""What ships with the package: a model, a control of it, graphs of published architectures."""

from pathlib import Path

MODELS = Path(__file__).parent  # each a folder in diffusers' layout
GRAPHS = MODELS / "graphs"
CONTROLS = MODELS / "controls"  # files in safetensors


def shipped_controls() -> dict[str, Path]:
    """Return the files of the controls that ship, by their names."""
    return {path.stem: path for path in sorted(CONTROLS.glob("*.safetensors"))}


def find_control(control: Path) -> Path:
    """Return a control's file or folder, given its path or the name of one that ships."""
    return control if control.exists() else shipped_controls().get(str(control), control)
