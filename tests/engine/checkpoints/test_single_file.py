"""Whole models in one file, and autoencoders alone: every tensor has its place or is refused."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers import AutoencoderKL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModel

from engine.checkpoints.component import Component, diffusers_component
from engine.checkpoints.formats.files import open_weights
from engine.checkpoints.single_file import open_vae
from engine.configs.diffusion import AutoencoderConfig, TextEncoderConfig
from engine.errors import ModelError
from engine.model import Model
from tests.support import original_layout as original
from tests.support.parity import text_checkpoint

SMALL = {
    **original.SMALL,
    **{f"{name} inpainting": original.inpainting(p) for name, p in original.SMALL.items()},
    **{f"{name} lcm": original.consistency(p) for name, p in original.SMALL.items()},
}


def write(path, tensors, **options):
    safetensors.numpy.save_file(tensors, path, **options)
    return path


def components(model):
    return {name: model.component(name) for name in model.configs}


def opened(path, tensors, **options):
    return Model.read(write(path / "model.safetensors", tensors, **options))


@pytest.fixture(params=SMALL)
def small(request):
    return SMALL[request.param], original.random_tensors(original.model_names(SMALL[request.param]))


def test_every_part_has_its_graphs_names_and_shapes(small, tmp_path):
    params, tensors = small
    checkpoint = opened(tmp_path, tensors)
    assert set(components(checkpoint)) == set(checkpoint.configs)
    assert len(components(checkpoint)) == len(original.parts(params))
    for name, component in components(checkpoint).items():
        shapes = checkpoint.configs[name].tensor_shapes()
        assert {key: array.shape for key, array in component.items()} == shapes
        assert len(component) == len(shapes)
        assert checkpoint.component(name) is component
    assert checkpoint.is_inpainting == (params.unet.in_channels == 9)
    assert checkpoint.unet.time_cond_proj_dim == (params.unet.time_cond or 0)
    if params.unet.adm_in_channels:
        assert checkpoint.unet.addition_time_embed_dim == 16
        assert checkpoint.unet.addition_time_ids == (6 if params.clip else 5)


def test_every_number_is_used_once(small, tmp_path):
    params, tensors = small
    checkpoint = opened(tmp_path, tensors)
    used = [array for part in components(checkpoint).values() for array in part.values()]
    unused = set(original.SCHEDULE) | {"denoiser.sigmas"}
    unused |= {name for name in tensors if name.endswith("logit_scale")}
    if checkpoint.family.name == "sd2":
        last = params.open_clip.layers - 1
        start = f"{original.OPEN_CLIP}transformer.resblocks.{last}."
        unused |= {name for name in tensors if name.startswith(start)}
        unused.add(f"{original.OPEN_CLIP}text_projection")
    expected = [array for name, array in tensors.items() if name not in unused]
    total = [np.sort(np.concatenate([a.ravel() for a in arrays])) for arrays in (used, expected)]
    assert np.array_equal(*total)


def test_arrays_are_views_of_the_file(tmp_path):
    checkpoint = opened(tmp_path, original.random_tensors(original.model_names(SMALL["xl"])))
    for component in components(checkpoint).values():
        for name in component:
            assert component[name].base is not None
            assert not component[name].flags.writeable
            assert name in component
        assert "nothing" not in component
        with pytest.raises(KeyError):
            component["nothing"]
        assert component == component
        assert component != dict(component)
        assert len({component, component}) == 1


def test_a_pickled_checkpoint_is_read_as_well(tmp_path):
    tensors = original.random_tensors(original.model_names(SMALL["sd2"]))
    state = {name: torch.from_numpy(value) for name, value in tensors.items()}
    torch.save({"state_dict": state, "global_step": 4}, tmp_path / "512-base-ema.ckpt")
    checkpoint = Model.read(tmp_path / "512-base-ema.ckpt")
    same = opened(tmp_path, tensors)
    for name, component in components(checkpoint).items():
        for key, array in component.items():
            assert np.array_equal(array, same.component(name)[key])
    assert checkpoint.scheduler["prediction_type"] == "epsilon"
    assert same.scheduler["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("family", original.SMALL)
def test_every_missing_tensor_is_named(family, tmp_path):
    names = original.model_names(original.SMALL[family])
    unused = set(original.SCHEDULE) | {"denoiser.sigmas"}
    checkpoint = Model.read(original.write_sparse(tmp_path / "whole.safetensors", names))
    used = set().union(*(part.used() for part in components(checkpoint).values()))
    assert used <= names.keys() - unused
    for name in sorted(used)[::29]:
        lacking = {other: shape for other, shape in names.items() if other != name}
        file = original.write_sparse(tmp_path / "lacking.safetensors", lacking)
        with pytest.raises(ModelError, match=re.escape(f"{file} lacks {name}")):
            Model.read(file)


@pytest.mark.parametrize("family", original.SMALL)
def test_every_wrong_shape_is_found(family, tmp_path):
    names = original.model_names(original.SMALL[family])
    # what an architecture may have more of, without any other tensor
    free = {name for name in names if "token_embedding" in name or "position" in name}
    checkpoint = Model.read(original.write_sparse(tmp_path / "whole.safetensors", names))
    used = set().union(*(part.used() for part in components(checkpoint).values()))
    for name in sorted(used - free)[1::41]:
        for shape in ((), (*names[name], 1), (names[name][0] + 1, *names[name][1:])):
            file = original.write_sparse(tmp_path / "wrong.safetensors", names | {name: shape})
            with pytest.raises(ModelError, match=re.escape(str(file))):
                Model.read(file)


def test_a_wrong_shape_is_explained(tmp_path):
    name = "model.diffusion_model.input_blocks.1.0.out_layers.3.bias"
    names = original.model_names(SMALL["sd1"]) | {name: (33,)}
    file = original.write_sparse(tmp_path / "wrong.safetensors", names)
    message = f"{file}: {name} has shape [33], and down_blocks.0.resnets.0.conv2.bias"
    with pytest.raises(ModelError, match=re.escape(message)):
        Model.read(file)


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.1.0.in_layers.2.extra",
        "model.diffusion_model.input_blocks.1.2.weight",
        "model.diffusion_model.output_blocks.9.0.in_layers.0.weight",
        "first_stage_model.decoder.up.0.block.9.norm1.weight",
        "cond_stage_model.transformer.text_model.extra",
        "something.weight",
        "x" * 200,
    ],
)
def test_a_tensor_left_over_is_named(name, tmp_path):
    names = original.model_names(SMALL["sd1"])
    for added in ({name: (1,)}, {name: (1,), "zzz": (1,)}):
        file = original.write_sparse(tmp_path / "more.safetensors", names | added)
        more = " and 1 more tensors" if "zzz" in added else ""
        with pytest.raises(ModelError, match=re.escape(f"{file} holds {name}{more}, for which")):
            Model.read(file)


@pytest.mark.parametrize("name", ["two\nlines", "x" * 10_000, "\x1b[31m"])
def test_a_hostile_name_is_shown_on_one_short_line(name, tmp_path):
    for names in ({name: (1,)}, original.model_names(SMALL["sd1"]) | {name: (1,)}):
        file = original.write_sparse(tmp_path / "hostile.safetensors", names)
        with pytest.raises(ModelError) as caught:
            Model.read(file)
        message = str(caught.value)
        assert message.isprintable()
        assert len(message) < 500 + len(str(file))


def test_a_layer_too_many_is_left_over(tmp_path):
    names = original.model_names(SMALL["sd2"])
    layer = f"{original.OPEN_CLIP}transformer.resblocks.7."
    file = original.write_sparse(tmp_path / "m.safetensors", names | {f"{layer}ln_1.bias": (128,)})
    with pytest.raises(ModelError, match=re.escape(layer)):
        Model.read(file)


def test_quantised_weights_are_refused(tmp_path):
    tensors = original.random_tensors(original.model_names(SMALL["sd1"]))
    name = "model.diffusion_model.out.2.weight"
    with pytest.raises(ModelError, match=re.escape(f"{name} has dtype I8")):
        opened(tmp_path, tensors | {name: tensors[name].astype(np.int8)})


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_weights_stay_as_they_are_stored(dtype, tmp_path):
    tensors = original.random_tensors(original.model_names(SMALL["sd2"]))
    checkpoint = opened(tmp_path, {name: value.astype(dtype) for name, value in tensors.items()})
    for component in components(checkpoint).values():
        assert {array.dtype for array in component.values()} == {np.dtype(dtype)}


def test_averaged_weights_that_are_incomplete_are_not_used(tmp_path):
    names = original.model_names(SMALL["sd1"], ema=True)
    tensors = original.random_tensors(names)
    del tensors["model_ema.diffusion_modelout2weight"]
    checkpoint = opened(tmp_path, tensors)
    plain = tensors["model.diffusion_model.out.0.weight"]
    assert np.array_equal(checkpoint.component("unet")["conv_norm_out.weight"], plain)
    assert any("incomplete" in note for note in checkpoint.notes)
    whole = opened(tmp_path, original.random_tensors(names))
    averaged = original.random_tensors(names)["model_ema.diffusion_modelout0weight"]
    assert np.array_equal(whole.component("unet")["conv_norm_out.weight"], averaged)


def test_old_files_without_text_model_are_read(tmp_path):
    tensors = original.random_tensors(original.model_names(SMALL["sd1"]))
    old = {
        name.replace("transformer.text_model.", "transformer."): v for name, v in tensors.items()
    }
    old["cond_stage_model.transformer.embeddings.position_ids"] = np.arange(16)[None]
    assert old.keys() != tensors.keys()
    new = opened(tmp_path, tensors).component("text_encoder")
    component = opened(tmp_path, old).component("text_encoder")
    assert list(component) == list(new)
    assert all(np.array_equal(component[name], new[name]) for name in new)


def test_the_embedded_guidance_scale_may_have_diffusers_name(tmp_path):
    tensors = original.random_tensors(original.model_names(SMALL["sd1 lcm"]))
    value = tensors.pop("model.diffusion_model.time_embed.cond_proj.weight")
    tensors["model.diffusion_model.time_embedding.cond_proj.weight"] = value
    component = opened(tmp_path, tensors).component("unet")
    assert np.array_equal(component["time_embedding.cond_proj.weight"], value)


def test_notes_say_what_was_concluded(tmp_path):
    tensors = original.random_tensors(original.model_names(SMALL["xl"]))
    checkpoint = opened(tmp_path, tensors | {"v_pred": np.zeros(0), "ztsnr": np.zeros(0)})
    assert checkpoint.notes == (
        "model.safetensors is of the family Stable Diffusion XL",
        "its prediction type is v_prediction, from the tensor v_pred in the file",
        "its noise schedule ends in pure noise, from the tensor ztsnr in the file",
    )
    asked = Model.read(tmp_path / "model.safetensors", "epsilon")
    assert asked.scheduler["prediction_type"] == "epsilon"
    with pytest.raises(ModelError, match="'noise' is unknown"):
        Model.read(tmp_path / "model.safetensors", "noise")


def test_metadata_are_read(tmp_path):
    tensors = original.random_tensors(original.model_names(SMALL["sd2"]))
    metadata = {"modelspec.prediction_type": "epsilon", "modelspec.resolution": "256x512"}
    checkpoint = opened(tmp_path, tensors, metadata=metadata)
    assert checkpoint.scheduler["prediction_type"] == "epsilon"
    assert checkpoint.sample_size == 512 // 4  # the small autoencoder's


MUTATED = original.model_names(SMALL["xl"])


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_change_of_names_and_shapes_is_read_or_refused(data, tmp_path):
    names = dict(MUTATED)
    keys = st.sampled_from(sorted(MUTATED))
    for name in data.draw(st.lists(keys, max_size=3), label="lost"):
        names.pop(name, None)
    for name in data.draw(st.lists(keys, max_size=2), label="reshaped"):
        names[name] = tuple(data.draw(st.lists(st.integers(0, 5), max_size=5), label="shape"))
    for name in data.draw(st.lists(keys, max_size=2), label="renamed"):
        names[data.draw(keys | st.text(max_size=9), label="as")] = names.pop(name, (1,))
    file = original.write_sparse(tmp_path / "mutated.safetensors", names)
    message = f"{file} is fine"
    try:
        Model.read(file)
    except ModelError as error:
        message = str(error)
    assert str(file) in message
    assert len(message) < 500 + len(str(file))
    assert "\n" not in message


VAE = AutoencoderConfig(block_out_channels=(32, 32, 64), layers_per_block=1, scaling_factor=0.18215)


def vae_tensors(prefix=""):
    names = original.autoencoder_names(original.SMALL["sd1"].vae)
    return original.random_tensors({prefix + name: shape for name, shape in names.items()})


def same(component, expected):
    assert list(component) == list(expected)
    assert all(np.array_equal(component[name], expected[name]) for name in expected)


def test_an_autoencoder_alone_is_read(tmp_path):
    plain = vae_tensors()
    loss = {"loss.logvar": np.zeros(()), "loss.discriminator.main.0.weight": np.zeros((2, 2))}
    config, component = open_vae(write(tmp_path / "vae.safetensors", plain | loss))
    assert config == VAE
    assert open_vae(tmp_path / "vae.safetensors", 0.13025)[0].scaling_factor == 0.13025
    prefixed = {f"first_stage_model.{name}": value for name, value in plain.items()}
    same(open_vae(write(tmp_path / "prefixed.safetensors", prefixed))[1], component)
    whole = original.random_tensors(original.model_names(SMALL["sd1"])) | prefixed
    same(open_vae(write(tmp_path / "whole.safetensors", whole))[1], component)
    same(component, opened(tmp_path, whole).component("vae"))


def test_an_autoencoders_averaged_weights_are_used(tmp_path):
    plain = vae_tensors()
    averaged = {f"model_ema.{name.replace('.', '')}": value + 1 for name, value in plain.items()}
    averaged |= {"model_ema.decay": np.zeros(()), "model_ema.num_updates": np.zeros((), int)}
    _, component = open_vae(write(tmp_path / "vae.safetensors", plain | averaged))
    assert np.array_equal(component["quant_conv.bias"], plain["quant_conv.bias"] + 1)


def diffusers_vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


def old_names(state):
    """What diffusers before 0.15 called the attention, whose layers were once convolutions."""
    renamed = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
    old = {}
    for name, value in state.items():
        for new, former in renamed:
            name = name.replace(f".{new}.", f".{former}.")
        old[name] = value
    return old


@pytest.mark.parametrize("convolutions", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_an_autoencoder_in_diffusers_layout_is_read(old, convolutions, tmp_path):
    state = {name: value.numpy() for name, value in diffusers_vae().state_dict().items()}
    stored = old_names(state) if old else dict(state)
    if convolutions:
        for name, value in stored.items():
            if ".attentions.0." in name and value.ndim == 2:
                stored[name] = value[:, :, None, None]
    config, component = open_vae(write(tmp_path / "vae.safetensors", stored))
    assert config == VAE
    assert set(component) == set(state)
    assert all(np.array_equal(component[name], state[name]) for name in state)


def test_an_autoencoders_folder_is_read(tmp_path):
    model = diffusers_vae()
    model.save_pretrained(tmp_path)
    config, component = open_vae(tmp_path, 0.5)
    assert config == VAE
    state = model.state_dict()
    assert set(component) == set(state)
    assert all(np.array_equal(component[name], state[name].numpy()) for name in state)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"layers_per_block": 2}))
    with pytest.raises(ModelError, match=r"lacks encoder\.down_blocks\.0\.resnets\.1"):
        open_vae(tmp_path)


@pytest.mark.parametrize(
    "name", ["unet.weight", "first_stage_model.weight", "encoder.conv_in.weight"]
)
def test_other_files_are_no_autoencoder(name, tmp_path):
    file = original.write_sparse(tmp_path / "vae.safetensors", {name: (4, 4, 3, 3)})
    with pytest.raises(ModelError, match=re.escape(str(file))):
        open_vae(file)


def test_an_autoencoders_left_over_tensor_is_named(tmp_path):
    for prefix in ("", "first_stage_model."):
        tensors = vae_tensors(prefix) | {f"{prefix}encoder.more": np.zeros(1)}
        with pytest.raises(ModelError, match=rf"holds {prefix}encoder\.more"):
            open_vae(write(tmp_path / "vae.safetensors", tensors))


def text_encoder():
    values = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
    }
    model = CLIPTextModel(CLIPTextConfig(**values, bos_token_id=0, eos_token_id=2, pad_token_id=1))
    return TextEncoderConfig(**values), text_checkpoint(model)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_a_text_encoders_folder_is_read_with_and_without_its_prefix(prefix, tmp_path):
    config, state = text_encoder()
    stored = {prefix + n.removeprefix("text_model."): v.numpy() for n, v in state.items()}
    stored[f"{prefix}embeddings.position_ids"] = np.arange(16)[None]
    file = write(tmp_path / "model.safetensors", stored)
    component = diffusers_component(tmp_path, open_weights(file), config)
    assert isinstance(component, Component)
    assert set(component) == set(state)
    assert all(np.array_equal(component[name], state[name].numpy()) for name in state)


def test_a_folders_left_over_tensor_is_named(tmp_path):
    config, state = text_encoder()
    stored = {name: value.numpy() for name, value in state.items()} | {"more": np.zeros(1)}
    weights = open_weights(write(tmp_path / "model.safetensors", stored))
    with pytest.raises(ModelError, match="holds more, for which"):
        diffusers_component(tmp_path, weights, config)
    with pytest.raises(ModelError, match=r"lacks .*layers\.2.* and 15 more tensors"):
        diffusers_component(tmp_path, weights, replace(config, num_hidden_layers=3))
