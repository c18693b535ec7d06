"""Names of tensors as training loops, compilers and converters leave them."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.checkpoints.formats.files import open_weights
from engine.errors import MissingTensorError
from engine.model import Model
from tests.support.original_layout import SMALL, model_names, random_tensors

UNET = "model.diffusion_model."
STATES = {family: random_tensors(model_names(SMALL[family])) for family in ("sd1", "sd2", "xl")}
PLACE = "conditioner.embedders.1.model."
WRAPPED = {
    "DataParallel": lambda name: f"module.{name}",
    "DataParallel twice": lambda name: f"module.module.{name}",
    "torch.compile": lambda name: name.replace(UNET, f"{UNET}_orig_mod."),
    "torch.compile of blocks": lambda name: name.replace(
        "middle_block.1", "middle_block.1._orig_mod"
    ),
    "one part in parallel": lambda name: name.replace(UNET, f"{UNET}module."),
    "FSDP": lambda name: name.replace("input_blocks.1", "input_blocks.1._fsdp_wrapped_module"),
    "a loop's dictionary": lambda name: f"model_state_dict.{name}",
    "nested dictionaries": lambda name: f"checkpoint.model.{name}",
    "PEFT": lambda name: f"base_model.model.{name}",
    "all at once": lambda name: f"model_state_dict.module._orig_mod.{name}",
}


def written(folder, state, name="model"):
    path = folder / f"{name}.safetensors"
    save_file(state, path)
    return path


def same(model, plain):
    assert model.configs == plain.configs
    for name in plain.configs:
        expected = plain.component(name)
        found = model.component(name)
        assert list(found) == list(expected)
        assert all(np.array_equal(found[tensor], expected[tensor]) for tensor in expected)


@pytest.mark.parametrize("rename", WRAPPED.values(), ids=WRAPPED)
def test_what_programs_put_before_names_means_nothing(tmp_path, rename):
    state = STATES["sd1"]
    plain = Model.read(written(tmp_path, state))
    wrapped = written(tmp_path, {rename(name): value for name, value in state.items()}, "wrapped")
    same(Model.read(wrapped), plain)


def test_what_stands_beside_a_wrapped_model_is_named(tmp_path):
    state = {f"net_g.{name}": value for name, value in STATES["sd1"].items()}
    state["optimizer.state.0.exp_avg"] = np.zeros(2, np.float32)
    model = Model.read(written(tmp_path, state))
    assert "those under 'optimizer' are not used" in model.notes
    assert "the tensors that are used stand under net_g" in model.notes


def test_of_two_models_in_a_file_the_first_counts(tmp_path):
    state = {f"ema.{name}": value for name, value in STATES["sd1"].items()}
    state |= {f"model.{name}": value + 1 for name, value in STATES["sd1"].items()}
    same(Model.read(written(tmp_path, state)), Model.read(written(tmp_path, STATES["sd1"], "a")))


def test_a_name_that_two_tensors_would_share_stays(tmp_path):
    path = written(tmp_path, {"module.a": np.ones(1), "a": np.ones(1)})
    assert set(open_weights(path)) == {"module.a", "a"}


def test_the_projection_of_a_linear_layer_is_the_transpose(tmp_path):
    state = dict(STATES["xl"])
    plain = Model.read(written(tmp_path, state))
    state[f"{PLACE}text_projection.weight"] = state.pop(f"{PLACE}text_projection").T.copy()
    state[f"{PLACE}text_model.embeddings.position_ids"] = np.arange(77)[None]
    state.pop(f"{PLACE}logit_scale", None)
    same(Model.read(written(tmp_path, state, "odd")), plain)


MISSING = {
    "sd1": ("unet", "Stable Diffusion 1.x", f"{UNET}out.2.weight"),
    "sd2": ("unet", "Stable Diffusion 2.x", f"{UNET}input_blocks.0.0.weight"),
    "xl": ("text_encoder_2", "Stable Diffusion XL", f"{PLACE}token_embedding.weight"),
}


@pytest.mark.parametrize("family", MISSING)
def test_what_a_file_holds_is_said_where_a_name_is_missing(tmp_path, family):
    part, title, lost = MISSING[family]
    state = {name: value for name, value in STATES[family].items() if name != lost}
    with pytest.raises(MissingTensorError) as caught:
        Model.read(written(tmp_path, state))
    message = str(caught.value)
    assert f"lacks {lost}" in message
    assert f"of the names of {title} it holds " in message
    assert f" of the {part}" in message
    assert "\n" not in message


def test_a_foreign_prefix_is_said(tmp_path):
    state = {n.replace("first_stage_model.", "vae_of_mine."): v for n, v in STATES["sd1"].items()}
    lost = f"{UNET}out.0.weight"
    with pytest.raises(MissingTensorError, match=r"of the vae under 'vae_of_mine\.'"):
        Model.read(written(tmp_path, {n: v for n, v in state.items() if n != lost}))
