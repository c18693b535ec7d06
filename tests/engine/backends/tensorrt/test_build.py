import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import product
from operator import ne
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from engine.backends.tensorrt import build as tensorrt_build
from engine.backends.tensorrt.build import BuildProgress, build, timings_path
from engine.backends.tensorrt.build_request import BuildRequest, BuildSettings
from engine.backends.tensorrt.build_worker import fraction
from engine.backends.tensorrt.profiles import Profile, Range
from engine.errors import BackendError, GraphError, ModelError, OutputError
from engine.graphs.graph import METADATA_KEY, Graph, find_graph, graph_folders, signature
from engine.graphs.steering import CONTROLLED_LEVELS
from engine.model import COMPONENTS, Model, find_model

PICTOGRAM = find_model("pictogram")
MODEL = Model.open(PICTOGRAM)
PARTS = tuple(
    part
    for part, name in COMPONENTS.items()
    if name in MODEL.configs and part not in (*CONTROLLED_LEVELS, "step_shrunk")
)
PROFILE = Profile(
    height=Range(64, 128, 256),
    width=Range(64, 128, 256),
    batch=Range(1, 1, 4),
    tokens=Range(32, 32, 64),
)
SETTINGS = BuildSettings(profiles=(PROFILE,), target="sm89")


def request(part="preview_decoder", graph=None, settings=SETTINGS, **more):
    if graph is None:
        config, folders = MODEL.config(part), graph_folders()
        graph = find_graph(part, config, "float16", folders, PICTOGRAM).path
    return BuildRequest(
        library="tensorrt_rtx",
        part=part,
        graph=graph,
        model=PICTOGRAM,
        settings=settings,
        **more,
    )


def weights_bytes(graph):
    return 2 * sum(math.prod(shape) for shape in Graph.read(graph).weights.values())


def has_gpu():
    return shutil.which("nvidia-smi") is not None


@pytest.fixture
def children(monkeypatch):
    """The processes that a test started."""
    started = []

    class Noted(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    return started


# A target is a number that the library is told: attention and convolutions know what it changes.
BUILT = [
    *((part, SETTINGS.target) for part in PARTS),
    *product(("text_encoder", "preview_decoder"), ("sm86", "sm120")),
]


@pytest.mark.parametrize(("part", "target"), BUILT)
def test_every_part_of_the_shipped_model_is_built(part, target, tmp_path):
    path, steps = tmp_path / "engine", []
    asked = request(part, settings=replace(SETTINGS, target=target))
    built = build(asked, path, steps.append)
    assert built.nbytes == path.stat().st_size > weights_bytes(asked.graph)
    assert built.peak_bytes > built.nbytes
    assert all(isinstance(step, BuildProgress) for step in steps)
    fractions = [step.fraction for step in steps]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] < fractions[-1] == 1


def test_one_engine_has_several_profiles(tmp_path):
    fixed = Profile(height=Range(64, 64, 64), width=Range(64, 64, 64), tokens=Range(32, 32, 32))
    asked = request("step_shallow")
    one = build(replace(asked, settings=replace(SETTINGS, profiles=(fixed,))), tmp_path / "one")
    both = replace(SETTINGS, profiles=(fixed, PROFILE))
    two = build(replace(asked, settings=both), tmp_path / "two")
    assert one.nbytes < two.nbytes


@pytest.mark.parametrize("part", ["step", "vae_decoder"])
def test_float32_attention_is_built(part, tmp_path):
    config, folders = MODEL.config(part), graph_folders()
    graph = find_graph(part, config, "float32", folders, PICTOGRAM).path
    built = build(request(part, graph), tmp_path / "engine")
    assert built.nbytes > 2 * weights_bytes(graph)


def test_engines_of_two_targets_differ(tmp_path):
    engines = []
    for target in ("sm86", "sm120"):
        build(request(settings=replace(SETTINGS, target=target)), tmp_path / target)
        engines.append((tmp_path / target).read_bytes())
    assert engines[0] != engines[1]


def test_adapters_are_built_in(tmp_path):
    lora, plain = tmp_path / "lora.safetensors", request("text_encoder")
    down, up = np.ones((4, 192), np.float16), np.ones((192, 4), np.float16)
    module = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    save_file({f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}, lora)
    adapted = replace(plain, loras=(f"{lora}:0.5",))
    for name, asked in {"plain": plain, "same": plain, "adapted": adapted}.items():
        build(asked, tmp_path / name)
    engines = [(tmp_path / name).read_bytes() for name in ("plain", "same", "adapted")]
    differ = [sum(map(ne, engines[0], engine)) for engine in engines[1:]]
    assert differ[0] < 1000 < 192 * 192 / 2 < differ[1]


def test_weights_that_may_change_need_a_gpu_and_say_so(tmp_path):
    asked = request(settings=replace(SETTINGS, refit=True))
    if has_gpu():
        build(asked, tmp_path / "engine")
    else:
        refused(asked, tmp_path / "engine", BackendError, "only beside an NVIDIA GPU")


def test_a_request_comes_back_from_json():
    settings = BuildSettings(
        profiles=(PROFILE, replace(PROFILE, batch=Range(1, 1, 1))),
        refit=True,
        optimization_level=0,
        workspace_bytes=2**30,
        target="sm120",
    )
    asked = request(settings=settings, vae=Path("vae"), loras=("a:0.5",), timings=Path("times"))
    assert BuildRequest.from_dict(json.loads(json.dumps(asked.to_dict()))) == asked


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"profiles": ()}, "needs one shape profile or more"),
        ({"optimization_level": 6}, "optimization_level is 6; .* from 0"),
        ({"workspace_bytes": 0}, "workspace_bytes is 0"),
        ({"workspace_bytes": 1.5}, "workspace_bytes is 1.5"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(BackendError, match=message):
        replace(SETTINGS, **settings)


@pytest.mark.parametrize(
    ("library", "target", "message"),
    [
        ("tensorrt_rtx", "sm90", "does not support Hopper"),
        ("tensorrt_rtx", "sm75", "no float32 matrices on Turing"),
        ("tensorrt_rtx", "sm50", "'sm50' is not known; choose from sm80"),
        ("tensorrt", "sm89", "builds for the GPU of this machine"),
        ("tensorflow", None, "choose tensorrt or tensorrt_rtx"),
    ],
)
def test_targets_that_a_library_does_not_build_for_are_refused(library, target, message):
    with pytest.raises(BackendError, match=message):
        replace(request(), library=library, settings=replace(SETTINGS, target=target))


def write_graph(path, operator="Relu", domain=""):
    """Write a preview decoder of one node, without weights, that describes itself as ours."""
    values = [
        helper.make_tensor_value_info("latents", TensorProto.FLOAT, ["B", 8, "h", "w"]),
        helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["B", 8, "h", "w"]),
    ]
    node = helper.make_node(operator, ["latents"], ["pixels"], name="the_node", domain=domain)
    opsets = [helper.make_opsetid("", 23), *([helper.make_opsetid(domain, 1)] if domain else [])]
    model = helper.make_model(
        helper.make_graph([node], "graph", values[:1], values[1:]), opset_imports=opsets
    )
    described = {
        "part": "preview_decoder",
        "architecture": MODEL.config("preview_decoder").key(),
        "precision": "float16",
        "inputs": list(signature("preview_decoder", MODEL.config("preview_decoder")).inputs),
        "weights": {},
    }
    helper.set_model_props(model, {METADATA_KEY: json.dumps(described)})
    path.write_bytes(model.SerializeToString())
    return path


def refused(asked, path, error, match):
    with pytest.raises(error, match=match) as raised:
        build(asked, path)
    assert not path.exists()
    assert "\n" not in str(raised.value)


def test_a_small_graph_without_weights_is_built(tmp_path):
    built = build(request(graph=write_graph(tmp_path / "graph.onnx")), tmp_path / "engine")
    assert built.nbytes > 0


@pytest.mark.parametrize(("operator", "domain"), [("Unheard", ""), ("Unheard", "some.where")])
def test_an_unsupported_operator_is_named(operator, domain, tmp_path):
    graph = write_graph(tmp_path / "graph.onnx", operator, domain)
    refused(
        request(graph=graph), tmp_path / "engine", GraphError, "has no operator Unheard.*graph.onnx"
    )


def test_a_corrupted_graph_is_refused(tmp_path):
    graph = write_graph(tmp_path / "graph.onnx")
    data = graph.read_bytes().replace(
        b"\x0a\x07latents\x12\x06pixels", b"\x0a\x07lat\xffnts\x12\x06pixels"
    )
    assert data != graph.read_bytes()
    graph.write_bytes(data)
    refused(
        request(graph=graph), tmp_path / "engine", GraphError, "cannot take the graph graph.onnx"
    )


@pytest.mark.parametrize("seed", range(8))
def test_a_graph_with_a_wrong_byte_is_built_or_refused(seed, tmp_path):
    whole, rng = request().graph.read_bytes(), np.random.default_rng(seed)
    data = bytearray(whole)
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    graph, path = tmp_path / "graph.onnx", tmp_path / "engine"
    graph.write_bytes(data)
    said = "graph.onnx"
    try:
        build(request(graph=graph), path)
    except (BackendError, GraphError) as error:
        said = str(error)
    assert path.exists() == (said == "graph.onnx")
    assert "graph.onnx" in said
    assert "\n" not in said


def test_half_a_graph_is_refused(tmp_path):
    graph = write_graph(tmp_path / "graph.onnx")
    graph.write_bytes(graph.read_bytes()[:60])
    refused(request(graph=graph), tmp_path / "engine", GraphError, "is not a graph of this project")


def test_another_models_graph_is_refused(tmp_path):
    [graph] = (find_graph("vae_decoder", MODEL.vae, "float32", graph_folders(), PICTOGRAM),)
    asked = request("vae_encoder", graph.path)
    refused(asked, tmp_path / "engine", BackendError, "latents")


def test_a_model_that_is_not_there_is_refused(tmp_path):
    asked = replace(request(), model=tmp_path / "nothing")
    refused(asked, tmp_path / "engine", ModelError, "nothing")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_the_peak_of_memory_is_the_childs_alone(tmp_path):
    before = build(request(), tmp_path / "engine").peak_bytes
    ours = np.ones(2**29, np.uint8)
    after = build(request(), tmp_path / "engine").peak_bytes
    assert after < before + len(ours) // 2


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    refused(request(), tmp_path / "nowhere" / "engine", OutputError, "No such file")


def child_that(monkeypatch, code):
    monkeypatch.setattr(tensorrt_build, "CHILD", ("-c", code))


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL", "SIGABRT"])
def test_a_builder_that_dies_is_one_error(name, monkeypatch, tmp_path):
    code = (
        "import os, signal, sys\n"
        "print('last\\nwords', file=sys.stderr, flush=True)\n"
        'print(\'{"phase": "tactics", "fraction": 0.5}\', flush=True)\n'
        f"os.kill(os.getpid(), signal.{name})"
    )
    child_that(monkeypatch, code)
    (tmp_path / "engine").write_bytes(b"half")
    match = f"tensorrt_rtx died of {name} at 'tactics' of the preview_decoder.*last words"
    refused(request(), tmp_path / "engine", BackendError, match)


def test_a_builder_that_ends_without_a_word_is_an_error(monkeypatch, tmp_path):
    child_that(monkeypatch, "raise SystemExit(7)")
    refused(request(), tmp_path / "engine", BackendError, "ended with status 7 at 'the start'")


def test_cancelling_leaves_no_child_and_no_file(children, tmp_path):
    def interrupt(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(request("step"), tmp_path / "engine", interrupt)
    assert list(tmp_path.iterdir()) == []
    assert [child.returncode is None for child in children] == [False]
    assert children[0].returncode == 0  # it stopped by itself


def test_a_builder_that_does_not_stop_is_killed(children, monkeypatch, tmp_path):
    code = 'import time; print(\'{"phase": "p", "fraction": 0}\', flush=True); time.sleep(60)'
    child_that(monkeypatch, code)
    monkeypatch.setattr(tensorrt_build, "TERMINATION_GRACE_S", 0.1)

    def interrupt(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(request(), tmp_path / "engine", interrupt)
    assert children[0].returncode == -signal.SIGKILL


def test_a_child_whose_parent_died_stops(tmp_path):
    line = json.dumps({"request": request("step").to_dict(), "to": str(tmp_path / "engine")})
    child = subprocess.Popen(
        [sys.executable, *tensorrt_build.CHILD],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    child.stdin.write(line.encode() + b"\n")
    child.stdin.flush()
    child.stdout.readline()  # it builds
    child.stdin.close()
    child.stdout.close()
    child.wait(60)
    assert not (tmp_path / "engine").exists()


def test_the_file_of_timings_is_one_for_each_version_and_gpu():
    path = timings_path("tensorrt", "11.4.0", "NVIDIA H200 / 141GB")
    assert path.name == "tensorrt-11.4.0-NVIDIA-H200-141GB.bin"


def test_a_fraction_counts_what_is_done_within():
    assert fraction({}) == 0
    assert fraction({"a": (None, 4, 1)}) == 0.25
    assert fraction({"a": (None, 4, 1), "b": ("a", 2, 1)}) == 0.375
    assert fraction({"a": (None, 4, 4), "b": ("a", 2, 1)}) == 1
    assert fraction({"a": (None, 0, 0)}) == 0
