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

from benchmarks.card import SECTIONS, UNMEASURED
from benchmarks.card_settings import CHOICES
from engine.backends.memory_estimate import FIRST_RUN
from runtime.denoising.run_buffers import ALIGNMENT

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
COUNTS = json.loads((HERE / "counts.json").read_text())
PICTURES, CONTROLS = COUNTS.pop("pictures"), COUNTS.pop("controls")
VECTOR = 2**18  # bytes; what a session may upload for itself is no larger
OF_A_SESSION = 2**21  # bytes that a session takes whatever it computes


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


# Settings of a step without which it computes shapes: kernels that do nothing give none.
OF_COMPUTED_SHAPES = {"sizes free", "without group norms"}
PARTS = [(model, part) for model, parts in COUNTS.items() for part in parts]


# What may not be left for the GPU to compute, where sizes are fixed.
OF_SHAPES = {"Shape", "Size", "ReduceProd", "Range", "ConstantOfShape", "NonZero"}


@pytest.fixture(params=PARTS, ids=lambda named: "-".join(named))
def part(request, run):
    model, name = request.param
    return COUNTS[model][name], run("run_parts.py", model)[name]


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
        assert copies == {"HtoD": 0, "DtoH": 0}
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


def test_a_picture_of_a_known_form_is_one_launch_and_the_decoder(run):
    """Call by call, recorded, proven; from then on what goes up and comes down is committed."""
    decoder = COUNTS["pictogram"]["vae_decoder"]["launch"]
    first, second, third, *later = run("run_pictures.py")["repeated"]
    assert [each["recorded"] for each in (first, second, third)] == [0, 1, 0]
    assert third["graphs"] == 1
    assert third["kernels"] > decoder, "the calls one by one beside the graph, to compare"
    for each in later:
        assert (each["recorded"], each["graphs"], each["kernels"]) == (0, 1, decoder)
        assert {name: each[name] for name in PICTURES["later"]} == PICTURES["later"]
    assert {name: first[name] for name in PICTURES["first"]} == PICTURES["first"]
    assert PICTURES["later"]["down"] == 3 * 128**2, "the pixels"


def test_forms_in_turn_are_recorded_once_each(run):
    *proven, fourth, fifth = run("run_pictures.py")["rounds"]
    assert sum(each["recorded"] for each in proven[-1]) == 0
    for each in fourth + fifth:
        assert (each["recorded"], each["graphs"], each["refused"]) == (0, 1, 0)


def test_ten_steps_more_are_ten_rows_more_of_what_goes_up(run):
    """Four tables tell a step what differs, each of rows that begin where a tensor may."""
    *_, (twenty, _, _, thirty) = run("run_pictures.py")["rounds"]
    assert thirty["up"] - twenty["up"] == 10 * 4 * ALIGNMENT
    assert thirty["down"] == twenty["down"]


@pytest.mark.parametrize("named", PARTS, ids="-".join)
def test_an_arena_is_within_the_estimate(named, run):
    """What a session takes, of one picture and of two, and that the engine knows how much it is."""
    model, part = named
    facts = run("run_parts.py", model)[part]
    for (held, most), estimate in zip(facts["arenas"], facts["estimates"], strict=True):
        assert estimate / 3 < held <= estimate + OF_A_SESSION
        assert held <= most <= FIRST_RUN * estimate + OF_A_SESSION
    assert facts["held"] == sum(held for held, _ in facts["arenas"])


@pytest.mark.parametrize("name", ["one", "three"])
def test_nets_run_within_the_one_launch_of_a_repeated_form(name, run):
    """ControlNets of Stable Diffusion 1.5, alone and two with a T2I-Adapter, in every call."""
    facts = run("run_controls.py")
    *_, third, fourth = facts[name]
    assert [each["recorded"] for each in facts[name]] == [0, 1, 0, 0]
    assert third["graphs"] == fourth["graphs"] == 1
    assert fourth["kernels"] == fourth["taken"] == fourth["down"] == 0
    assert all(each["refused"] == 0 for each in facts[name])
    weighed = facts[f"{name}, weighed otherwise"]
    assert weighed == fourth, "other weights are a table's rows"
    assert fourth["up"] == CONTROLS[name]["up"], "neither hints nor residuals"
    assert third["kernels"] == CONTROLS[name]["kernels"]


def test_a_variant_has_the_arrays_of_its_part(run):
    """What lies on the GPU for a step is there once, whichever graphs read it."""
    assert run("run_controls.py")["uploaded by kin"] == 0


def test_rows_with_other_nets_are_recorded_together(run):
    first, second, third, fourth = run("run_controls.py")["rows"]
    assert [each["recorded"] for each in (first, second, third, fourth)] == [0, 1, 0, 0]
    assert (fourth["graphs"], fourth["kernels"], fourth["taken"]) == (1, 0, 0)
    assert fourth["down"] == 0


@pytest.mark.parametrize("name", ["seamless", "perturbed", "projected", "CFG++", "shrunk"])
def test_a_picture_of_more_than_plain_steps_is_one_launch_too(name, run):
    first, second, third, fourth = run("run_variants.py")[name]
    assert [each["recorded"] for each in (first, second, third, fourth)] == [0, 1, 0, 0]
    assert fourth["graphs"] == 1
    assert fourth["kernels"] < third["kernels"]
    assert fourth["refused"] == 0
    assert {way: fourth[way] for way in ("up", "down")} == PICTURES[name]


def test_forms_that_do_not_fit_together_go_one_after_the_other(run):
    facts = run("run_memory.py")
    small, large, again = facts["small"], facts["large"], facts["again"]
    assert [each["said"] for each in (*small, again)] == [""] * 6
    assert min(each["forms"] for each in small[1:]) == 1, "not all at once"
    assert max(each["forms"] for each in small) > 1, "those that fit stay"
    assert all(0 <= each["held"] <= facts["room"] for each in (*small, large, again))
    assert "is the picture too large" in large["said"]
    assert (again["forms"], again["held"]) == (1, small[0]["held"])


def test_pictures_of_sizes_that_do_not_fit_together_are_drawn_in_turn(run):
    """From the prompt on; recordings hold sessions, and what fits nowhere is refused before."""
    facts = run("run_small.py")
    small, large, again = facts["small"], facts["large"], facts["again"]
    assert [each["said"] for each in (*small, again)] == [""] * 6
    decoders = [each["forms"]["vae_decoder"] for each in small]
    assert decoders[0] == 1
    assert max(decoders) < 3, "of three sizes"
    assert all(0 < each["held"] < facts["room"] for each in (*small, large, again))
    assert small[-1]["recorded"] == 3
    assert "are missing" in large["said"]
    assert large["forms"] == small[-1]["forms"], "nothing goes for what cannot be drawn"


def test_a_session_asks_for_no_more_than_is_free(run):
    """As it was said when it was opened, though the driver has more."""
    facts = run("run_memory.py")
    assert facts["claimed"]["exhausted"] == 0
    assert 0 < facts["claimed"]["most"] <= facts["claim"]
    assert "is the picture too large" in facts["claimed"]["said"]


def test_the_sections_for_a_card_run_dry(run):
    sections = run("run_card.py")
    for name, found in sections.items():
        assert UNMEASURED.isdisjoint(found), (name, found)
        assert found["took_s"] < SECTIONS[name].seconds
    settings = sections["settings"]
    assert set(settings) == {*CHOICES, "took_s"}
    for name in CHOICES:
        assert ("failed" in settings[name]) == (name in OF_COMPUTED_SHAPES), (name, settings[name])
    drawn = [settings[name] for name in CHOICES if name not in OF_COMPUTED_SHAPES]
    assert all("ms" in each["recorded"] and each["elsewhere"] == {} for each in drawn)
    assert settings["all settings"]["held"] > 0


def test_weights_are_on_the_device_once(part):
    _, facts = part
    if not facts["weights"]:
        assert facts["uploaded"] == []
        return
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
