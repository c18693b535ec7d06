"""Files of the operator's that requests name: models, adapters, nets and upscalers.

They are looked at as the server begins, so that one that is none is said then and left out.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.checkpoints.image_encoder import IMAGE_ENCODER, open_image_encoder
from engine.checkpoints.ip_adapter import open_ip_adapter
from engine.checkpoints.upscaler import open_upscaler
from engine.configs.image_encoder import ImageEncoderConfig
from engine.errors import ModelError, RequestError
from engine.model import find_model, shipped_models
from engine.store.cache import is_readable_folder
from runtime.images.upscaling import UPSCALERS
from serving.names import NAME, check_names

__all__ = [
    "find_adapters",
    "find_controls",
    "find_folder",
    "find_ip_adapters",
    "find_models",
    "find_upscalers",
]

ADAPTERS = ".safetensors"
CONTROL_NETS = (ADAPTERS, ".pth", ".pt", ".ckpt", ".bin")
IP_ADAPTERS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
UPSCALER_FILES = (".pth", ".safetensors", ".pt")
NOTED = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")


def listed(option: str, folder: Path) -> Iterator[Path]:
    """Yield what a folder holds that requests can name; says what is left out.

    What a link leads to outside of the folder is left out. Raises RequestError.
    """
    if not is_readable_folder(folder):
        raise RequestError(f"{option} {folder} is no folder that can be read")
    inside = folder.resolve()
    for path in sorted(folder.iterdir()):
        name = path.stem if path.is_file() else path.name
        if NAME.fullmatch(name) and path.resolve().parent == inside:
            yield path
        elif path.suffix.lower() in NOTED:
            why = "it lies elsewhere" if NAME.fullmatch(name) else "requests cannot name it"
            _leave_out(path, why)


def find_ip_adapters(
    folders: Sequence[Path], encoders: Sequence[Path]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the IP-Adapters of folders by their names, and the image encoder of each.

    encoders: folders of image encoders; an adapter sees pictures through the first of them, or of
        `image_encoder/` in the folders, that gives what it reads
    Raises RequestError for a folder that is none or an encoder that is none.
    """
    known = _encoders(folders, encoders)
    adapters, seeing = dict[str, str](), dict[str, str]()
    for folder in folders:
        for path in listed("--ip-adapter-dir", folder):
            if path.suffix.lower() not in IP_ADAPTERS or path.stem in adapters:
                continue
            try:
                config, _ = open_ip_adapter(path)
            except ModelError as error:
                _leave_out(path, str(error))
                continue
            fitting = (place for place, encoder in known if config.reads(encoder))
            encoder = next(fitting, None)
            if encoder is None:
                _leave_out(
                    path,
                    f"no image encoder gives the width {config.embed_dim} that it reads; name one "
                    "with --image-encoder",
                )
                continue
            adapters[path.stem], seeing[path.stem] = str(path.resolve()), str(encoder.resolve())
    return adapters, seeing


def _encoders(
    folders: Sequence[Path], encoders: Sequence[Path]
) -> list[tuple[Path, ImageEncoderConfig]]:
    beside = (folder / IMAGE_ENCODER for folder in folders)
    found = list[tuple[Path, ImageEncoderConfig]]()
    for path in (*encoders, *(path for path in beside if path.is_dir())):
        try:
            config, _ = open_image_encoder(path)
        except ModelError as error:
            raise RequestError(f"--image-encoder: {error}") from error
        found.append((path, config))
    return found


def find_upscalers(folder: Path | None) -> dict[str, str]:
    """Return the upscalers of a folder by their names. Raises RequestError."""
    upscalers: dict[str, str] = {}
    for path in [] if folder is None else listed("--upscaler-dir", folder):
        if path.suffix.lower() not in UPSCALER_FILES or path.stem in upscalers:
            continue
        if path.stem.lower() in (*UPSCALERS, "none"):
            _leave_out(path, f"{path.stem} is a way to enlarge without it")
            continue
        try:
            open_upscaler(path)
        except ModelError as error:
            _leave_out(path, str(error))
            continue
        upscalers[path.stem] = str(path.resolve())
    return upscalers


def _leave_out(path: Path, why: str) -> None:
    print(f"note: {path} is left out ({why})", file=sys.stderr)


def find_folder(option: str, folder: Path | None) -> str | None:
    """Return a folder's whole path, None for none. Raises RequestError where it is no folder."""
    if folder is not None and not folder.is_dir():
        raise RequestError(f"{option} {folder} is no folder")
    return None if folder is None else str(folder.resolve())


def find_models(given: Sequence[str]) -> dict[str, str]:
    """Return models' paths by their names. Raises RequestError or ModelError."""
    models: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals and name not in shipped_models():
            raise RequestError(
                f"--model {text} has no name; write NAME={text}, by which requests will know it"
            )
        check_names([name])
        if name in models:
            raise RequestError(f"two models are called {name}; give one another name")
        models[name] = str(find_model(path).resolve()) if equals else name
    return models


def find_adapters(folder: Path) -> dict[str, str]:
    """Return the adapters of a folder by their names; says which files are none.

    What a link leads to outside of the folder is left out. Raises RequestError.
    """
    return {
        path.stem: str(path.resolve())
        for path in listed("--lora-dir", folder)
        if path.suffix.lower() == ADAPTERS
    }


def find_controls(given: Sequence[str], folder: Path | None) -> dict[str, str]:
    """Return ControlNets' paths by their names, those of `--control` before a folder's.

    Raises RequestError.
    """
    controls: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals:
            raise RequestError(
                f"--control {text} has no name; write NAME={text}, by which requests will know it"
            )
        check_names([name])
        if name in controls:
            raise RequestError(f"two ControlNets are called {name}; give one another name")
        if not Path(path).exists():
            raise RequestError(f"--control {text}: {path} does not exist; give a file or a folder")
        controls[name] = str(Path(path).resolve())
    for found in [] if folder is None else listed("--control-dir", folder):
        if (found / "config.json").is_file() or found.suffix.lower() in CONTROL_NETS:
            name = found.stem if found.is_file() else found.name
            controls.setdefault(name, str(found.resolve()))
    return controls
