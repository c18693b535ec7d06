import json
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import torch._inductor.config as inductor
from PIL import Image
from transformers import CLIPTokenizer

from benchmarks import comparison_tables, latency, load, race, report, resumable
from benchmarks.__main__ import main
from benchmarks.contenders import CONTENDERS, FULL, MEASURED, PEAK, REFERENCE
from benchmarks.diffusers_folder import write_folder
from benchmarks.distances import relative_error
from benchmarks.random_models import RANDOM_MODELS
from benchmarks.scenarios import MODELS, PARTS, SCENARIOS, WHOLE, engine_inputs, whole_of
from benchmarks.worker import ContenderError, Worker
from engine.configs.diffusion import AutoencoderConfig
from engine.errors import OutputError, RequestError
from engine.model import Model
from runtime.conditioning.tokenizer import load_tokenizers
from runtime.images.files import psnr
from tests.support.tolerances import BFLOAT16_RTOL, PARITY_RTOL, PICTURE_PSNR_DB

# Older numpy protocols of torch, and names that diffusers will drop: neither is ours to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
VAE = AutoencoderConfig(block_out_channels=(32, 32, 32, 32))
EAGER, OPENVINO = "diffusers, eager float32", "latentrt, OpenVINO float32"
ALL_PARTS = (*PARTS, WHOLE, whole_of(4), "float32", "float32 of torch", "bfloat16", "int8")


def choice(**options):
    options = {"whole": False, "threads": 1, "repeats": 2, "only": (), **options}
    return latency.Choice.of(options.pop("model", "sd15"), **options)


class FakeWorker:
    """A contender that takes a second for everything; OpenVINO fails, bfloat16 gives nonsense."""

    log = ()

    def __init__(self, contender, scenario, threads):
        self.contender, self.log = contender, type(self).log
        self.log.append(f"open {contender}")

    def ready(self, bound_s):
        if "OpenVINO" in self.contender:
            raise ContenderError("opening: no such backend")
        return {"parts": [*PARTS, WHOLE, *choice().parts(PEAK)]}

    def run(self, part, bound_s, save=None):
        if save:
            wrong = 9 if "bfloat16" in self.contender else 1
            array = np.array([3, 4 * wrong])
            np.save(save, array.astype(np.uint8 if part in ("decode", WHOLE) else np.float32))
        else:
            self.log.append(f"{self.contender} {part}")
        return {"seconds": 1.0, "memory": {"resident_bytes": 2**29, "peak_bytes": 2**30}}

    def close(self):
        self.log.append(f"close {self.contender}")


@pytest.fixture
def log(monkeypatch):
    FakeWorker.log = []
    monkeypatch.setattr(race, "Worker", FakeWorker)
    counted = dict.fromkeys((*PARTS, WHOLE), 16e9)
    monkeypatch.setattr(latency, "request_flops", lambda scenario: counted)
    monkeypatch.setattr(
        resumable, "describe", lambda: {"processor": "P", "cores": 1, "peak_gflops": 1.0}
    )
    return FakeWorker.log


def steps_of(log):
    return [line.removesuffix(" step") for line in log if line.endswith(" step")]


def test_contenders_take_turns(log):
    measured = latency.measure(choice(only=("ONNX Runtime", "eager")))
    names = [REFERENCE, EAGER, "diffusers, eager bfloat16", "optimum, ONNX Runtime float32"]
    assert steps_of(log) == names * 2
    assert log.count(f"open {EAGER}") == 1
    assert sum(line.startswith("close") for line in log) == len(names) + 1
    taken = measured["contenders"]
    assert taken[EAGER]["parts"]["step"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert taken[EAGER]["parts"][WHOLE]["median"] == 22, "a sum: text, twenty steps, decode"
    assert measured["peak_gflops"] == {"float32": 16.0, "bfloat16": 16.0, "int8": 16.0}
    assert taken[EAGER]["peak_share"]["step"] == 1.0
    assert taken[EAGER]["agreement"]["agrees"] is True
    assert taken[EAGER]["agreement"]["decode_psnr_db"] is None, "equal"
    wrong = taken["diffusers, eager bfloat16"]["agreement"]
    assert wrong["agrees"] is False
    assert wrong["step_relative_error"] == 6.4


def test_without_memory_one_is_open_at_a_time(log, monkeypatch):
    monkeypatch.setattr(race, "available_bytes", lambda: 0)
    latency.measure(choice(only=("diffusers, eager",)))
    assert log.count(f"open {EAGER}") == log.count(f"close {EAGER}") == 2
    assert log.index(f"close {EAGER}") < log.index("open diffusers, eager bfloat16")


def test_a_second_call_goes_on(log, tmp_path):
    out = tmp_path / "latency.json"
    latency.measure(choice(only=("eager float32", "OpenVINO float32"), repeats=1), out)
    first = json.loads(out.read_text())["contenders"]
    assert first[OPENVINO] == {"rounds": [], "skipped": "opening: no such backend"}
    log.clear()
    latency.measure(choice(only=("eager float32",), repeats=1), out)
    assert log == [], "all is there"
    latency.measure(choice(only=("eager",)), out)
    assert steps_of(log).count(EAGER) == 1
    assert steps_of(log).count("diffusers, eager bfloat16") == 2
    rounds = json.loads(out.read_text())["contenders"]
    assert {len(rounds[name]["rounds"]) for name in (EAGER, PEAK)} == {2}


def test_figures_of_another_request_are_not_mixed(log, tmp_path):
    out = tmp_path / "latency.json"
    latency.measure(choice(only=(REFERENCE,), repeats=1), out)
    with pytest.raises(OutputError, match="another request or machine"):
        latency.measure(choice(only=(REFERENCE,), repeats=1, whole=True), out)


def test_the_table_shows_who_was_measured_and_who_was_not(log, tmp_path, monkeypatch):
    measured = latency.measure(choice(only=("ONNX Runtime", "eager", "OpenVINO float32")))
    table = comparison_tables.latency_table(measured)
    assert f"| {EAGER} | 22.00 s, 22.00 s to 22.00 s (5%), × 1.00 | 1.00 s" in table
    assert f"- not measured: {OPENVINO} (opening: no such backend)" in table
    assert table.count("computes something else") == 1
    (tmp_path / "latency.json").write_text(json.dumps(measured))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    places = "\n".join([report.BEGIN.format("latency"), report.END.format("latency")])
    assert table in report.inserted(places, "latency", "README.md")


def test_a_table_of_nothing():
    empty = {
        "machine": {"processor": "P"},
        "request": choice().request(),
        "peak_gflops": {},
        "flops": dict.fromkeys(PARTS, 1),
        "contenders": {REFERENCE: {"rounds": [], "skipped": "no"}},
    }
    assert f"- not measured: {REFERENCE} (no)" in comparison_tables.latency_table(empty)


def test_what_is_run_without_a_choice():
    quick = choice(model="pictogram").contenders()
    assert REFERENCE in quick
    assert not any("torch.compile" in name for name in quick), "compiling takes minutes"
    same = [name for name, contender in MEASURED.items() if not contender.draws]
    assert choice().contenders() == [name for name in same if "cpp" not in name], "no parts"
    assert choice(whole=True).contenders() == same
    assert choice(model="pictogram", only=("torch.compile",)).contenders()[0] == PEAK
    with pytest.raises(RequestError, match="no contender is called TensorFlow; there are"):
        choice(only=("TensorFlow",)).contenders()
    with pytest.raises(RequestError, match="choose pictogram, sd15"):
        choice(model="sd3")


ONE_STEP = (
    "latentrt, OpenVINO bfloat16",
    "diffusers, eager bfloat16",
    "diffusers, torch.compile bfloat16",
    "optimum-intel, OpenVINO bfloat16",
)
OF_OTHER_MODELS = tuple(
    f"{name} bfloat16, {model}"
    for model in (FULL, "SDXS")
    for name in ("latentrt, OpenVINO", "diffusers, eager", "optimum-intel, OpenVINO")
)


def test_one_run_has_few_step_models_beside_each_other():
    chosen = choice(model="sdturbo")
    assert chosen.contenders() == [PEAK, *ONE_STEP, *OF_OTHER_MODELS]
    named = choice(model="sdturbo", only=("latentrt, OpenVINO bfloat16",)).contenders()
    assert named == [PEAK, ONE_STEP[0], OF_OTHER_MODELS[0], OF_OTHER_MODELS[3]], "nothing is cached"
    more = whole_of(4)
    assert chosen.parts(ONE_STEP[0]) == (*PARTS, WHOLE, more), "requests are run, not added up"
    assert chosen.scenario.wholes == {WHOLE: 1, more: 4}
    assert not chosen.scenario.is_guided
    assert chosen.request()["more_steps"] == 4
    assert "more_steps" not in choice().request(), "figures of before are gone on with"
    draws = {CONTENDERS[name].draws for name in OF_OTHER_MODELS}
    assert draws == set(chosen.scenario.beside) == {"sdturbo_full", "sdxs"}


def test_the_table_of_few_step_models(log, monkeypatch):
    monkeypatch.setattr(FakeWorker, "ready", lambda self, bound_s: {"parts": ALL_PARTS})
    counted = dict.fromkeys(ALL_PARTS, 16e9)
    monkeypatch.setattr(latency, "request_flops", lambda scenario: counted)
    measured = latency.measure(choice(model="sdturbo", repeats=1))
    ours, _, _, optimum = ONE_STEP
    full, *_, sdxs = (name for name in OF_OTHER_MODELS if name.startswith("latentrt"))
    assert "agreement" in measured["contenders"][ours]
    assert "agreement" not in measured["contenders"][full], "it is another model's"
    assert measured["contenders"][full]["peak_share"]["step"] is None
    table = comparison_tables.latency_table(measured)
    assert "| | whole request | whole request of 4 steps | text | UNet step | VAE decode |" in table
    assert f"| {ours} | {optimum} | 1.00, 1.00 to 1.00 | 1.00, 1.00 to 1.00 |" in table
    assert f"| {ours} | {full} | 1.00" in table
    assert f"| {full} | optimum-intel, OpenVINO bfloat16, {FULL} | 1.00" in table
    assert f"| {ours} | {sdxs} |" not in table
    assert f"| {ours} | optimum-intel, OpenVINO bfloat16, SDXS |" not in table, "not the same model"


def small_model(name):
    made = RANDOM_MODELS[name]
    unet, levels = made.configs["unet"], len(made.configs["unet"].block_out_channels)
    text = replace(load.CLIP_L, hidden_size=64, num_attention_heads=1, num_hidden_layers=1)
    configs = {
        "text_encoder": text,
        "unet": replace(
            unet,
            block_out_channels=(64,) * levels,
            attention_head_dim=(1,) * levels,
            cross_attention_dim=64,
        ),
        "vae": VAE if name == "sdturbo_full" else made.configs["vae"],
    }
    return replace(made, configs=configs)


@pytest.mark.parametrize("name", ["sdturbo", "sdturbo_full", "sdxs"])
def test_a_peer_draws_few_step_models_without_guidance(name, tmp_path, monkeypatch):
    models = {name: small_model(name)}
    monkeypatch.setattr("benchmarks.random_models.RANDOM_MODELS", models)
    monkeypatch.setattr("benchmarks.scenarios.RANDOM_MODELS", models)
    monkeypatch.setattr("benchmarks.scenarios.cache_folder", lambda: tmp_path)
    scenario = replace(MODELS[name], size=64)
    parts = CONTENDERS[EAGER].open(scenario, 1)
    assert parts["text"]().shape == (1, 77, 64), "the prompt alone"
    assert parts["step"]().shape == (1, 4, 8, 8)
    one, four = (parts[whole]() for whole in scenario.wholes)
    assert one.shape == four.shape == parts["decode"]().shape == (1, 64, 64, 3)
    assert np.abs(one.astype(int) - four).max() > 0
    step = engine_inputs(scenario, Model.open(scenario.model()))["step"]
    assert step["guidance"].shape == (1, 1, 1, 1, 1)
    assert step["context"].shape == (1, 1, 77, 64)


def test_the_program_measures_the_model_that_ships(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(latency.Choice, "contenders", lambda self: [REFERENCE])
    out = tmp_path / "latency.json"
    options = ["--only", REFERENCE, "--repeats", "1", "--threads", "1", "--out", str(out)]
    assert main(["latency", *options]) == 0
    measured = json.loads(out.read_text())
    assert measured == json.loads(capsys.readouterr().out)
    found = measured["contenders"][REFERENCE]
    assert found["parts"].keys() == {*PARTS, WHOLE}
    assert found["peak_bytes"] > 2**25
    assert found["peak_share"]["step"] is None, "the peak was not measured"
    assert comparison_tables.latency_table(measured)


def test_a_process_that_is_late_or_fails_says_so():
    worker = Worker(REFERENCE, "pictogram", 1)
    with pytest.raises(ContenderError, match="opening took longer than its bound of 0 s"):
        worker.ready(0.0)
    worker.ready(60)
    with pytest.raises(ContenderError, match="texture: KeyError: 'texture'"):
        worker.run("texture", 60)
    with pytest.raises(ContenderError, match="the process ended"):
        worker.run("text", 60)
    worker.close()
    ended = Worker("a contender that is not there", "pictogram", 1)
    with pytest.raises(ContenderError, match="KeyError"):
        ended.ready(60)
    ended.close()


@pytest.mark.parametrize(
    ("name", "tolerance"), [(EAGER, PARITY_RTOL), ("diffusers, eager bfloat16", BFLOAT16_RTOL)]
)
def test_a_peer_computes_the_same(name, tolerance):
    scenario = replace(SCENARIOS["pictogram"], steps=2)
    ours, theirs = (CONTENDERS[each].open(scenario, 1) for each in (REFERENCE, name))
    for part in ("text", "step"):
        assert relative_error(theirs[part](), ours[part]()) <= tolerance
    for part in ("decode", WHOLE):
        given, expected = theirs[part](), ours[part]()
        assert given.shape[-3:] == (128, 128, 3)
        assert psnr(given, expected) >= PICTURE_PSNR_DB


@pytest.mark.filterwarnings("ignore::UserWarning")  # of tracing, about code of diffusers
def test_a_compiled_peer_computes_the_same(monkeypatch):
    compiled = partial(torch.compile, backend="eager")  # traced, without the compiler's minutes
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(inductor, "freezing", False)  # and as it was after the test
    scenario = replace(SCENARIOS["pictogram"], steps=2)
    name = "diffusers, torch.compile float32"
    ours, theirs = (CONTENDERS[each].open(scenario, 1) for each in (REFERENCE, name))
    assert inductor.freezing
    assert relative_error(theirs["step"](), ours["step"]()) <= PARITY_RTOL
    for part in ("decode", WHOLE):
        assert psnr(theirs[part](), ours[part]()) >= PICTURE_PSNR_DB


def test_the_peak_is_measured_in_two_precisions(monkeypatch):
    monkeypatch.setattr("benchmarks.contenders.PEAK_SIDE", 8)
    parts = MEASURED[PEAK].open(SCENARIOS["pictogram"], 1)
    assert set(parts) == set(choice().parts(PEAK))
    assert relative_error(parts["bfloat16"](), parts["float32"]()[:1]) <= BFLOAT16_RTOL
    np.testing.assert_allclose(parts["float32 of torch"](), parts["float32"]()[:1], rtol=1e-5)


def test_peers_load_a_file_as_a_folder(tmp_path, monkeypatch):
    small = replace(load.SD1, block_out_channels=(32, 32, 32, 32), cross_attention_dim=64)
    text = replace(load.CLIP_L, hidden_size=64, num_attention_heads=1, num_hidden_layers=1)
    monkeypatch.setattr(load, "SD1", small)
    monkeypatch.setattr(load, "CLIP_L", text)
    monkeypatch.setattr(load, "AutoencoderConfig", lambda: VAE)
    monkeypatch.setattr("benchmarks.scenarios.cache_folder", lambda: tmp_path)
    scenario = SCENARIOS["sd15"]
    folder, model = scenario.folder(), Model.open(scenario.model())
    assert write_folder(model) == folder, "the second time it is there"
    ours = Model.open(folder)
    assert ours.configs == model.configs
    peer = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    for name in ("unet", "vae", "text_encoder"):
        weights = model.find(name)
        for key, value in getattr(peer, name).state_dict().items():
            if not key.endswith("position_ids"):
                key = key if key in weights else f"text_model.{key}"
                np.testing.assert_array_equal(value.float().numpy(), weights[key].astype("f"))
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    texts = ["", scenario.prompt]
    theirs = tokenizer(texts, padding="max_length", max_length=77).input_ids
    np.testing.assert_array_equal(theirs, load_tokenizers(model)["text_encoder"](texts).input_ids)


def test_a_peer_that_shows_no_parts_is_asked_for_whole_requests(log, monkeypatch):
    name = "stable-diffusion.cpp float32"
    asked = []

    class StableDiffusion:
        def __init__(self, **settings):
            asked.append(settings)

        def generate_image(self, **options):
            asked.append(options)
            return [Image.new("RGBA", (options["width"], options["height"]))]

    library = SimpleNamespace(StableDiffusion=StableDiffusion)
    monkeypatch.setitem(sys.modules, "stable_diffusion_cpp", library)
    monkeypatch.setattr("benchmarks.scenarios.Scenario.model", lambda self: "file")
    parts = CONTENDERS[name].open(SCENARIOS["sd15"], 1)
    assert parts.keys() == {WHOLE}
    assert parts[WHOLE]().shape == (512, 512, 3)
    assert asked[0]["model_path"] == "file"
    assert (asked[0]["n_threads"], asked[1]["sample_steps"], asked[1]["cfg_scale"]) == (1, 20, 5.0)
    monkeypatch.setattr(FakeWorker, "ready", lambda self, bound_s: {"parts": [WHOLE]})
    measured = latency.measure(choice(only=("cpp",), whole=True))
    found = measured["contenders"][name]
    assert found["parts"].keys() == {WHOLE}
    assert "agreement" not in found
    assert f"| {name} | 1.00 s, 1.00 s to 1.00 s | – | – | – | 1.00 GiB | – |" in (
        comparison_tables.latency_table(measured)
    )
    assert choice(only=("cpp",)).contenders() == [PEAK], "its parts cannot be timed"
