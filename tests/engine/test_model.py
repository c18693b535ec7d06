import json
import shutil

import numpy as np
import pytest

from engine.errors import ModelError
from engine.model import Model, find_model, shipped_models
from runtime import Pipeline

PARTS = ("text_encoder", "step", "step_shallow", "vae_decoder", "vae_encoder")


@pytest.fixture
def folder(tmp_path):
    """Copy what a model says, and link its weights."""
    source, target = find_model("pictogram"), tmp_path / "model"
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            copy.symlink_to(path)
        elif path.is_file():
            shutil.copy(path, copy)
    return target


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_model_that_ships():
    model = Model.open(find_model("pictogram"))
    assert model.path.name == "pictogram"
    assert model.vae.compression == 8
    encoder = model.text_encoders["text_encoder"]
    assert list(model.text_encoders) == ["text_encoder"]
    assert model.unet.cross_attention_dim == encoder.hidden_size
    assert [model.config(part) for part in PARTS] == [
        encoder,
        *[model.unet] * 2,
        *[model.vae] * 2,
    ]
    assert model.family.context == "last_hidden_state"
    assert not model.unet.extra_inputs
    assert not any((model.is_inpainting, model.zeros_for_empty_prompt))
    assert (model.steps, model.guidance_scale, model.notes) == (None, None, ())


@pytest.mark.parametrize("part", PARTS)
def test_weights(part):
    weights = Model.open(find_model("pictogram")).weights(part)
    assert len(weights) == len(list(weights)) > 10
    for name in weights:
        assert name in weights
        assert np.isfinite(weights[name]).all()
    assert "nothing" not in weights
    if part == "text_encoder":
        assert all(name.startswith("text_model.") for name in weights)


def test_finding_a_model(folder, tmp_path, monkeypatch):
    assert "pictogram" in shipped_models()
    assert find_model(folder) == find_model(str(folder)) == folder
    with pytest.raises(ModelError, match=r"nor one that ships \(.*pictogram"):
        find_model(tmp_path / "missing")
    with pytest.raises(ModelError, match="did you mean 'pictogram'"):
        find_model("pictogrm")
    with pytest.raises(ModelError, match="neither a folder or file"):
        find_model("x" * 5000)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictogram").mkdir()
    assert find_model("pictogram").resolve() == tmp_path / "pictogram", "a folder goes first"


@pytest.mark.parametrize("name", ["model_index.json", "tokenizer/merges.txt", "nothing"])
def test_neither_a_folder_nor_a_checkpoint(folder, name):
    with pytest.raises(ModelError, match=name) as caught:
        Model.open(folder / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
    ],
)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist; a model is a folder"),
        (b"", "is not readable JSON"),
        (b'{"a": ', "is not readable JSON"),
        (b"\xff\xfe", "is not readable JSON"),
        (b"[]", "holds a list; a JSON object is expected"),
    ],
)
def test_a_broken_file(folder, name, content, said):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=said) as caught:
        Model.open(folder)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        (
            "model_index.json",
            {"_class_name": "FluxPipeline"},
            "names the pipeline 'FluxPipeline'; supported are StableDiffusionPipeline",
        ),
        ("model_index.json", {"_class_name": None}, "names the pipeline None"),
        ("model_index.json", {"_class_name": ["a"]}, "names the pipeline"),
        ("unet/config.json", {"sample_size": 0}, "sample_size 0; a whole number"),
        ("unet/config.json", {"sample_size": [16, 16]}, "sample_size"),
        ("unet/config.json", {"sample_size": True}, "sample_size True"),
        ("unet/config.json", {"sample_size": "16"}, "sample_size '16'"),
        ("unet/config.json", {"in_channels": 4}, "takes 4 channels.*; supported are 8 .* and 17"),
        (
            "unet/config.json",
            {"out_channels": 4},
            "makes 4 channels and an autoencoder",
        ),
        ("unet/config.json", {"cross_attention_dim": 768}, "attends to 768 values"),
        ("unet/config.json", {"down_block_types": ["NewBlock"] * 3}, "NewBlock"),
        ("vae/config.json", {"down_block_types": ["NewBlock"] * 4}, "NewBlock"),
        (
            "vae/config.json",
            {"latent_channels": 16},
            "an autoencoder that takes 16",
        ),
        ("text_encoder/config.json", {"hidden_act": "silu"}, "silu"),
        ("text_encoder/config.json", {"architectures": ["T5EncoderModel"]}, "T5EncoderModel"),
    ],
)
def test_what_cannot_be_run(folder, name, fields, said):
    change(folder / name, **fields)
    with pytest.raises(ModelError, match=said):
        Model.open(folder)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("tokenizer/tokenizer_config.json", {"model_max_length": 77}, "rows of 77 tokens"),
        ("text_encoder/config.json", {"vocab_size": 1000}, "tokens and its text_encoder 1000"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type='flow'"),
        ("scheduler/scheduler_config.json", {"trained_betas": "a"}, "betas"),
    ],
)
def test_what_the_pipeline_cannot_run(folder, name, fields, said):
    change(folder / name, **fields)
    with pytest.raises(ModelError, match=said):
        Pipeline.load(folder)


def test_missing_folders(folder):
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ModelError, match="tokenizer"):
        Pipeline.load(folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        Model.open(folder).weights("step")
