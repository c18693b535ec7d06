"""Fuzz the readers of checkpoints: `python -m tests.support.reader_fuzz FOLDER SECONDS`.

Valid files of every format are damaged, spliced and cut, and pickles are put together from good
and hostile instructions. What comes out must be a ModelError of one line, or weights that can all
be read. Prints, as JSON, how many files there were, how many opened, and the peak of memory.
"""

import json
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from benchmarks.machine import peak_bytes
from engine.checkpoints.formats.files import open_weights
from engine.errors import ModelError
from tests.support import bad_legacy, bad_pickles
from tests.support.bad_archives import archive
from tests.support.bad_gguf import GOOD as GGUF
from tests.support.bad_numbers import described
from tests.support.bad_pickles import dictionary, name, number, state_dict, storage, tensor, text
from tests.support.bad_pictures import EMBEDDING, carrying

LABEL = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
PICKLED = state_dict(
    transposed=tensor(strides=(1, 2)),
    expanded=tensor(shape=(3, 4), strides=(0, 1)),
    nested=dictionary(half=tensor(storage(kind="torch.HalfStorage", key="1"))),
    step=number(1000),
    callbacks=b"}" + name(LABEL) + dictionary(monitor=b"N") + b"s",
)
ARRAYS = {
    "half": np.arange(6, dtype=np.float16).reshape(2, 3),
    "ids": np.arange(3),
    "nothing": np.zeros((0, 2)),
    "scalar": np.array(1.5),
}
VIEWED = bad_legacy.storage(bad_legacy.view(1, 3))
LEGACY = bad_legacy.legacy(bad_legacy.state_dict(half=tensor(VIEWED, 0, (3,), (1,))))
INDEX = "model.safetensors.index.json"
MOST = 13  # bytes of numbers for each of a file's: a block of Q2_K has 84, and makes 1024
# What a folder holds, and which of its files is damaged.
VALID: Mapping[str, tuple[Mapping[str, bytes], str]] = {
    "safetensors": (
        {"model.safetensors": safetensors.numpy.save(ARRAYS, {"a": "b"})},
        "model.safetensors",
    ),
    "archive": (
        {"pytorch_model.bin": archive(PICKLED, **{"data/1": bytes(8)})},
        "pytorch_model.bin",
    ),
    "shards": (
        {
            "model-1.safetensors": safetensors.numpy.save(ARRAYS),
            INDEX: json.dumps(
                {"weight_map": dict.fromkeys(ARRAYS, "model-1.safetensors")}
            ).encode(),
        },
        INDEX,
    ),
    "GGUF": ({"model.safetensors": GGUF}, "model.safetensors"),
    "old torch": ({"pytorch_model.bin": LEGACY}, "pytorch_model.bin"),
    "picture": ({"model.safetensors": carrying(EMBEDDING)}, "model.safetensors"),
    "scales": (
        {"model.safetensors": described('{"format": "float8_e4m3fn"}')},
        "model.safetensors",
    ),
}
LENGTHS = [0, 1, 7, 8, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
SPLICES = [*(content[file] for content, file in VALID.values()), PICKLED]
AT = st.integers(0, 3000)
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), AT, st.integers(0, 7)),
        st.tuples(st.just("set"), AT, st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("length"), AT, st.sampled_from(LENGTHS)),
        st.tuples(st.just("cut"), AT, st.integers(0, 60)),
        st.tuples(st.just("insert"), AT, st.binary(max_size=9)),
        st.tuples(
            st.just("splice"), AT, st.tuples(st.sampled_from(SPLICES), AT, st.integers(0, 300))
        ),
        st.tuples(st.just("truncate"), AT, st.none()),
    ),
    min_size=1,
    max_size=4,
)
FRAGMENTS = [
    *(
        bytes([code])
        for code in b"()}]0123NRQabdehijlopqrstu.\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94"
    ),
    *(name(known) for known in ("torch.Size", "collections.OrderedDict", "numpy.dtype", LABEL)),
    *(name(f"torch._utils.{call}") for call in ("_rebuild_tensor_v3", "_rebuild_parameter")),
    *map(name, ("torch._utils._rebuild_device_tensor_from_numpy", "numpy.ndarray", "mine.Thing")),
    name("numpy._core.multiarray._reconstruct"),
    *map(number, (0, 1, 4, -1, 2**31, 2**62, 2**64)),
    *map(text, ("a", "0", "latin1", "f8", "state_dict", "")),
    *(b"q\0", b"q\1", b"h\0", b"h\1", b"j\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f"),
    *(storage(), tensor(), dictionary(a=tensor()), bad_pickles.numbers((2, 2))),
]


def change(content: bytes, kind: str, at: int, value: object) -> bytes:
    """Damage a file in one way, at a byte counted around its end."""
    made = bytearray(content)
    at %= len(made) + 1
    match kind, value:
        case "flip", int(bit):
            made[at : at + 1] = bytes(byte ^ 1 << bit for byte in made[at : at + 1])
        case "set", bytes(new):
            made[at : at + len(new)] = new
        case "length", int(length):
            new = struct.pack("<Q", length)[: 4 + 4 * (length >= 2**32)]
            made[at : at + len(new)] = new
        case "cut", int(size):
            del made[at : at + size]
        case "insert", bytes(new):
            made[at:at] = new
        case "splice", (bytes(other), int(begin), int(size)):
            begin %= len(other)
            made[at : at + size] = other[begin : begin + size]
        case _:
            del made[at:]
    return bytes(made)


class Fuzz:
    """Opens what is made, and counts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.opened, self.refused = folder, 0, 0

    def check(self, files: Mapping[str, bytes]) -> None:
        """Open a folder of these files; any other error than ModelError passes on."""
        for path in self.folder.iterdir():
            path.unlink()  # and not overwritten: it may still be mapped
        for file, content in files.items():
            (self.folder / file).write_bytes(content)
        try:
            weights = open_weights(self.folder)
        except ModelError as error:
            message = str(error)
            message.encode()
            assert "\n" not in message
            assert len(message) < 500 + len(str(self.folder))
            assert str(self.folder) in message
            self.refused += 1
            return
        size = sum(len(content) for content in files.values())
        for key, array in weights.items():
            assert array.shape == weights.tensors[key].shape
            assert array.nbytes <= MOST * size
            array.copy()
        assert all(isinstance(value, str) for value in weights.metadata.values())
        self.opened += 1

    def run(self, seconds: float) -> None:
        """Go on with one seed after another until the time is up."""
        rules = settings(
            max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        tests = [
            rules(given(st.sampled_from(sorted(VALID)), CHANGES)(self.check_changed)),
            rules(given(CHANGES)(self.check_changed_pickle)),
            rules(given(st.lists(st.sampled_from(FRAGMENTS), max_size=25))(self.check_program)),
        ]
        end, number_of_seed = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            for test in tests:
                seed(number_of_seed)(test)()
            number_of_seed += 1

    def check_changed(self, kind: str, changes: list[tuple[str, int, object]]) -> None:
        """Damage a file of a valid checkpoint."""
        files, damaged = VALID[kind]
        content = files[damaged]
        for each in changes:
            content = change(content, *each)
        self.check({**files, damaged: content})

    def check_changed_pickle(self, changes: list[tuple[str, int, object]]) -> None:
        """Damage a pickle, in an archive that is whole."""
        pickled = PICKLED
        for each in changes:
            pickled = change(pickled, *each)
        self.check({"pytorch_model.bin": archive(pickled, **{"data/1": bytes(8)})})

    def check_program(self, fragments: list[bytes]) -> None:
        """Run any instructions, and then make a dictionary of what they left."""
        self.check({"pytorch_model.bin": archive(b"\x80\x04" + b"".join(fragments) + b".")})
        self.check(
            {"pytorch_model.bin": archive(b"\x80\x04}" + text("a") + b"".join(fragments) + b"s.")}
        )


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    fuzz = Fuzz(target)
    for files, _ in VALID.values():
        fuzz.check(files)
    assert fuzz.opened == len(VALID)
    fuzz.run(float(sys.argv[2]))
    peak = peak_bytes()
    print(json.dumps({"opened": fuzz.opened, "refused": fuzz.refused, "peak": peak}))
