"""What a file is, told by `python -m export info`."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.checkpoints.families.sd import SD1, SD1_FAMILY
from engine.checkpoints.families.xl import XL
from engine.checkpoints.formats.files import open_weights
from engine.checkpoints.ldm_names import control_net_sources
from engine.configs.control_net import control_net_of
from engine.configs.diffusion import TinyAutoencoderConfig
from engine.configs.image_encoder import ImageEncoderConfig
from engine.configs.t2i_adapter import T2IAdapterConfig
from engine.errors import ModelError
from engine.model import find_model
from export.__main__ import main
from export.info import as_table, describe
from tests.support.original_layout import (
    FULL,
    SMALL,
    autoencoder_names,
    clip_names,
    inpainting,
    model_names,
    random_tensors,
    write_sparse,
)

ROOT = Path(__file__).parents[2]
CONSULTED = {"torch", "diffusers", "transformers", "onnx", "onnxruntime", "safetensors"}
UP = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def lora(folder):
    """A LoRA of SD 1.x as kohya's program writes it."""
    state = {
        f"{UP}.lora_up.weight": np.ones((320, 4), np.float16),
        f"{UP}.lora_down.weight": np.ones((4, 320), np.float16),
        f"{UP}.alpha": np.array(2.0, np.float16),
        f"{UP.replace('attn1_to_q', 'attn2_to_k')}.lora_up.weight": np.ones((320, 8), np.float16),
        f"{UP.replace('attn1_to_q', 'attn2_to_k')}.lora_down.weight": np.ones((8, 768), np.float16),
    }
    path = folder / "watercolor.safetensors"
    save_file(state, path, metadata={"ss_base_model_version": "sd_v1"})
    return path


def embedding(folder):
    path = folder / "moody.safetensors"
    save_file({"emb_params": np.ones((3, 768), np.float32)}, path)
    return path


def autoencoder(folder):
    names = autoencoder_names(FULL["sd1"].vae)
    return write_sparse(folder / "vae.safetensors", names, dtype="F32")


def checkpoint(folder):
    path = folder / "model.safetensors"
    save_file(random_tensors(model_names(SMALL["sd1"])), path)
    return path


KINDS = {
    "model": checkpoint,
    "adapter": lora,
    "textual inversion": embedding,
    "autoencoder": autoencoder,
}


def shown(capsys, *arguments):
    assert main(["info", *map(str, arguments)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


@pytest.mark.parametrize(("kind", "write"), KINDS.items(), ids=KINDS)
def test_every_kind_as_a_table_and_as_json(kind, write, tmp_path, capsys):
    path = write(tmp_path)
    facts = json.loads(shown(capsys, path, "--json"))
    assert facts == json.loads(json.dumps(describe(path)))
    assert next(iter(facts)) == "kind"
    assert facts["kind"] == kind
    assert facts["file"] == str(path)
    assert facts["hash"] == open_weights(path).content_hash()
    table = shown(capsys, path)
    assert table == as_table(facts) + "\n"
    assert facts["hash"] in table
    for name in facts:
        assert name.replace("_", " ") in table or facts[name] in (None, [], {})


def test_the_model_that_ships(capsys):
    facts = json.loads(shown(capsys, "pictogram", "--json"))
    assert facts["kind"] == "model"
    assert facts["file"] == str(find_model("pictogram"))
    assert facts["layout"] == "a folder in diffusers' layout"
    assert facts["prediction_type"] == "v_prediction"
    assert facts["picture"] == [128, 128]
    assert facts["precision"] == "float16"
    for name in ("unet", "vae", "text_encoder"):
        weights = open_weights(find_model("pictogram") / name)
        assert facts["parameters"][name] == sum(t.array().size for t in weights.tensors.values())
        assert facts["hash"][name] == weights.content_hash()


FAMILIES = {
    "sd1": ("Stable Diffusion 1.x", [512, 512]),
    "sd2": ("Stable Diffusion 2.x", None),
    "xl": ("Stable Diffusion XL", [1024, 1024]),
    "xl-refiner": ("Stable Diffusion XL", [1024, 1024]),
}


@pytest.fixture
def unhashed(monkeypatch):
    """Spare the seconds that gigabytes of nothing take to hash."""
    monkeypatch.setattr(
        "engine.checkpoints.formats.files.Weights.content_hash", lambda self: "a hash"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_one_file(family, tmp_path, unhashed):
    path = write_sparse(tmp_path / "a.safetensors", model_names(FULL[family]))
    facts = describe(path)
    title, picture = FAMILIES[family]
    assert title in facts["family"]
    assert ("refiner" in facts["family"]) == (family == "xl-refiner")
    assert picture in (None, facts["picture"])
    assert facts["layout"] == "one file in the original layout"
    assert facts["precision"] == "float16"
    assert facts["inpainting"] is False
    assert facts["prediction_type"] in ("epsilon", "v_prediction")
    assert any("prediction type" in note for note in facts["notes"])
    assert facts["hash"] == "a hash"


def test_an_inpainting_model(tmp_path, unhashed):
    names = model_names(inpainting(FULL["sd1"]))
    assert describe(write_sparse(tmp_path / "a.safetensors", names))["inpainting"] is True


def test_the_parameters_of_sd15(tmp_path, unhashed):
    facts = describe(write_sparse(tmp_path / "a.safetensors", model_names(FULL["sd1"])))
    assert facts["parameters"]["unet"] == 859_520_964
    assert facts["parameters"]["vae"] == 83_653_863
    assert facts["parameters"]["text_encoder"] == 123_060_480
    assert "859,520,964 (859.5 million)" in as_table(facts)


def control_net(folder, unet, more=()):
    """A ControlNet of a UNet in the original layout, of full size and without numbers."""
    config = control_net_of(unet)
    shapes = config.tensor_shapes()
    names = {source.name: shapes[name] for name, source in control_net_sources(config).items()}
    names = {f"control_model.{name}": shape for name, shape in names.items()}
    return write_sparse(folder / "net.safetensors", names | dict(more))


@pytest.mark.parametrize(
    ("unet", "family"), [(SD1, "Stable Diffusion 1.x"), (XL, "Stable Diffusion XL")]
)
def test_a_control_net(unet, family, tmp_path, unhashed):
    facts = describe(control_net(tmp_path, unet))
    assert (facts["kind"], facts["family"]) == ("ControlNet", family)
    count = len(control_net_of(unet).tensor_shapes())
    assert facts["used_tensors"] == sum(facts["tensors"].values()) == count
    assert facts["notes"] == []
    more = {"model.diffusion_model.out.2.bias": (4,), "betas": (1000,)}
    facts = describe(control_net(tmp_path, unet, more))
    assert facts["notes"] == ["not used: betas and 1 more"]


@pytest.mark.parametrize(
    ("side", "family"), [(8, "Stable Diffusion 1.x"), (16, "Stable Diffusion XL")]
)
def test_a_t2i_adapter(side, family, tmp_path, unhashed):
    channels = (320, 640, 1280, 1280)
    config = T2IAdapterConfig(channels=channels, in_channels=1, downscale_factor=side)
    facts = describe(write_sparse(tmp_path / "adapter.safetensors", config.tensor_shapes()))
    assert (facts["kind"], facts["family"]) == ("T2I-Adapter", family)
    assert (facts["sees"], facts["light"], facts["features"]) == ("gray", False, list(channels))
    assert facts["used_tensors"] == sum(facts["tensors"].values()) == len(config.tensor_shapes())
    other = T2IAdapterConfig(channels=(24, 48))
    path = write_sparse(tmp_path / "other.safetensors", other.tensor_shapes())
    with pytest.raises(ModelError, match="is a T2I-Adapter of another family: it makes features"):
        describe(path)


def test_a_control_lora_and_what_no_model_here_takes(tmp_path, unhashed):
    config = control_net_of(XL)
    shapes = {"lora_controlnet": (1,)}
    for name, source in control_net_sources(config).items():
        shape, unet = config.tensor_shapes()[name], XL.tensor_shapes()
        if name not in unet or len(shape) == 1:
            shapes[source.name] = shape
        else:
            module, ones = source.name.removesuffix(".weight"), (1,) * len(shape[2:])
            shapes |= {f"{module}.up": (shape[0], 8, *ones), f"{module}.down": (8, *shape[1:])}
    facts = describe(write_sparse(tmp_path / "lora.safetensors", shapes))
    assert (facts["kind"], facts["family"]) == ("control-LoRA", "Stable Diffusion XL")
    assert facts["notes"] == [], "a mark is no tensor to use"
    with pytest.raises(ModelError, match="of another family"):
        describe(control_net(tmp_path, replace(SD1, cross_attention_dim=512)))
    with pytest.raises(ModelError, match="is the difference of a ControlNet"):
        describe(control_net(tmp_path, XL, {"difference": (1,)}))


def test_a_lora(tmp_path):
    facts = describe(lora(tmp_path))
    assert facts["family"] == "Stable Diffusion 1.x"
    assert facts["kinds"] == {"LoRA": 2}
    assert facts["ranks"] == [4, 8]
    assert facts["modules"] == {"unet": 2}
    assert facts["precision"] == "float16"
    assert facts["parameters"] == {"in all": 8 * 320 + 1 + 8 * (320 + 768)}


def test_an_embedding(tmp_path):
    facts = describe(embedding(tmp_path))
    assert facts["word"] == "moody"
    assert facts["vectors"] == {"text_encoder": [3, 768]}
    assert "text_encoder: 3 × 768" in as_table(facts)


def test_an_autoencoder(tmp_path):
    facts = describe(autoencoder(tmp_path))
    assert (facts["latent_channels"], facts["compression"]) == (4, 8)
    assert facts["precision"] == "float32"
    assert facts["parameters"] == {"vae": 83_653_863}


def test_the_most_frequent_precision_goes_first(tmp_path):
    path = tmp_path / "a.safetensors"
    state = {
        f"{UP}.lora_up.weight": np.ones((320, 4), np.float32),
        f"{UP}.lora_down.weight": np.ones((4, 320), np.float32),
        f"{UP}.alpha": np.array(2.0, np.float16),
    }
    save_file(state, path)
    assert describe(path)["precision"] == "float32, float16"


def broken(folder, kind):
    path = folder / "a.safetensors"
    if kind == "truncated":
        path.write_bytes(checkpoint(folder).read_bytes()[:5000])
    elif kind == "no tensors":
        save_file({}, path)
    elif kind == "something else":
        save_file({"transformer.h.0.weight": np.ones((3, 3), np.float32)}, path)
    elif kind == "no model":
        path.mkdir()
    elif kind == "text":
        path = folder / "a.txt"
        path.write_text("hello")
    return path


@pytest.mark.parametrize(
    "kind", ["missing", "truncated", "no tensors", "something else", "no model", "text"]
)
def test_what_is_nothing_known_is_one_sentence(kind, tmp_path, capsys):
    path = broken(tmp_path, kind)
    for arguments in ([str(path)], [str(path), "--json"]):
        assert main(["info", *arguments]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
        assert path.name in said.err
        assert len(said.err) < 700
    with pytest.raises(ModelError):
        describe(path)


CODE = """
import json, sys
from export.__main__ import main
statuses = [main(["info", path]) for path in sys.argv[1:]]
print(json.dumps([statuses, sorted({name.split(".")[0] for name in sys.modules})]))
"""


def test_no_library_is_loaded_to_look_at_files(tmp_path):
    paths = [str(write(tmp_path)) for write in KINDS.values()]
    command = [sys.executable, "-c", CODE, "pictogram", *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    statuses, modules = json.loads(done.stdout.splitlines()[-1])
    assert statuses == [0] * 5
    assert not CONSULTED & set(modules)


def test_pieces_say_where_they_are_given(tmp_path, capsys):
    state = random_tensors(model_names(SMALL["xl"]))
    state = {n: v for n, v in state.items() if not n.startswith("model.diffusion_model.")}
    state |= random_tensors(model_names(SMALL["sd1"]))  # XL's is told how wide the pooled text is
    prefixes = {
        "unet": "model.diffusion_model.",
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    }
    for name, prefix in prefixes.items():
        path = tmp_path / f"{name}.safetensors"
        held = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        save_file({n: np.ascontiguousarray(v) for n, v in held.items()}, path)
        facts = json.loads(shown(capsys, path, "--json"))
        assert facts["kind"] == name.replace("_", " ")
        assert facts["use"] == f"give it as --{name.replace('_', '-')}"
        assert facts["architecture"]
        assert list(facts["parameters"]) == [name]
        assert facts["hash"] in shown(capsys, path)


def test_the_words_of_an_embedding(tmp_path, capsys):
    folder = tmp_path / "concept"
    folder.mkdir()
    for name, width in (("learned_embeds", 768), ("learned_embeds_2", 1280)):
        save_file({"<cat>": np.ones((2, width), np.float32)}, folder / f"{name}.safetensors")
    facts = json.loads(shown(capsys, folder, "--json"))
    assert (facts["word"], facts["words"]) == ("<cat>", ["<cat>"])
    assert facts["vectors"] == {"text_encoder": [2, 768], "text_encoder_2": [2, 1280]}
    path = tmp_path / "nice.safetensors"
    save_file({"tok-1000": np.ones((2, 768), np.float32)}, path)
    facts = json.loads(shown(capsys, path, "--json"))
    assert (facts["word"], facts["words"]) == ("nice", ["nice", "tok-1000"])


def test_an_adapter_says_its_scale_words_and_steps(tmp_path, capsys):
    state = {
        f"{UP}.lora_up.weight": np.ones((320, 4), np.float16),
        f"{UP}.lora_down.weight": np.ones((4, 320), np.float16),
        f"{UP}.alpha": np.array(2.0, np.float16),
        "bundle_emb.cat.clip_l": np.ones((1, 768), np.float32),
    }
    path = tmp_path / "Hyper-SD15-8steps-lora.safetensors"
    save_file(state, path)
    facts = json.loads(shown(capsys, path, "--json"))
    assert (facts["alphas"], facts["scales"]) == ([2.0], [0.5])
    assert facts["embeddings"] == {"cat": ["text_encoder"]}
    assert facts["few_steps"] == {"name": "hyper", "steps": 8, "guidance_scale": 1.0}
    folder = tmp_path / "lora"
    folder.mkdir()
    path.rename(folder / "pytorch_lora_weights.safetensors")
    facts = json.loads(shown(capsys, folder, "--json"))
    assert (facts["kind"], facts["few_steps"]) == ("adapter", None)


def test_what_of_a_checkpoint_is_not_used_is_said(tmp_path, capsys):
    state = {f"model.{n}": v for n, v in random_tensors(model_names(SMALL["sd1"])).items()}
    path = tmp_path / "model.safetensors"
    save_file(state | {"optimizer.exp_avg": np.ones(2)}, path)
    facts = json.loads(shown(capsys, path, "--json"))
    assert facts["kind"] == "model"
    assert facts["picture"] == [512, 512]
    assert "those under 'optimizer' are not used" in facts["notes"]
    assert "512 × 512" in shown(capsys, path)


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


HALVES = {
    "taesd_decoder": ("1.weight", "3.conv.0.weight"),
    "taesd_encoder": ("0.weight", "1.conv.0.weight"),
}


def tiny_halves():
    """TAESD's two files, by its names: the decoder's count the limiting of the latents first."""
    shapes = TinyAutoencoderConfig().tensor_shapes()
    halves = {name: {} for name in HALVES}
    for name, shape in shapes.items():
        half, _, number, rest = name.split(".", 3)
        shift = 1 if half == "decoder" else 0
        halves[f"taesd_{half}"][f"{int(number) + shift}.{rest}"] = shape
    return halves


@pytest.mark.parametrize("name", HALVES)
def test_a_tiny_half_alone(name, tmp_path, capsys):
    held = tiny_halves()[name]
    assert set(HALVES[name]) <= held.keys()
    path = write_sparse(tmp_path / f"{name}.safetensors", held)
    facts = json.loads(shown(capsys, path, "--json"))
    half = name.removeprefix("taesd_")
    assert (facts["kind"], facts["halves"]) == ("tiny autoencoder", [half])
    assert list(facts["parameters"]) == [half]
    assert facts["parameters"][half] == sum(math.prod(shape) for shape in held.values())
    assert ("--vae, or as --preview-decoder" in facts["use"]) == (half == "decoder")


@pytest.mark.parametrize(
    ("prefixes", "folder"),
    [
        (("decoder.layers.", "encoder.layers."), False),
        (("decoder.layers.", "encoder.layers."), True),
        (("taesd_decoder.", "taesd_encoder."), False),
        (("tae.decoder.", "tae.encoder."), False),
    ],
)
def test_a_tiny_autoencoder_of_both_halves(prefixes, folder, tmp_path, capsys):
    decoder, encoder = tiny_halves().values()
    if prefixes[0] == "decoder.layers.":
        decoder = {
            f"{int(n.split('.')[0]) - 1}.{n.split('.', 1)[1]}": s for n, s in decoder.items()
        }
    shapes = {**under(prefixes[0], decoder), **under(prefixes[1], encoder)}
    path = tmp_path / "tiny"
    path.mkdir()
    file = write_sparse(path / "diffusion_pytorch_model.safetensors", shapes)
    (path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    facts = json.loads(shown(capsys, path if folder else file, "--json"))
    assert (facts["kind"], facts["halves"]) == ("tiny autoencoder", ["encoder", "decoder"])
    assert (facts["latent_channels"], facts["compression"]) == (4, 8)


@pytest.mark.parametrize("prefix", ["control_model.", "controlnet.", ""])
def test_a_control_net_by_its_family(prefix, tmp_path, capsys, unhashed):
    config = control_net_of(SD1)
    names = {s.name: config.tensor_shapes()[n] for n, s in control_net_sources(config).items()}
    path = write_sparse(tmp_path / "canny.safetensors", under(prefix, names))
    facts = json.loads(shown(capsys, path, "--json"))
    assert (facts["kind"], facts["family"]) == ("ControlNet", "Stable Diffusion 1.x")
    assert "--control-image" in facts["use"]
    odd = {n: (*s[:-1], 640) if n.endswith("attn2.to_k.weight") else s for n, s in names.items()}
    path = write_sparse(tmp_path / "odd.safetensors", under(prefix, odd))
    assert main(["info", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("prefix", "kind"),
    [
        ("diffusion_model.", "unet"),
        ("unet.", "unet"),
        ("clip_l.transformer.", "text encoder"),
        ("text_encoders.clip_l.transformer.", "text encoder"),
        ("text_encoder.", "text encoder"),
        ("vae.", "autoencoder"),
        ("first_stage_model.", "autoencoder"),
    ],
)
def test_pieces_under_every_prefix(prefix, kind, tmp_path, capsys):
    own = {"unet": "model.diffusion_model.", "text encoder": "cond_stage_model.transformer."}
    state = random_tensors(model_names(SMALL["sd1"]))
    whole = own.get(kind, "first_stage_model.")
    held = {n.removeprefix(whole): v for n, v in state.items() if n.startswith(whole)}
    path = tmp_path / "piece.safetensors"
    save_file(under(prefix, held), path)
    facts = json.loads(shown(capsys, path, "--json"))
    assert facts["kind"] == kind
    assert sum(facts["parameters"].values()) == sum(value.size for value in held.values())


def test_clips_own_projection_makes_no_second_text_encoder(tmp_path, capsys, unhashed):
    names = {f"text_model.{name}": s for name, s in clip_names(FULL["sd1"].clip).items()}
    names |= {"text_projection.weight": (768, 768), "logit_scale": ()}
    names |= {"vision_model.embeddings.class_embedding": (1024,)}
    path = write_sparse(tmp_path / "clip_l.safetensors", names)
    facts = json.loads(shown(capsys, path, "--json"))
    assert (facts["kind"], facts["use"]) == ("text encoder", "give it as --text-encoder")


def test_an_ip_adapter_and_an_image_encoder(tmp_path, capsys):
    unet = SD1_FAMILY.published["unet"][0]
    names = {"image_proj.proj.weight": (4 * 768, 1024), "image_proj.proj.bias": (4 * 768,)}
    names |= {f"image_proj.norm.{end}": (768,) for end in ("weight", "bias")}
    for i, layer in enumerate(unet.cross_attentions()):
        for kind in ("to_k_ip", "to_v_ip"):
            names[f"ip_adapter.{2 * i + 1}.{kind}.weight"] = (layer.width, 768)
    facts = describe(write_sparse(tmp_path / "ip-adapter_sd15.safetensors", names))
    assert facts["kind"] == "IP-Adapter"
    assert facts["family"] == SD1_FAMILY.title
    assert (facts["projection"], facts["tokens"]) == ("linear", 4)
    assert facts["image_encoder"] == "one whose embedding has the width 1024"
    assert facts["parameters"] == {"ip_adapter": 22_319_616}
    assert "--ip-adapter" in as_table(facts)
    folder = tmp_path / "image_encoder"
    folder.mkdir()
    config = ImageEncoderConfig(num_hidden_layers=1, patch_size=112)
    write_sparse(folder / "model.safetensors", config.tensor_shapes())
    written = {**asdict(config), "architectures": ["CLIPVisionModelWithProjection"]}
    (folder / "config.json").write_text(json.dumps(written))
    facts = describe(folder)
    assert facts["kind"] == "image encoder"
    assert facts["widths"] == {"tokens": 768, "embedding": 512}
    assert main(["info", str(folder)]) == 0
    assert "--image-encoder" in capsys.readouterr().out
