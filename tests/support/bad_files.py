"""A corpus of files that are no models, each with what the error must say.

`python -m tests.support.bad_files FOLDER` writes it. A file is refused at one of three stages:
"opening" it, using its "values", which are not finite, or taking it for a model: it is "foreign".
"""

import json
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.numpy

from tests.support import bad_archives, bad_numbers, bad_pickles, bad_pictures
from tests.support.bad_archives import archive
from tests.support.bad_gguf import gguf_files
from tests.support.bad_legacy import legacy_files
from tests.support.bad_pickles import state_dict, storage, tensor

Stage = Literal["opening", "values", "foreign"]
Contents = Mapping[str, bytes]  # of a folder's files


@dataclass(frozen=True, slots=True, kw_only=True)
class BadFile:
    """A file, or a folder of several, and what the message about it must match.

    path: what is to be opened: a file, an index or a folder
    message: a regular expression; of foreign files the next stage's own
    """

    name: str
    path: Path
    message: str
    stage: Stage


def bad_files(folder: Path) -> list[BadFile]:
    """Write the corpus; what the hostile pickles would do is to make folder / "canary"."""
    made = []
    for stage, suffix, files in (
        ("opening", ".safetensors", safetensors_files()),
        ("opening", ".bin", other_formats()),
        ("opening", ".ckpt", archives(folder / "canary")),
        ("opening", ".gguf", gguf_files()),
        ("opening", ".pt", legacy_files(folder / "canary")),
        ("opening", ".png", bad_pictures.pictures()),
        ("opening", ".safetensors", bad_numbers.scaled()),
        ("values", "", not_finite()),
        ("foreign", ".safetensors", foreign()),
        ("opening", "", folders()),
    ):
        for name, contents, message in files:
            path = folder / f"{len(made):03}{suffix}"
            if isinstance(contents, bytes):
                path.write_bytes(contents)
            else:
                path.mkdir()
                for file, content in contents.items():
                    (path / file).write_bytes(content)
            made.append(BadFile(name=name, path=path, message=message, stage=stage))
    return made


def encode(header: object, data: bytes = b"") -> bytes:
    """Lay out a file of safetensors, whatever its header holds."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(content).to_bytes(8, "little") + content + data


def entry(dtype: str = "U8", shape: tuple[int, ...] = (1,), at: tuple[int, ...] = (0, 1)) -> object:
    """Describe a tensor in a header; by default of one byte."""
    return {"dtype": dtype, "shape": shape, "data_offsets": at}


def safetensors_files() -> Iterator[tuple[str, bytes, str]]:
    """Cut a good file at each boundary, and let headers lie."""
    good = encode({"a": entry("F32", (2,), (0, 8)), "b": entry(at=(8, 9))}, bytes(9))
    header = len(good) - 9
    yield "empty", b"", "it is empty"
    for at in (1, 7, 8, 9, header // 2, header - 1):
        yield f"cut at {at}", good[:at], "its first 8 bytes state a header of"
    for at in (header, header + 5, header + 8):
        yield f"cut at {at}", good[:at], "ends at byte"
    yield "a byte too many", good + b"\0", "its tensors end at byte"
    yield "a header of 2**64 bytes", b"\xff" * 8 + b"{}", "state a header of 18446744073709551615"
    yield "a header of 0 bytes", bytes(8) + b"{}", "no valid JSON"
    yield "no JSON", encode(b"{'a': 1}"), "no valid JSON"
    yield "no UTF-8", encode(b'{"\xff": 1}'), "no valid JSON"
    yield "a deep header", encode(b'{"a":' * 100_000), "no valid JSON"
    yield "a name twice", encode(b'{"a": 1, "a": 2}'), "'a' is there twice"
    yield "a name of half a character", encode({"\ud800": entry()}, b"1"), "no valid Unicode"
    yield "numbers as metadata", encode({"__metadata__": {"step": 1}}), "__metadata__"
    for dtype in ("float32", "", "F8", "f16"):
        yield f"dtype {dtype!r}", encode({"a": entry(dtype)}, b"1"), "supported are BOOL, U8"
    for dtype, what in (("C64", "complex"), ("F4", "of 4 bits"), ("F6_E2M3", "of 6 bits")):
        yield f"dtype {dtype!r}", encode({"a": entry(dtype)}, b"1"), f"dtype {dtype}, .*{what}"
    for what, wrong, expected in (
        ("an overlap", (0, 1), "overlaps"),
        ("a hole", (2, 3), "follows a hole"),
        ("reversed offsets", (1, 0), "data_offsets"),
        ("an end of 2**63", (1, 2**63 - 1), "ends at byte"),
        ("an offset below 0", (-1, 0), "data_offsets"),
        ("one offset", (0,), "data_offsets"),
    ):
        yield what, encode({"a": entry(), "b": entry(at=wrong)}, b"123"), expected
    for shape in ((2**63,), (-1, -1), (2**62, 4, 1), (2,), (0,), (1,) * 33):
        yield f"shape {str(shape)[:30]}", encode({"a": entry(shape=shape)}, b"1"), "'a'"
    yield "no shape", encode({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"1"), "'a' lacks its"


def other_formats() -> Iterator[tuple[str, bytes, str]]:
    """Give what downloads and conversions leave in place of a checkpoint."""
    yield "an empty download", b"", "it is empty"
    yield "an allocated download", bytes(5000), "begins with the bytes 00 00"
    yield "a web page", b"<!DOCTYPE html><html><title>Log in</title>", "is a web page"
    yield "an answer", b'{"error": "Invalid credentials"}', "is a web page"
    yield "a pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"
    yield "a bare pickle", b"\x80\x04}.", "is a bare pickle"
    yield "a pickle of code", next(bad_pickles.running("canary"))[1], "is a bare pickle"
    yield "a tar archive", b"\0" * 257 + b"ustar" + b"\0" * 250, "format of torch before 0.2"
    yield "HDF5", b"\x89HDF\r\n\x1a\n", "is an HDF5 file"
    yield "gzip", b"\x1f\x8b\x08\0", "is compressed by gzip"
    yield "7z", b"7z\xbc\xaf\x27\x1c", "is a 7z archive"
    yield "RAR", b"Rar!\x1a\x07\x01\0", "is a RAR archive"
    yield "numpy", b"\x93NUMPY\1\0", "single array of numpy"
    yield "an ONNX graph", b"\x08\x08\x12\x07pytorch", "begins with the bytes 08 08"


def archives(canary: Path) -> Iterator[tuple[str, bytes, str]]:
    """Put the bad pickles into good archives, and add the archives that are bad themselves."""
    for name, pickled, message in bad_pickles.running(str(canary)):
        yield f"code: {name}", archive(pickled), message
    for name, (pickled, message) in (bad_pickles.REFUSED | bad_pickles.GROWING).items():
        yield name, archive(pickled), message
    yield from bad_archives.cut()
    yield from bad_archives.pickles_cut()
    yield from bad_archives.lying()
    yield from bad_archives.bombs()
    yield from bad_archives.tensors()
    yield from bad_archives.calls()


def not_finite() -> Iterator[tuple[str, Contents, str]]:
    """Give weights of every floating type with one value that is no number."""
    message = r"'weight' holds values that are not finite"
    for dtype, value in (("<f2", np.inf), ("<f4", np.nan), ("<f8", -np.inf)):
        array = np.zeros(1000, dtype)
        array[-1] = value
        content = safetensors.numpy.save({"weight": array})
        yield f"{value} of {dtype}", {"model.safetensors": content}, message
    data = struct.pack("<2H", 0x3F80, 0x7FC0)
    content = encode({"weight": entry("BF16", (2,), (0, 4))}, data)
    yield "NaN of bfloat16", {"model.safetensors": content}, message
    pickled = b"\x80\x02" + bad_pickles.dictionary(weight=tensor(storage(), 2, (2,), (1,))) + b"."
    nan = {"data/0": struct.pack("<4f", 0, 0, 0, np.nan)}
    yield "NaN in an archive", {"pytorch_model.bin": archive(pickled, **nan)}, message


FOREIGN: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "nothing": {},
    "an MNIST classifier": {
        "conv1.weight": (8, 1, 3, 3),
        "conv1.bias": (8,),
        "fc.weight": (10, 128),
        "fc.bias": (10,),
    },
    "GPT-2": {
        "wte.weight": (50, 8),
        "wpe.weight": (16, 8),
        "h.0.attn.c_attn.weight": (8, 24),
        "h.0.mlp.c_fc.weight": (8, 32),
        "ln_f.weight": (8,),
    },
    "Llama": {
        "model.embed_tokens.weight": (50, 8),
        "model.layers.0.self_attn.q_proj.weight": (8, 8),
        "lm_head.weight": (50, 8),
    },
    "T5": {
        "shared.weight": (50, 8),
        "encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8),
    },
    "a LoRA of kohya": {
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 8),
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": (8, 4),
        "lora_unet_mid_block_attentions_0_proj_in.alpha": (),
    },
    "a LoRA of diffusers": {
        "unet.mid_block.attentions.0.proj_in.lora_A.weight": (4, 8),
        "unet.mid_block.attentions.0.proj_in.lora_B.weight": (8, 4),
    },
    "a textual inversion": {"emb_params": (2, 768)},
    "FLUX": {
        "double_blocks.0.img_attn.qkv.weight": (24, 8),
        "single_blocks.0.linear1.weight": (24, 8),
        "img_in.weight": (8, 64),
    },
    "SD 3": {
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (24, 8),
        "model.diffusion_model.x_embedder.proj.weight": (8, 16, 2, 2),
    },
    "a ControlNet": {
        "control_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "control_model.zero_convs.0.0.weight": (320, 320, 1, 1),
    },
    "an upscaler": {"conv_first.weight": (64, 3, 3, 3), "body.0.rdb1.conv1.weight": (32, 64, 3, 3)},
    "a vision transformer": {
        "embeddings.cls_token": (1, 1, 8),
        "encoder.layer.0.attention.attention.query.weight": (8, 8),
    },
    "half a UNet": {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.time_embed.0.weight": (1280, 320),
    },
    "an optimizer": {"state.0.exp_avg": (8, 8), "state.0.exp_avg_sq": (8, 8), "state.0.step": ()},
}


def foreign() -> Iterator[tuple[str, bytes, str]]:
    """Give files that open well, and hold no model that is known here."""
    for name, shapes in FOREIGN.items():
        arrays = {key: np.zeros(shape, np.float16) for key, shape in shapes.items()}
        yield name, safetensors.numpy.save(arrays), ""


def folders() -> Iterator[tuple[str, Contents, str]]:
    """Give folders whose index names what is not there, not theirs, or not what it says."""
    good = encode({"a": entry()}, b"1")
    shard = "model-00001-of-00002.safetensors"
    for name, index, message in (
        ("a missing shard", {"a": shard, "b": "model-00002-of-00002.safetensors"}, "is missing"),
        ("a shard above", {"a": "../000.safetensors"}, "which is no file beside it"),
        ("a shard at the root", {"a": "/etc/passwd"}, "which is no file beside it"),
        ("a shard of Windows", {"a": "C:\\x.safetensors"}, "which is no file beside it"),
        ("a shard without a name", {"a": ""}, "which is no file beside it"),
        ("a shard that is a number", {"a": 1}, "which is no file beside it"),
        ("a shard that is the index", {"a": "model.safetensors.index.json"}, "is no checkpoint"),
        ("a missing tensor", {"a": shard, "b": shard}, "which does not hold it"),
        ("a tensor twice", {"a": shard, "b": "other.safetensors"}, "is in another shard too"),
        ("no names", {}, "has no weight_map"),
        ("a list of names", [shard], "has no weight_map"),
    ):
        text = json.dumps({"weight_map": index}).encode()
        yield name, {shard: good, "other.safetensors": good, INDEX: text}, message
    yield "an index that is no JSON", {shard: good, INDEX: b"{"}, "no valid JSON"
    index = json.dumps({"weight_map": {"weight": "pytorch_model-1.bin"}}).encode()
    yield "a missing pickled shard", {"pytorch_model.bin.index.json": index}, "is missing"
    hostile = archive(next(bad_pickles.running("canary"))[1])
    files = {"pytorch_model.bin.index.json": index, "pytorch_model-1.bin": hostile}
    yield "a pickled shard of code", files, "names posix.system"
    yield "a folder without weights", {"config.json": b"{}"}, "holds no weights"
    files = {"pytorch_model.bin": archive(state_dict()), "model.safetensors": b""}
    yield "an empty file beside a good one", files, "model.safetensors is damaged: it is empty"


INDEX = "model.safetensors.index.json"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    for bad in bad_files(target):
        print(f"{bad.path}\t{bad.stage}\t{bad.name}\t{bad.message}")
