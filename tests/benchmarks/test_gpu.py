import ctypes
import itertools
import json
from dataclasses import replace
from functools import partial

import diffusers
import numpy as np
import pytest
import torch

from benchmarks import gpu, gpu_contenders, gpu_summary, nvml, random_models, scenarios
from benchmarks.__main__ import main
from benchmarks.distances import relative_error
from benchmarks.flops import request_flops
from benchmarks.gpu_contenders import (
    CEILINGS,
    COMPILED,
    GPU_CONTENDERS,
    GPU_MEASURED,
    GPU_REFERENCE,
)
from benchmarks.peers import pipeline_parts
from benchmarks.scenarios import LONGER, STEPS, WHOLE, Scenario, engine_inputs
from benchmarks.worker import ContenderError
from engine.backends.settings import BackendSettings
from engine.errors import BackendError, OutputError, RequestError
from engine.model import Model
from export.tracing import build_module
from runtime.images.files import psnr
from tests.support.fake_cuda import FakeDevice, FakeEngine
from tests.support.tolerances import PARITY_RTOL, PICTURE_PSNR_DB

# Older numpy protocols of torch, and names that diffusers will drop: neither is ours to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of tracing, about code of diffusers
]
OURS, RTX, CUDA = (name for name in GPU_CONTENDERS if name.startswith("latentrt"))
EAGER = "diffusers, eager float16"
KEYS = ("pictogram-64-x1", "pictogram-64-x2")


class Gpu:
    """A GPU of 16 GiB, of which a request takes another GiB each time that somebody looks."""

    def __init__(self):
        self.looks = itertools.count(1)

    def memory(self):
        used = next(self.looks) * 2**20
        return 2**34 - used, used

    def described(self):
        return {"name": "G", "sm": "sm89", "driver": "1.2", "memory_bytes": 2**34}


class Worker:
    """A contender in this process; `log` says what was run."""

    log = ()
    opens = True

    def __init__(self, contender, scenario, threads):
        self.contender, self.scenario = contender, scenario

    def ready(self, bound_s):
        self.log.append((self.contender, self.scenario, "open"))
        if self.opens:
            try:
                self.parts = GPU_MEASURED[self.contender].open(Scenario.of(self.scenario), 1)
            except BackendError as error:
                raise ContenderError(f"opening: {error}") from error
            return {"parts": [*self.parts]}
        if self.contender == RTX:
            raise ContenderError("opening: not on this GPU")
        return {"parts": [*gpu._parts(self.contender)]}

    def run(self, part, bound_s, save=None):
        self.log.append((self.contender, self.scenario, part))
        if save:
            output = self.parts[part]() if self.opens else np.array([3, 4], np.float32)
            np.save(save, output)
        return {"seconds": 20.0 if part == STEPS else 2.0, "memory": {"peak_bytes": 1}}

    def close(self):
        pass


@pytest.fixture
def log(monkeypatch):
    """Stand in for a GPU and for processes; two steps of small pictures."""
    Worker.log, Worker.opens = [], True
    monkeypatch.setattr(gpu, "find_gpu", Gpu)
    monkeypatch.setattr(gpu, "Worker", Worker)
    monkeypatch.setattr("benchmarks.race.Worker", Worker)
    monkeypatch.setattr(gpu, "SCENARIOS", KEYS)
    small = replace(scenarios.MODELS["pictogram"], steps=2)
    monkeypatch.setitem(scenarios.MODELS, "pictogram", small)
    return Worker.log


@pytest.fixture
def quick(log, monkeypatch):
    """Open nothing: every part takes two seconds, and every step."""
    Worker.opens = False
    flops = {"text": 1, "step": 8192**3, "decode": 1, WHOLE: 2 * 8192**3 + 2}
    monkeypatch.setattr(gpu, "request_flops", lambda scenario: dict(flops))
    return log


def on_the_processor(monkeypatch):
    """Let the contenders run on the processor, all in float32, and two backends be missing."""

    monkeypatch.setattr(
        gpu_contenders,
        "BackendSettings",
        lambda **settings: BackendSettings(backend="cpu", threads=1),
    )
    load = gpu_contenders.load_pipeline

    def loaded(scenario, precision, settings):
        pipeline = load(scenario, "float32", settings)
        pipeline.engines.opened["step"] = FakeEngine(pipeline.engine("step"), FakeDevice())
        return pipeline

    def missing(scenario, threads):
        raise BackendError("install it")

    monkeypatch.setattr(gpu_contenders, "load_pipeline", loaded)
    monkeypatch.setattr(torch, "compile", lambda module, **settings: module)
    for module in ("peers", "gpu_contenders", "gpu_summary"):
        monkeypatch.setattr(f"benchmarks.{module}.LONGER_STEPS", 3)
    monkeypatch.setattr(gpu_contenders, "PRODUCT_SIDE", 8)
    monkeypatch.setattr(gpu_contenders, "COPY_BYTES", 64)
    monkeypatch.setattr(gpu_contenders, "UPLOAD_BYTES", 8)
    theirs = partial(gpu_contenders.gpu_diffusers_parts, device="cpu")
    opens = {
        CEILINGS: partial(gpu_contenders._ceilings, device="cpu"),
        RTX: missing,
        CUDA: missing,
        EAGER: partial(theirs, "float32", False),
        COMPILED: partial(theirs, "float32", True),
        GPU_REFERENCE: partial(theirs, "float32", False),
    }
    for name, open_it in opens.items():
        monkeypatch.setitem(GPU_MEASURED, name, replace(GPU_MEASURED[name], open=open_it))


def test_without_a_gpu_the_program_says_so_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(nvml, "LIBRARY", "libnothing.so")
    assert main(["gpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no NVIDIA GPU was found (")
    assert said.count("\n") == 1


def test_a_whole_run_on_the_processor(log, monkeypatch, tmp_path, capsys):
    on_the_processor(monkeypatch)
    out, key = tmp_path / "gpu.json", KEYS[1]
    options = ["--scenarios", "x2", "--repeats", "1", "--out", str(out)]
    assert main(["gpu", *options]) == 0
    report = json.loads(out.read_text())
    assert [*report["scenarios"]] == [key]
    found = report["scenarios"][key]
    contenders = found["contenders"]
    for name in (RTX, CUDA):
        assert contenders[name] == {"rounds": [], "skipped": "opening: install it"}
    for name in (OURS, EAGER, COMPILED):
        agreement = contenders[name]["agreement"]
        assert agreement["agrees"] is True, (key, name, agreement)
        assert agreement["step_relative_error"] <= 10 * PARITY_RTOL
        assert (
            agreement[f"{WHOLE}_psnr_db"] is None or agreement[f"{WHOLE}_psnr_db"] > PICTURE_PSNR_DB
        )
        assert [request["steps"] for request in contenders[name]["requests"]] == [2, 3]
        assert contenders[name]["peak_bytes"] >= 2**20
    assert found["flops"][WHOLE] > 2 * found["flops"]["step"]
    one = request_flops(Scenario.of(KEYS[0]))["step"]
    assert found["flops"]["step"] == pytest.approx(2 * one, rel=0.01)
    table = capsys.readouterr().out
    assert f"left out: {RTX} (opening: install it)" in table
    assert report["unfinished"] == {key: [RTX, CUDA]}


def test_a_run_goes_on_where_the_minutes_ended(quick, monkeypatch, tmp_path):
    out, seconds = tmp_path / "gpu.json", itertools.count()
    monkeypatch.setattr(gpu.time, "monotonic", lambda: float(next(seconds)))
    calls = 0
    while True:
        calls += 1
        report = gpu.measure(minutes=0.35, repeats=2, out=out)
        assert json.loads(out.read_text()) == report
        if all(names == [RTX] for names in report["unfinished"].values()):
            break
        assert calls < 50, "it does not come to an end"
    assert calls > 2
    for key in KEYS:
        taken = report["scenarios"][key]["contenders"]
        assert {name: len(taken[name]["rounds"]) for name in taken} == {
            name: 0 if name == RTX else 2 for name in (CEILINGS, *GPU_CONTENDERS)
        }
        assert quick.count((GPU_REFERENCE, key, WHOLE)) == 1, "its outputs are kept"


def test_what_failed_is_tried_again_after_all_else(quick, tmp_path):
    out = tmp_path / "gpu.json"
    gpu.measure(repeats=1, only=["TensorRT-RTX"], scenarios=["x1"], out=out)
    quick.clear()
    gpu.measure(repeats=1, out=out)
    opened = [contender for contender, key, what in quick if what == "open" and key == KEYS[0]]
    assert opened[-1] == RTX
    assert opened.count(RTX) == 1


def test_factors_beside_the_parts_the_floor_and_the_compiled_peer(quick):
    report = gpu.measure(repeats=1, scenarios=["x1"])
    found = report["scenarios"][KEYS[0]]
    assert found["ceilings"]["float16 product"] == pytest.approx(8192**3, rel=1e-3)
    short, long = found["contenders"][OURS]["requests"]
    assert short["own_s"] == 2 + 2 * 2 + 2, "two steps, each a tenth of ten"
    assert long["own_s"] == 2 + 50 * 2 + 2
    assert short["times_own"] == 0.25
    assert short["floor_s"] == pytest.approx(2, rel=1e-3)
    assert short["times_floor"] == 1.0
    assert short["times_compiled"] == 1.0
    table = gpu_summary.gpu_table(report)
    assert (
        f"| 2 | {OURS} | 2.00 s, 2.00 s to 2.00 s | × 1.00 | × 0.25 of 8.00 s | × 1.00 |" in table
    )
    assert f"- left out: {RTX} (opening: not on this GPU)" in table


def test_figures_of_another_gpu_are_not_mixed(quick, tmp_path, monkeypatch):
    out = tmp_path / "gpu.json"
    gpu.measure(repeats=1, only=["eager"], scenarios=["x1"], out=out)
    monkeypatch.setattr(Gpu, "described", lambda self: {"name": "another"})
    with pytest.raises(OutputError, match="another request or machine"):
        gpu.measure(repeats=1, out=out)


def test_unknown_names_are_refused(quick):
    with pytest.raises(RequestError, match="no contender is called TPU; there are latentrt"):
        gpu.measure(only=["TPU"])
    with pytest.raises(RequestError, match="no scenario is called sd3"):
        gpu.measure(scenarios=["sd3"])
    with pytest.raises(RequestError, match=r"choose pictogram, sd15, .*sd21, xl"):
        Scenario.of("sd15-large-x1")


class Nvml:
    """NVML's functions as ctypes calls them: they fill in what they are given."""

    def __init__(self):
        self.used = iter([1, 5])
        self.asked = []

    def nvmlInit_v2(self):  # noqa: N802
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):  # noqa: N802
        self.asked.append(index)
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, handle, major, minor):  # noqa: N802
        major._obj.value, minor._obj.value = 8, 9
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle, memory):  # noqa: N802
        memory._obj.total, memory._obj.used = 10, next(self.used)
        memory._obj.free = 10 - memory._obj.used
        return 0

    def nvmlDeviceGetName(self, handle, buffer, length):  # noqa: N802
        buffer.value = b"GPU"
        return 0

    def nvmlSystemGetDriverVersion(self, buffer, length):  # noqa: N802
        buffer.value = b"580.1"
        return 0


def test_what_the_driver_tells(monkeypatch):
    library = Nvml()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    found = nvml.find_gpu()
    assert found.described() == {"name": "GPU", "sm": "sm89", "driver": "580.1", "memory_bytes": 10}
    assert library.asked == [3]
    assert found.memory() == (5, 5)
    library.nvmlInit_v2 = lambda: 9
    with pytest.raises(BackendError, match="NVML's status is 9"):
        nvml.find_gpu()


def test_the_peak_of_memory_is_the_most_that_was_seen():
    gpu_ = Gpu()
    with nvml.PeakMemory(gpu_) as peak:
        pass
    assert peak.used == (next(gpu_.looks) - 1) * 2**20


def small(model):
    """Return one of the random models with few and narrow layers."""
    text = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
    encoders = {
        name: replace(config, hidden_size=64, projection_dim=config.projection_dim and 64, **text)
        for name, config in model.configs.items()
        if name.startswith("text")
    }
    unet = replace(
        model.configs["unet"],
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2),
        transformer_layers_per_block=1,
        cross_attention_dim=64 * len(encoders),
        **(
            {"addition_time_embed_dim": 16, "projection_class_embeddings_input_dim": 64 + 6 * 16}
            if len(encoders) == 2
            else {}
        ),
    )
    vae = replace(model.configs["vae"], block_out_channels=(32, 32, 32, 32))
    return replace(model, configs={**encoders, "unet": unet, "vae": vae})


@pytest.mark.parametrize("name", ["sd21", "xl"])
@torch.no_grad()
def test_random_models_are_the_same_to_diffusers_and_here(name, tmp_path, monkeypatch):
    chosen = small(random_models.RANDOM_MODELS[name])
    monkeypatch.setitem(random_models.RANDOM_MODELS, name, chosen)
    monkeypatch.setattr(scenarios, "cache_folder", lambda: tmp_path)
    scenario = Scenario.of(f"{name}-64-x2")
    model = Model.open(scenario.model())
    assert model.configs == chosen.configs
    assert ("time_ids" in model.unet.extra_inputs) == model.zeros_for_empty_prompt == (name == "xl")
    assert model.scheduler["prediction_type"] == chosen.scheduler["prediction_type"]
    kind = (
        diffusers.StableDiffusionXLPipeline if name == "xl" else diffusers.StableDiffusionPipeline
    )
    unused = {"add_watermarker": False} if name == "xl" else {"safety_checker": None}
    pipe = kind.from_pretrained(scenario.folder(), **unused).to(torch.float32)
    theirs = pipeline_parts(pipe, torch.float32, scenario)
    inputs = engine_inputs(scenario, model)

    def ours(part):
        module = build_module(part, model.config(part))
        weights = model.weights(part)
        state = {key: torch.from_numpy(weights[key].astype("f")) for key in weights}
        module.model.load_state_dict(state)
        outputs = module(**{key: torch.from_numpy(value) for key, value in inputs[part].items()})
        return outputs if isinstance(outputs, tuple) else (outputs,)

    states = [ours(part)[name == "xl"] for part in model.text_encoders]
    assert relative_error(theirs["text"](), torch.cat(states, -1).numpy()) <= PARITY_RTOL
    assert relative_error(theirs["step"](), ours("step")[0][:, 0].numpy()) <= PARITY_RTOL
    pixels = ours("vae_decoder")[0].numpy().astype(int)
    assert np.abs(theirs["decode"]() - pixels).max() <= 1
    monkeypatch.setattr("benchmarks.peers.LONGER_STEPS", 1)
    assert theirs[LONGER]().shape == (2, 64, 64, 3)
    if name == "xl":  # its decoder stays in float32
        halves = gpu_contenders.gpu_diffusers_parts("float16", False, scenario, 1, device="cpu")
        assert psnr(halves["decode"](), pixels) >= PICTURE_PSNR_DB


def test_a_process_says_why_a_backend_cannot_run():
    worker = gpu.Worker(OURS, KEYS[0], 1)
    with pytest.raises(ContenderError, match=r"opening: (BackendError|GraphError): "):
        worker.ready(60)
    worker.close()
