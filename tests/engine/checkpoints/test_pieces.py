"""Models in pieces: the UNet, the text encoders and the autoencoder as files of their own."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.checkpoints.component import Component
from engine.errors import ModelError
from engine.model import Model
from tests.support.original_layout import SMALL, model_names, random_tensors

WIDTH = 16  # of what a number becomes that the small XL is told
UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXTS = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "xl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "xl-refiner": {"text_encoder_2": "conditioner.embedders.0.model."},
}
STATES = {family: random_tensors(model_names(SMALL[family])) for family in TEXTS}


def write(path, state):
    save_file({name: np.ascontiguousarray(value) for name, value in state.items()}, path)
    return path


def whole(folder, family):
    return Model.open(write(folder / "whole.safetensors", STATES[family]))


def pieces(folder, family, *, bare=True):
    """Cut a model into files, with names that have lost what stood before all of them."""
    prefixes = {"unet": UNET, "vae": VAE, **TEXTS[family]}
    return {
        name: write(
            folder / f"{name}.safetensors",
            {
                stored.removeprefix(prefix if bare or name == "vae" else ""): value
                for stored, value in STATES[family].items()
                if stored.startswith(prefix)
            },
        )
        for name, prefix in prefixes.items()
    }


def converted(folder, family):
    """Cut a model into files with the names of diffusers and transformers."""
    model = whole(folder, family)
    return {
        name: write(folder / f"{name}.safetensors", dict(model.component(name)))
        for name in model.configs
    }


def same(model, plain):
    assert model.configs == plain.configs
    assert model.family is plain.family
    assert dict(model.scheduler) == dict(plain.scheduler)
    assert model.zeros_for_empty_prompt == plain.zeros_for_empty_prompt
    for name in plain.configs:
        expected, found = plain.component(name), model.component(name)
        assert isinstance(found, Component)
        assert list(found) == list(expected)
        assert all(np.array_equal(found[each], expected[each]) for each in expected)


@pytest.mark.parametrize("family", TEXTS)
@pytest.mark.parametrize("bare", [True, False])
def test_a_model_in_pieces_is_the_model(tmp_path, family, bare):
    given = pieces(tmp_path, family, bare=bare)
    same(Model.open(given["unet"], **given), whole(tmp_path, family))


@pytest.mark.parametrize("family", ["sd1", "xl"])
def test_pieces_may_have_the_names_of_diffusers(tmp_path, family):
    given = converted(tmp_path, family)
    model, plain = Model.open(given["unet"], **given), whole(tmp_path, family)
    for name in plain.configs:
        expected, found = plain.component(name), model.component(name)
        assert all(np.array_equal(found[each], expected[each]) for each in expected)
        if name in ("unet", "vae"):
            assert model.configs[name] == plain.configs[name]


@pytest.mark.parametrize("replaced", ["unet", "text_encoder", "text_encoder_2", "vae"])
def test_a_piece_replaces_the_models_own(tmp_path, replaced):
    given = pieces(tmp_path, "xl")
    other = {n: v + np.float32(1) for n, v in STATES["xl"].items()}
    base = write(tmp_path / "other.safetensors", other)
    model = Model.open(base, **{replaced: given[replaced]})
    plain, changed = whole(tmp_path, "xl"), Model.open(base)
    for name in plain.configs:
        expected = (plain if name == replaced else changed).component(name)
        assert all(np.array_equal(model.component(name)[each], expected[each]) for each in expected)
    assert any(str(given[replaced]) in note for note in model.notes)


FORMS = ("one file", "pieces", "converted", "a folder of the UNet")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [5, 6])
def test_the_pooled_texts_width_tells_how_many_numbers_xl_is_told(tmp_path, form, count):
    """Two text encoders and an aesthetics score: 5 numbers, as in diffusers' own dummy models."""
    params = SMALL["xl"]
    unet = replace(params.unet, adm_in_channels=params.open_clip.projection + count * WIDTH)
    state = random_tensors(model_names(replace(params, unet=unet)))
    path = write(tmp_path / "whole.safetensors", state)
    if form == "one file":
        model = Model.open(path)
    elif form == "pieces":
        given = {
            name: write(tmp_path / f"{name}.safetensors", dict(under(state, prefix)))
            for name, prefix in {"unet": UNET, "vae": VAE, **TEXTS["xl"]}.items()
        }
        model = Model.open(given["unet"], **given)
    else:
        plain = Model.open(path)
        given = {
            name: write(tmp_path / f"{name}.safetensors", dict(plain.component(name)))
            for name in plain.configs
        }
        if form == "a folder of the UNet":
            folder = tmp_path / "unet"
            folder.mkdir()
            given["unet"].rename(folder / "diffusion_pytorch_model.safetensors")
            config = asdict(replace(plain.unet, time_ids=0))
            (folder / "config.json").write_text(json.dumps(config))
            given["unet"] = folder
        model = Model.open(given["unet"], **given)
    assert model.unet.addition_time_ids == count
    assert model.unet.symbols()["P"] == params.open_clip.projection


def under(state, prefix):
    return ((n.removeprefix(prefix), v) for n, v in state.items() if n.startswith(prefix))


def test_a_piece_of_few_steps_is_known_by_its_name(tmp_path):
    given = pieces(tmp_path, "xl")
    lightning = given["unet"].rename(tmp_path / "sdxl_lightning_4step_unet.safetensors")
    alone = Model.open(lightning, **given | {"unet": lightning})
    beside = Model.open(write(tmp_path / "base.safetensors", STATES["xl"]), unet=lightning)
    for model in (alone, beside):
        assert (model.variant.name, model.steps, model.guidance_scale) == ("lightning", 4, 1.0)
        assert model.scheduler["timestep_spacing"] == "trailing"


def test_what_is_no_piece_is_refused(tmp_path):
    given = pieces(tmp_path, "sd1")
    base = write(tmp_path / "base.safetensors", STATES["sd1"])
    with pytest.raises(ModelError, match=r"vae\.safetensors holds no UNet"):
        Model.open(base, unet=given["vae"])
    with pytest.raises(ModelError, match=r"vae\.safetensors holds no text encoder"):
        Model.open(base, text_encoder=given["vae"])
    with pytest.raises(ModelError, match=r"unet\.safetensors holds no vae; give one with --vae"):
        Model.open(given["unet"], unet=given["unet"], text_encoder=given["text_encoder"])
    with pytest.raises(ModelError, match="text encoders that make none"):
        Model.open(given["unet"], unet=given["unet"], vae=given["vae"])
    (tmp_path / "xl").mkdir()
    with pytest.raises(ModelError, match=r"attends to|no unet that runs"):
        Model.open(base, unet=pieces(tmp_path / "xl", "xl")["unet"])
    left = {f"{UNET}extra.weight": np.ones(1)} | STATES["sd1"]
    odd = write(tmp_path / "odd.safetensors", left)
    with pytest.raises(ModelError, match=r"holds extra\.weight"):
        Model.open(base, unet=odd)
