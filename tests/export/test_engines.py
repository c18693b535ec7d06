"""`python -m export MODEL --backend tensorrt_rtx`, which builds engines where no GPU is."""

import argparse
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.adapters.adapter import adapt_model
from engine.backends.tensorrt.engine_store import EngineStore, weights_hash
from engine.backends.tensorrt.profiles import GROUPS, Range, relevant
from engine.errors import USER_ERROR, BackendError
from engine.model import Model, find_model
from export.__main__ import main
from export.engine_options import add_engine_options, engine_choices

MODEL = Model.open(find_model("pictogram"))
PART = "preview_decoder"  # the one that is built soonest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))


def choices(*arguments, backend="tensorrt_rtx"):
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision")
    add_engine_options(parser)
    return engine_choices(MODEL, parser.parse_args(["--backend", backend, *arguments]))


def build(*arguments):
    return main(["pictogram", "--backend", "tensorrt_rtx", "--parts", PART, *arguments])


def test_an_engine_for_each_target_is_built_once(capsys):
    assert build("--target", "sm86,sm120") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{PART}  sm86  ")
    assert " s  " in first
    assert second.startswith(f"{PART}  sm120  ")
    assert build("--target", "sm120,sm86") == 0
    assert capsys.readouterr().out.count("was there") == 2
    found = [facts for facts, _ in EngineStore().find(library="tensorrt_rtx", part=PART)]
    assert {facts.sm for facts in found} == {"sm86", "sm120"}
    assert {(facts.device, facts.driver) for facts in found} == {(None, None)}
    assert main(["cache"]) == 0
    assert "2 files" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no GPU 0 of NVIDIA's can be used|built only beside"),
        (["--target", "sm90"], "does not support Hopper"),
        (["--target", "sm86", "--height", "100"], "must be a multiple of 8"),
        (["--target", "sm86", "--height", "64:x"], "'64:x' is no range"),
        (["--target", "sm86", "--height", "64,128", "--width", "64,96,128"], "one for each prof"),
        (["--target", "sm86", "--precision", "float32"], "does not compute in float32"),
        (["--target", "sm86", "--workspace", "-1"], "--workspace is -1"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(arguments, message, capsys):
    assert build(*arguments) == USER_ERROR
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert re.search(message, error)
    assert not [*EngineStore().folder.glob("*.engine")]


def test_sizes_become_profiles():
    (plain,) = choices().settings.profiles
    side = MODEL.sample_size * MODEL.vae.compression
    assert plain.height == plain.width == Range(side, side, side)
    assert plain.batch == Range(1, 1, 1)
    assert plain.tokens == Range(32, 32, 32), "of the model's own text encoder"
    ranged = choices("--height", "64:128", "--width", "64:96:128", "--batch", "1:4").settings
    assert ranged.profiles[0].width == Range(64, 96, 128)
    assert ranged.profiles[0].batch == Range(1, 1, 4)
    several = choices("--height", "64,128", "--width", "64,128", "--batch", "2").settings.profiles
    assert [(p.height.max, p.width.max, p.batch.max) for p in several] == [
        (64, 64, 2),
        (128, 128, 2),
    ]


def test_other_options():
    given = choices(
        *("--target", "sm86,sm89", "--refit", "--optimization-level", "0", "--workspace", "1.5"),
        *("--lora", "a.safetensors:0.5"),
    )
    assert given.targets == ("sm86", "sm89")
    assert given.loras == ("a.safetensors:0.5",)
    assert (given.settings.refit, given.settings.optimization_level) == (True, 0)
    assert given.settings.workspace_bytes == 3 * 2**29
    assert given.precision == "float16"
    with pytest.raises(BackendError, match="takes no target"):
        choices("--target", "sm89", backend="tensorrt")


def test_a_part_is_built_once_for_sizes_that_it_does_not_see():
    large, small = (
        choices("--height", h, "--groups", g).settings.profiles[0]
        for h, g in (("128", "1:2:3"), ("64", "2"))
    )
    assert relevant("text_encoder", large) == relevant("text_encoder", small)
    assert relevant("step", large) != relevant("step", small)
    assert relevant("vae_decoder", large).groups == GROUPS


def test_adapters_are_built_in_under_the_hash_of_what_the_runtime_binds(tmp_path, capsys):
    down, up = np.ones((4, 192), np.float32), np.ones((192, 4), np.float32)
    name, lora = "lora_te_text_model_encoder_layers_0_self_attn_q_proj", tmp_path / "a.safetensors"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, lora)
    common = ["pictogram", "--backend", "tensorrt_rtx", "--parts", "text_encoder"]
    for more in ([], ["--lora", str(lora)]):
        assert main([*common, "--target", "sm86", *more]) == 0
    assert "was there" not in capsys.readouterr().out
    built_in = {facts.weights for facts, _ in EngineStore().find(part="text_encoder")}
    bound = set()
    for loras in ([], [lora]):
        adapted = adapt_model(MODEL, loras) if loras else {}
        weights = adapted.get("text_encoder") or MODEL.weights("text_encoder")
        bound.add(weights_hash({name: weights[name] for name in weights}))
    assert built_in == bound
