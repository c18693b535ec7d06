"""Models in pieces: the UNet, the text encoders and the autoencoder as files of their own."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.checkpoints.component import Component
from engine.errors import ModelError
from engine.model import Model
from tests.support.original_layout import SMALL, model_names, random_tensors

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
