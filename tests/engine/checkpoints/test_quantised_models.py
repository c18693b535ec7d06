"""Whole models as stable-diffusion.cpp and ComfyUI-GGUF write them, beside the plain ones."""

import re
from collections import Counter
from dataclasses import replace

import gguf
import numpy as np
import pytest
import safetensors.numpy

from engine.checkpoints.formats.files import open_weights
from engine.model import Model
from export.info import describe
from tests.support import original_layout as original
from tests.support.original_layout import AutoencoderParams, ModelParams, TextParams, UNetParams

Q8_0, F16 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16
VAE = AutoencoderParams(ch=32, ch_mult=(1, 1), num_res_blocks=1)
CLIP = TextParams(width=64, layers=2, vocab=99, positions=8)
OPEN_CLIP = TextParams(width=64, layers=3, vocab=99, positions=8, projection=64)
UNET = UNetParams(
    model_channels=32,
    channel_mult=(1, 2),
    transformer_depth=(1, 0),
    middle_depth=1,
    context_dim=64,
    num_res_blocks=(1, 1),
    use_linear_in_transformer=False,
)
LINEAR = replace(UNET, use_linear_in_transformer=True)
FAMILIES = {
    "sd1": ModelParams(unet=UNET, vae=VAE, clip=CLIP),
    "sd2": ModelParams(unet=LINEAR, vae=VAE, open_clip=OPEN_CLIP),
    "xl": ModelParams(
        unet=replace(LINEAR, context_dim=128, adm_in_channels=64 + 6 * 32),
        vae=VAE,
        clip=CLIP,
        open_clip=OPEN_CLIP,
    ),
}
RENAMED = (  # stable-diffusion.cpp's names of what OpenCLIP's are
    ("token_embedding.weight", "embeddings.token_embedding.weight"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("transformer.resblocks.", "encoder.layers."),
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    ("ln_final.", "final_layer_norm."),
)
PLACES = {  # by naming and family: where text encoders are put
    "converted": {
        "sd2": {original.OPEN_CLIP: "cond_stage_model.transformer.text_model."},
        "xl": {
            original.XL_CLIP: "cond_stage_model.transformer.text_model.",
            original.XL_OPEN_CLIP: "cond_stage_model.1.transformer.text_model.",
        },
    },
    "components": {
        "xl": {
            original.XL_CLIP: "text_encoders.clip_l.transformer.text_model.",
            original.XL_OPEN_CLIP: "text_encoders.clip_g.transformer.text_model.",
            original.VAE: "vae.",
        }
    },
}


def tensors(family):
    names = original.model_names(FAMILIES[family])
    return {name: 0.05 * array for name, array in original.random_tensors(names, seed=3).items()}


def is_cut(array):
    """Tell what ComfyUI-GGUF cuts into rows of 256, with the shape as a fact of the file."""
    return array.ndim == 4 and array.shape[2:] == (1, 1) and array.size % 256 == 0


def quantised(array):
    """Quantise matrices of whole blocks and what is cut; of the others those of one axis stay."""
    if is_cut(array):
        return gguf.quants.quantize(array.reshape(-1, 256), Q8_0), Q8_0
    if array.ndim == 2 and array.shape[-1] % 32 == 0:
        return gguf.quants.quantize(array, Q8_0), Q8_0
    return (array.astype(np.float16), F16) if array.ndim > 1 else (array, None)


def plain(array):
    stored, kind = quantised(array)
    if kind == Q8_0:
        return gguf.quants.dequantize(stored, kind).reshape(array.shape)
    return np.asarray(stored, np.float32)


def write_gguf(path, arrays):
    writer = gguf.GGUFWriter(None, "sd1")
    for name, array in arrays.items():
        stored, kind = quantised(array)
        if is_cut(array):
            writer.add_array(f"comfy.gguf.orig_shape.{name}", array.shape)
        writer.add_tensor(name, stored.reshape(stored.shape or (1,)), raw_dtype=kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def renamed(name, array, places, naming):
    """Give a tensor the names of stable-diffusion.cpp; projections become three or keep one."""
    for place, new in places.items():
        if name.startswith(place):
            rest = name.removeprefix(place)
            if place in (original.OPEN_CLIP, original.XL_OPEN_CLIP):
                for theirs, ours in RENAMED:
                    rest = rest.replace(theirs, ours)
                fused = re.fullmatch(r"(encoder\.layers\.\d+)\.attn\.in_proj_(weight|bias)", rest)
                if fused and naming == "split":
                    thirds = zip("qkv", np.split(array, 3), strict=True)
                    layer, kind = fused.groups()
                    return {f"{new}{layer}.self_attn.{x}_proj.{kind}": third for x, third in thirds}
                if fused and naming == "new":
                    rest = "{}.self_attn.in_proj.{}".format(*fused.groups())
                if rest == "text_projection" and new.startswith("text_encoders"):
                    new = new.removesuffix("text_model.")
                    return {f"{new}text_projection.weight": np.ascontiguousarray(array.T)}
            return {new + rest: array}
    return {name: array}


def same_parts(ours, expected):
    assert ours.configs.keys() == expected.configs.keys()
    for part in expected.configs:
        ours_part, theirs = ours.component(part), expected.component(part)
        assert ours_part.keys() == theirs.keys()
        for name in theirs:
            np.testing.assert_array_equal(ours_part[name], theirs[name], err_msg=name)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Read the plain file of a family, with the numbers that quantising leaves."""

    def read(family):
        path = tmp_path_factory.mktemp("plain") / f"{family}.safetensors"
        arrays = {name: plain(array) for name, array in tensors(family).items()}
        safetensors.numpy.save_file(arrays, path)
        return Model.read(path)

    return read


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_gguf_is_the_plain_one(family, tmp_path, reference):
    model = Model.read(write_gguf(tmp_path / f"{family}.gguf", tensors(family)))
    assert model.family.name == family
    same_parts(model, reference(family))


@pytest.mark.parametrize(
    ("family", "place", "naming"),
    [
        ("sd2", "converted", "old"),
        ("sd2", "converted", "new"),
        ("xl", "converted", "old"),
        ("xl", "converted", "new"),
        ("xl", "converted", "split"),
        ("xl", "components", "split"),
    ],
)
def test_the_names_of_stable_diffusion_cpp_are_known(family, place, naming, tmp_path, reference):
    arrays = {}
    for name, array in tensors(family).items():
        if not name.endswith(("logit_scale", "sigmas")):
            arrays |= renamed(name, plain(array), PLACES[place][family], naming)
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, path)
    model = Model.read(path)
    assert model.family.name == family
    same_parts(model, reference(family))


def test_what_a_file_holds_is_counted(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", tensors("sd1"))
    facts = describe(path)
    counts = Counter(tensor.dtype for tensor in open_weights(path).tensors.values())
    names = {"float32": "F32", "float16": "F16", "Q8_0": "Q8_0"}
    assert facts["tensors"] == {name: counts[dtype] for name, dtype in names.items()}
    assert min(facts["tensors"].values()) > 10


def test_stable_diffusion_2_with_three_projections_is_told_by_its_width(tmp_path):
    large = replace(OPEN_CLIP, width=1024, layers=24)
    params = replace(FAMILIES["sd2"], open_clip=large, unet=replace(LINEAR, context_dim=1024))
    shapes = {}
    for name, shape in original.model_names(params).items():
        view = np.broadcast_to(np.float32(0), shape)
        found = renamed(name, view, PLACES["converted"]["sd2"], "split")
        shapes |= {name: array.shape for name, array in found.items() if "logit" not in name}
    model = Model.read(original.write_sparse(tmp_path / "model.safetensors", shapes))
    assert model.family.name == "sd2"
    encoder = model.text_encoders["text_encoder"]
    assert (encoder.hidden_size, encoder.num_hidden_layers) == (1024, 23)
    assert encoder.hidden_act == "gelu"
