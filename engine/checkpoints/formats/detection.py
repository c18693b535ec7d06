"""Which format a file is in, told by its content: people rename files."""

from mmap import mmap
from pathlib import Path

from engine.checkpoints.formats.safetensors import read_header
from engine.checkpoints.formats.tensors import StoredTensor
from engine.checkpoints.formats.torch_archive import read_archive
from engine.errors import ModelError

__all__ = ["read_tensors"]

# Formats that are not read, by their first bytes, and what to do about each.
TORCH_OLD = (
    "is in the format of torch before 1.6; load it with torch and torch.save it again, "
    "or save it as .safetensors"
)
PLAIN_PICKLE = "is a bare pickle, which torch.save did not write; take the model as .safetensors"
PICKLES = tuple(bytes([0x80, version]) for version in range(2, 6))
WEB_PAGE = "is a web page, not a checkpoint; download the file itself"
OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "is a pointer of Git LFS; run `git lfs pull` for the weights"),
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", TORCH_OLD),
    (b"GGUF", "is a GGUF file, which is not read; take the model as .safetensors"),
    (b"\x89HDF\r\n", "is an HDF5 file, of Keras; take the model as .safetensors"),
    (b"\x1f\x8b", "is compressed by gzip; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it first"),
    (b"Rar!", "is a RAR archive; unpack it first"),
    (b"\x93NUMPY", "is a single array of numpy; take the model as .safetensors"),
)


def read_tensors(path: Path, file: mmap) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read where a mapped file's tensors are, in the file's order, and its metadata.

    Raises ModelError when the file is in no format that is read here, or damaged.
    """
    if file[:4] in (b"PK\3\4", b"PK\5\6"):
        return read_archive(path, file)
    _refuse_others(path, file)
    return read_header(path, file)


def _refuse_others(path: Path, file: mmap) -> None:
    """Raise ModelError unless a file is safetensors, or is called so and merely damaged."""
    start = file[:512]
    if start[4:9] == b"\0\0\0\0{":  # a header of less than 4 GB, in JSON
        return
    for signature, what in OTHERS:
        if start.startswith(signature):
            raise ModelError(f"{path} {what}")
    if start[257:262] == b"ustar":
        raise ModelError(f"{path} {TORCH_OLD}")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b'{"error')):
        raise ModelError(f"{path} {WEB_PAGE}")
    if path.suffix == ".safetensors" and not start.startswith(PICKLES):
        return
    if start.startswith(PICKLES):
        raise ModelError(f"{path} {PLAIN_PICKLE}")
    raise ModelError(
        f"{path} is no checkpoint: it begins with the bytes {start[:8].hex(' ')}, and safetensors "
        "or an archive of torch.save is expected; download it again"
    )
