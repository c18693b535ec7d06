"""Picture files: reading one to start from, writing results with their settings and mark inside.

The mark says by XMP that a picture was made by a trained model (IPTC's DigitalSourceType,
https://cv.iptc.org/newscodes/digitalsourcetype); docs/marking.md says what that proves.
"""

import io
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from engine.errors import OutputError, RequestError, nearest
from engine.store.cache import check_writable, write_atomically, write_new
from runtime.images.a1111 import PARAMETERS_KEY, format_parameters
from runtime.images.exif import exif_bytes, texts_of

SETTINGS_KEY = "latentrt"  # the PNG text chunk that holds the settings as JSON
WHITE = 255
ORIENTATION, UPRIGHT = 0x0112, 1  # EXIF's tag and its value
SourceType = Literal[
    "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia", "algorithmicallyEnhanced"
]
"""Of a whole picture, of one that keeps a part of another (inpainting and outpainting), and of a
photograph or drawing that was enlarged."""
Sign = Callable[[bytes, str, SourceType], bytes]
"""Takes a picture's file, its format and its source; returns the file with a signature in it."""

SOURCE_KEY, SPACING_KEY = "digital_source_type", "timestep_spacing"  # in an image's `info`
FIRST_CELL = "first_cell"  # of a sheet's settings: those of the picture that it begins with
XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    xmp:CreatorTool="Latentrt {version}"
    Iptc4xmpExt:DigitalSourceType="{source}"/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""
PNG_XMP, JPEG_XMP = "XML:com.adobe.xmp", b"http://ns.adobe.com/xap/1.0/\0"
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def read_image(path: str | Path) -> Image.Image:
    """Read a picture as RGB, turned as its camera says; raises RequestError.

    Transparent parts become white.
    """
    return as_rgb(open_image(path))


def open_image(path: str | Path) -> Image.Image:
    """Read a picture in its own mode, turned as its camera says; raises RequestError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken EXIF
            # A picture that would fill the memory is an error here, not a warning.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                file.load()
                return upright(file)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Warning) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise RequestError(
            f"the image {path} cannot be read ({why}); give a whole PNG, JPEG or WebP file"
        ) from error


def upright(image: Image.Image) -> Image.Image:
    """Turn a picture as its camera says in EXIF; one that says nothing that can be read stays."""
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            turned = image.getexif().get(ORIENTATION, UPRIGHT) != UPRIGHT
            return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # Pillow raises many kinds for broken EXIF
        return image


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to RGB: transparent parts become white, 16 bits become 8.

    Of 32 bits those count that are there: what Pillow makes of 8 bits stays.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):  # convert() would clip at 255
        pixels = np.asarray(image)
        wide = image.mode != "I" or pixels.max(initial=0) > WHITE
        image = Image.fromarray((pixels >> 8 * wide).clip(0, WHITE).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def as_floats(image: Image.Image) -> NDArray[np.float32]:
    """Return an RGB picture as (H, W, 3) float32 of 0 to 1, diffusers' "np"."""
    return np.asarray(image, np.float32) / np.float32(WHITE)


def check_output(path: Path, *, replaces: bool = True) -> None:
    """Refuse a path that no picture could be written to, before any work is done for it.

    replaces: as `write_image` takes it
    Raises OutputError.
    """
    if not path.name:
        raise OutputError(f"the file to write has no name; give one in {', '.join(FORMATS)}")
    if path.suffix.lower() not in FORMATS:
        near = nearest(path.suffix, FORMATS)
        hint = f"did you mean {path.with_suffix(near)}? Give" if near and path.suffix else "give"
        raise OutputError(f"{path} ends in {path.suffix!r}; {hint} a name in {', '.join(FORMATS)}")
    check_writable(path, replaces=replaces)


def write_image(
    image: Image.Image,
    path: str | Path,
    settings: Mapping[str, Any],
    *,
    mark: bool = True,
    sign: Sign | None = None,
    replaces: bool = True,
) -> Path:
    """Write a picture, whole or not at all, with the settings it was made with.

    They are there as JSON and, where they name a prompt and a sampler, as Automatic1111 has them:
    in a PNG's texts, or in EXIF.
    mark: whether the file says that a trained model made the picture
    sign: such as `Credentials.sign`
    replaces: whether it takes the place of a file that is there, or the next free number
    Returns where it is.
    Raises OutputError when it cannot be written; a file that was there then stays as it was.
    """
    path = Path(path)
    check_output(path, replaces=replaces)
    kind = FORMATS[path.suffix.lower()]

    def write(target: BinaryIO) -> None:
        data = encode_image(image, kind, settings, mark=mark)
        target.write(data if sign is None else sign(data, kind, source_type_of(image)))

    if not replaces:
        return write_new(path, write)
    write_atomically(path, write)
    return path


def encode_image(
    image: Image.Image,
    kind: str,
    settings: Mapping[str, Any],
    *,
    mark: bool = True,
    quality: int = 95,
) -> bytes:
    """Return a picture's file, as `write_image` writes it unsigned.

    kind: "PNG", "JPEG" or "WEBP"; quality: 1 to 100, of the latter two
    """
    packet = xmp_packet(source_type_of(image)) if mark else b""
    options: dict[str, Any] = {"quality": quality}
    parameters, ours = _texts(settings, image)
    if kind == "PNG":
        options = {"pnginfo": _chunk(parameters, ours, packet)}
    elif ours:
        options["exif"] = exif_bytes(parameters, ours)
    if kind == "WEBP":
        options["xmp"] = packet
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    data = file.getvalue()
    return _with_segment(data, JPEG_XMP + packet) if kind == "JPEG" and mark else data


def source_type_of(image: Image.Image) -> SourceType:
    """Return what an image is, by IPTC's name: what its pipeline said, or a whole one."""
    return cast(SourceType, image.info.get(SOURCE_KEY, "trainedAlgorithmicMedia"))


def source_type_url(source_type: SourceType) -> str:
    """Return the term of IPTC's vocabulary."""
    return f"http://cv.iptc.org/newscodes/digitalsourcetype/{source_type}"


def xmp_packet(source_type: SourceType) -> bytes:
    """Return the XMP that marks a picture."""
    return XMP.format(version=program_version(), source=source_type_url(source_type)).encode()


def read_source_type(path: str | Path) -> str | None:
    """Return what a picture's XMP says that it is, by IPTC's name; None where it does not say.

    Raises OSError when the file cannot be read.
    """
    return source_type_in(Path(path).read_bytes())


def source_type_in(data: bytes) -> str | None:
    """Return what a picture's file says that it is, as `read_source_type` does."""
    packet = re.search(rb"<x:xmpmeta\b.*?</x:xmpmeta>", data, re.DOTALL)
    found = packet and re.search(rb"/newscodes/digitalsourcetype/(\w{1,80})", packet[0])
    return found[1].decode() if found else None


@cache
def program_version() -> str:
    """Return the version of this program, "unknown" in a checkout that is not installed."""
    from importlib.metadata import PackageNotFoundError, version  # takes 20 ms

    try:
        return version("latentrt")
    except PackageNotFoundError:
        return "unknown"


def read_settings(path: str | Path) -> dict[str, Any] | None:
    """Return the settings that a PNG, JPEG or WebP of ours or of others was made with, or None.

    Raises RequestError when it is no picture.
    """
    return _settings(path, path)


def settings_in(data: bytes) -> dict[str, Any] | None:
    """Return the settings in a picture's file, as `read_settings` does."""
    return _settings(io.BytesIO(data), "it")


def _settings(source: str | Path | io.BytesIO, shown: str | Path) -> dict[str, Any] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken EXIF
            with Image.open(source) as file:
                texts = texts_of(file)
        ours = texts.get(SETTINGS_KEY)
        if ours:
            settings = json.loads(ours)
        else:
            from runtime.images.foreign import parse_foreign  # nobody who draws reads these

            settings = parse_foreign(texts)
    except (OSError, ValueError, SyntaxError, RecursionError) as error:
        why = getattr(error, "strerror", None) or error
        raise RequestError(f"{shown} cannot be read as a picture ({why})") from error
    return settings if isinstance(settings, dict) and settings else None


def is_image(path: Path) -> bool:
    """Tell by its content whether a file is a picture that is read here; raises OSError."""
    with path.open("rb") as file:
        start = file.read(12)
    webp = start.startswith(b"RIFF") and start[8:] == b"WEBP"
    return webp or start.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"))


def _with_segment(data: bytes, content: bytes) -> bytes:
    """Put an application's segment into a JPEG file, behind those that must come first."""
    at = 2
    while data[at : at + 2] == b"\xff\xe0" or data[at + 4 : at + 8] == b"Exif":  # JFIF's, EXIF's
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data[:at] + b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content + data[at:]


def _texts(settings: Mapping[str, Any], image: Image.Image) -> tuple[str, str]:
    """Write settings as Automatic1111 does, if they name a prompt and a sampler, and as JSON."""
    first = settings.get(FIRST_CELL)
    made, parameters = first if isinstance(first, Mapping) else settings, ""
    if {"prompt", "sampler"} <= made.keys():
        sides = {"width": image.width, "height": image.height}
        if made.get("width") and made.get("height"):  # what was drawn, before it was enlarged
            sides = {side: made[side] for side in sides}
        spacing = {SPACING_KEY: image.info.get(SPACING_KEY)}
        with suppress(RequestError):  # another program's sampler, of a picture that is enlarged
            parameters = format_parameters({**made, **sides, **spacing})
    return parameters, json.dumps(settings, ensure_ascii=False) if settings else ""


def _chunk(parameters: str, settings: str, packet: bytes) -> PngImagePlugin.PngInfo:
    chunk = PngImagePlugin.PngInfo()
    if packet:
        chunk.add_itxt(PNG_XMP, packet.decode(), zip=False)
    if settings:
        chunk.add_itxt(SETTINGS_KEY, settings, zip=False)
    if parameters:
        chunk.add_text(PARAMETERS_KEY, parameters)
    return chunk


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of images of one shape, in dB; infinite for equal ones."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return 10 * math.log10(WHITE**2 / error) if error else math.inf
