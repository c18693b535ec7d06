"""ONNX Runtime's own CUDA provider, on libraries of ours that stand for CUDA's; see standin.cpp.

What it places where, which kernels it chooses, what it allocates, copies and waits for is its own;
no number is computed. `.ci/run` has an environment for these tests, where onnxruntime-gpu is.
"""

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
COUNTS = json.loads((HERE / "counts.json").read_text())
VECTOR = 2**18  # bytes; what a session may upload for itself is no larger


def provider() -> Path | None:
    """Return where the provider is; None where onnxruntime is that for the processor."""
    found = find_spec("onnxruntime")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "capi" / "libonnxruntime_providers_cuda.so"
    return path if path.is_file() else None


def headers() -> Path | None:
    """Return the folder of CUDA's headers, of the package nvidia-cuda-runtime."""
    for folder in map(Path, sys.path):
        if (found := folder / "nvidia" / "cu13" / "include" / "cuda_runtime_api.h").is_file():
            return found.parent
    return None


if provider() is None or headers() is None:
    pytest.skip(
        "the stand-in for CUDA wants an environment with onnxruntime-gpu, nvidia-cuda-runtime and "
        "nvidia-cuda-crt; .ci/run makes one",
        allow_module_level=True,
    )


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standin")
    command = [sys.executable, HERE / "build.py", provider(), headers(), folder]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture(scope="session")
def run(libraries):
    """Return what runs a script on the stand-in and reads the JSON that it prints."""

    @cache
    def run(script, *arguments):
        log = libraries / f"{script}-{'-'.join(arguments)}.log"
        log.write_text("")
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(libraries),
            "LATENTRT_CUDA_LOG": str(log),
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, HERE / script, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


PARTS = [(model, part) for model, parts in COUNTS.items() for part in parts]


# What may not be left for the GPU to compute, where sizes are fixed.
OF_SHAPES = {"Shape", "Size", "ReduceProd", "Range", "ConstantOfShape", "NonZero"}
# The library's Split uploads the sizes of its pieces, twice for each of four levels. No ControlNet
# runs on this backend yet.
SPLITTING, UPLOADS = ("sd15-control", "step_controlled"), 8


@pytest.fixture(params=PARTS, ids=lambda named: "-".join(named))
def part(request, run):
    model, name = request.param
    uploads = UPLOADS if request.param == SPLITTING else 0
    return COUNTS[model][name], {**run("run_parts.py", model)[name], "uploads": uploads}


def test_all_parts_have_counts(run):
    for model, parts in COUNTS.items():
        assert set(run("run_parts.py", model)) == set(parts)


def test_every_node_is_on_the_gpu(part):
    _, facts = part
    assert facts["elsewhere"] == []
    assert facts["records"]


def test_no_arithmetic_of_shapes_is_left(part):
    _, facts = part
    assert facts["operators"]
    assert OF_SHAPES.isdisjoint(facts["operators"])


def test_a_run_copies_and_waits_for_nothing_and_allocates_nothing(part):
    _, facts = part
    for kinds, copies in zip(facts["kinds"], facts["copies"], strict=True):
        assert copies == {"HtoD": facts["uploads"], "DtoH": 0}
        assert {"wait", "allocate", "free", "host", "refused"}.isdisjoint(kinds)


def test_the_number_of_operations(part):
    """As committed: one more is a pass more over the activations in every step."""
    expected, facts = part
    assert facts["operations"] == [expected] * len(facts["operations"])


def test_a_run_can_be_recorded(part):
    expected, facts = part
    assert "refused" not in facts["recorded"]
    assert facts["recorded"]["launch"] == expected["launch"]
    assert facts["launched"] == [["launch", "graph"]]


def test_rows_of_two_buckets_in_turn_are_recorded_once_for_each_form(run):
    """Through the way on which a server steps rows: afterwards every call is one graph."""
    facts = run("run_rows.py")
    assert facts["first"]["recorded"] == facts["forms"] == facts["opened"] == 6
    assert facts["then"]["recorded"] == facts["then"]["kernels"] == 0
    assert facts["then"]["calls"] == facts["then"]["graphs"] == 24
    assert facts["first"]["refused"] == facts["then"]["refused"] == 0


def test_weights_are_on_the_device_once(part):
    _, facts = part
    item = 4 if 4 * facts["weights"] < sum(facts["uploaded"]) * 1.02 else 2
    assert sum(facts["uploaded"]) > 0.9 * item * facts["weights"]
    assert 0 < max(facts["constants"]) <= VECTOR, "a session has an array of its own"
    assert 0 < max(facts["constants_of_another"]) <= VECTOR, "another form has arrays of its own"


def test_filters_have_their_channels_last(part):
    _, facts = part
    for dims, strides in facts["filters"] + facts["filters_of_another"]:
        out, channels, height, width = (int(size) for size in dims.split(",")[:4])
        last = [height * width * channels, 1, width * channels, channels]
        assert out > 0
        assert [int(size) for size in strides.split(",")[:4]] == last


def test_a_step_of_stable_diffusion_is_at_most_715_operations():
    assert sum(COUNTS["sd15"]["step"].values()) <= 715
