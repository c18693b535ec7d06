import json
import shutil

import numpy as np
import pytest

from engine.errors import ModelError, memory_hint
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
    with pytest.raises(ModelError, match=r"nor one that ships; .*what ships is pictogram"):
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
            {"_class_name": "FluxPipeline", "FluxTransformer": ["diffusers", "FluxTransformer"]},
            "names the pipeline 'FluxPipeline', which has a 'FluxTransformer'; supported are",
        ),
        ("model_index.json", {"_class_name": None}, "names the pipeline None"),
        ("model_index.json", {"_class_name": ["a"]}, "names the pipeline .*, which is none"),
        (
            "model_index.json",
            {"_class_name": "APipeline", "unet": ["diffusers", "UNetMotionModel"]},
            "whose unet is a 'UNetMotionModel'; supported is UNet2DConditionModel",
        ),
        (
            "model_index.json",
            {"_class_name": "APipeline", "vae": [None, None]},
            "which has no vae; supported are folders",
        ),
        (
            "model_index.json",
            {"_class_name": "APipeline", "prior": ["diffusers", "PriorTransformer"]},
            "which has a 'prior'",
        ),
        ("unet/config.json", {"sample_size": 0}, "sample_size 0; a whole number"),
        ("unet/config.json", {"sample_size": [16, 0]}, "sample_size .*, or a pair of them"),
        ("unet/config.json", {"sample_size": [16] * 3}, "sample_size .*, or a pair of them"),
        ("unet/config.json", {"sample_size": []}, "sample_size .*, or a pair of them"),
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


@pytest.mark.parametrize(
    ("kind", "more", "unused"),
    [
        ("StableDiffusionPAGPipeline", {}, ""),
        ("StableDiffusionPipelineSafe", {"safety_checker": ["s", "SafeChecker"]}, ""),
        (
            "StableDiffusionControlNetPipeline",
            {"controlnet": ["diffusers", "ControlNetModel"]},
            ", without its controlnet",
        ),
        ("StableDiffusionPanoramaPipeline", {}, ""),
        (["pipeline", "MyOwnPipeline"], {}, ""),
    ],
)
def test_a_folder_of_another_pipeline_is_its_parts(folder, kind, more, unused):
    change(folder / "model_index.json", _class_name=kind, **more)
    model = Model.open(folder)
    assert model.configs == Model.open(find_model("pictogram")).configs
    name = kind[1] if isinstance(kind, list) else kind
    said = f"the folder was saved by {name!r}; its parts draw from texts{unused}"
    assert model.notes == (said,)


@pytest.mark.parametrize(("size", "side"), [([16, 16], 16), ([16, 24], 24), ([32], 32), (8, 8)])
def test_the_size_in_training_may_be_a_pair(folder, size, side):
    change(folder / "unet" / "config.json", sample_size=size)
    assert Model.open(folder).sample_size == side


TEXT = {
    "architectures": ["CLIPTextModelWithProjection"],
    **{"vocab_size": 1000, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 5},
    **{"num_attention_heads": 4, "hidden_act": "gelu", "projection_dim": 32},
}
DUMMY_XL = {  # of diffusers' own tests: two text encoders, and a score beside four sizes
    "block_out_channels": [32, 64],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [2, 4],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": [1, 2],
    "cross_attention_dim": 64,
}


def write_xl(folder, inputs, **pooling):
    files = {
        "model_index.json": {"_class_name": "StableDiffusionXLPipeline"},
        "unet/config.json": DUMMY_XL | {"projection_class_embeddings_input_dim": inputs},
        "text_encoder/config.json": TEXT | {"architectures": ["CLIPTextModel"]},
        "text_encoder_2/config.json": TEXT | pooling,
        "scheduler/scheduler_config.json": {"_class_name": "EulerDiscreteScheduler"},
    }
    for name, values in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("inputs", "pooled", "count"), [(72, 32, 5), (80, 32, 6), (104, 64, 5), (112, 64, 6)]
)
def test_the_text_encoder_tells_how_many_sizes_there_are(tmp_path, inputs, pooled, count):
    model = Model.read(write_xl(tmp_path, inputs, projection_dim=pooled))
    assert model.unet.addition_time_ids == count
    assert model.unet.symbols()["P"] == pooled
    assert (model.family.name, model.zeros_for_empty_prompt) == ("xl", True)


def test_sizes_that_no_text_leaves_room_for(tmp_path):
    with pytest.raises(ModelError, match="leaves 41 beside a pooled text of 32; 5 or 6 times"):
        Model.read(write_xl(tmp_path, 73))


@pytest.mark.parametrize(
    ("said", "asks"),
    [
        ("Failed to allocate memory for requested buffer of size 9", True),
        ("std::bad_alloc", True),
        ("bad allocation", True),
        ("CUDA out of memory", True),
        ("The input tensor size is not equal to the model input type", False),
        ("Got invalid dimensions for input", False),
    ],
)
def test_a_picture_is_too_large_only_where_memory_was_the_reason(said, asks):
    assert bool(memory_hint(RuntimeError(said))) == asks
    assert memory_hint(MemoryError())
