import json
import platform
import shutil
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from benchmarks import instruction_sets, processors
from benchmarks.instruction_sets import HIDDEN, STAND_IN, environment, hidden
from benchmarks.resource_tables import processors_table
from benchmarks.worker import ContenderError
from engine.errors import RequestError

ASKING = """
#include <cpuid.h>
int asked(unsigned leaf, unsigned subleaf, unsigned which) {
    unsigned found[4] = {0};
    __cpuid_count(leaf, subleaf, found[0], found[1], found[2], found[3]);
    return found[which];
}
"""
CALLING = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
print(*(library.asked(*map(int, leaf.split("."))) & 0xffffffff for leaf in sys.argv[2:]))
"""
compiles = pytest.mark.skipif(
    platform.system() != "Linux"
    or platform.machine() != "x86_64"
    or not (shutil.which("gcc") and shutil.which("objdump")),
    reason="Linux on x86-64 with a compiler",
)


@pytest.fixture
def library(tmp_path):
    source = tmp_path / "asking.c"
    source.write_text(ASKING)
    subprocess.run(
        ["gcc", "-O1", "-shared", "-fPIC", source, "-o", tmp_path / "own.so"], check=True
    )
    (tmp_path / "copy.so").write_bytes(hidden(tmp_path / "own.so"))
    return tmp_path


def told(library, variables, *leaves):
    command = [sys.executable, "-c", CALLING, library, *leaves]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


@compiles
@pytest.mark.parametrize("name", ["AVX-512, no bfloat16", "AVX2", "SSE4.2"])
def test_a_library_sees_an_instruction_set_alone(library, name, monkeypatch, tmp_path):
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path))
    monkeypatch.setattr(instruction_sets, "LIBRARIES", {})
    leaves = ("1.0.2", "7.0.1", "7.0.2", "7.0.3", "7.1.0", "0.0.0")
    own = told(library / "own.so", {}, *leaves)
    seen = told(library / "copy.so", environment(name), *leaves)
    for leaf, before, after in zip(leaves, own, seen, strict=True):
        place = tuple(map(int, leaf.split(".")))
        bits = {bit for *where, bit in HIDDEN[name] if tuple(where) == place}
        # the number of the core, and what the system switches, stay out of these registers
        assert after == before & ~sum(1 << bit for bit in bits), leaf
    assert own[-1] == seen[-1], "another leaf"


@compiles
def test_only_the_instruction_is_replaced(library):
    own, copy = ((library / name).read_bytes() for name in ("own.so", "copy.so"))
    differing = [i for i, (a, b) in enumerate(zip(own, copy, strict=True)) if a != b]
    assert len(differing) == 1
    assert copy[differing[0] - 1 : differing[0] + 1] == STAND_IN


def test_sets_are_within_each_other():
    sets = [*HIDDEN.values()]
    assert all(some < more for some, more in pairwise(sets))
    assert environment("all") == {}


@pytest.fixture
def report(monkeypatch, tmp_path):
    """Run a measurement of made-up times: OpenVINO is faster but on the last set."""
    calls = []

    def once(module, function, *given, **options):
        calls.append((function, *given[1:3]))
        if function == "choose":
            return {"chosen": "openvino float32"}
        if given[2] == "bfloat16":
            raise ContenderError("no bfloat16 arithmetic")
        slow = 1.2 if (given[1] == "openvino") == ("SSE" in options["variables"]["set"]) else 1.0
        np.save(given[-1], np.ones(3, np.float32))
        times = {"median": slow, "min": slow, "max": slow}
        return {"step": times, "decode": times}

    machine = {"processor": "a processor", "cores": 1}
    monkeypatch.setattr("benchmarks.resumable.describe", lambda: machine)
    monkeypatch.setattr(processors, "once", once)
    monkeypatch.setattr(processors, "environment", lambda name: {"set": name})
    out = tmp_path / "processors.json"
    found = processors.measure(only=["AVX2", "SSE"], out=out)
    assert json.loads(out.read_text()) == found
    return found, calls, out


def test_the_choice_must_be_the_fastest(report):
    found, _, _ = report
    assert found["exceeded"] == ["SSE4.2"]
    assert found["sets"]["AVX2"]["fastest"] == "openvino float32"
    assert found["sets"]["AVX2"]["ways"]["openvino float32"]["request_s"] == 21
    assert found["sets"]["AVX2"]["ways"]["openvino bfloat16"]["skipped"] == "no bfloat16 arithmetic"


def test_a_second_call_measures_what_failed(report):
    found, calls, out = report
    calls.clear()
    assert processors.measure(only=["AVX2", "SSE"], out=out) == found
    assert [call for call in calls if call[0] == "run_parts"] == [
        ("run_parts", "openvino", "bfloat16")
    ] * 2


def test_the_table_marks_the_choice(report):
    table = processors_table(report[0])
    assert "| AVX2 | openvino float32 | 21.00 s | 1.00 s | 1.00 s | chosen |" in table
    assert "- not measured: openvino bfloat16 (no bfloat16 arithmetic) on SSE4.2" in table


def test_a_set_that_is_none():
    with pytest.raises(RequestError, match="no set is called MMX; there are all; AVX-512"):
        processors.measure(only=["MMX"])
