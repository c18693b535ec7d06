"""Every family against diffusers, from every kind of file, with and without adapters."""

import io
import json
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from engine.errors import LatentrtError, ModelError, RequestError
from runtime import Pipeline
from runtime.__main__ import main
from runtime.request import Request
from tests.support import original_layout as original
from tests.support.adapters import ATTENTION, TEXT, modules_of, write_kohya
from tests.support.bad_files import bad_files
from tests.support.deep_features import keeping_deep_features
from tests.support.pictures import drawing, psnr, same
from tests.support.schedulers import SCHEDULERS
from tests.support.small_models import SIDE, SMALL, trace_graphs, trained
from tests.support.small_pictures import (
    DEPRECATIONS,
    FIELDS,
    PIXELS,
    PROMPT,
    SEED,
    SETTINGS,
    draw,
    reference_pipeline,
    write_small,
)
from tests.support.tolerances import BATCH_PSNR_DB, PICTURE_PSNR_DB, SMALL_PICTURE_PSNR_DB

pytestmark = DEPRECATIONS
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def loaded(place):
    """Open a model by its name; its graphs are traced when it is first asked for."""

    @cache
    def load(name):
        small, file, graphs = write_small(name, place)
        return small, opened(file, graphs), file, graphs

    return load


def opened(path, graphs, **options):
    return Pipeline.load(path, graphs=graphs, settings=SETTINGS, **options)


def reference(loaded, prompt=PROMPT, sampler="ddim", **fields):
    own, make = loaded.scheduler, getattr(diffusers, SCHEDULERS[sampler])
    loaded.scheduler = make.from_config(own.config)
    generator = torch.Generator().manual_seed(SEED)
    fields = {**FIELDS, **fields}
    if "Img2Img" in type(loaded).__name__:
        del fields["height"], fields["width"]
    drawn = loaded(prompt, generator=generator, **fields).images[0]
    loaded.scheduler = own
    return drawn


def assert_same_picture(ours, theirs, *different):
    """Compare; pictures of `different` fields show that the comparison can fail."""
    assert ours.size == theirs.size
    assert psnr(ours, theirs) >= SMALL_PICTURE_PSNR_DB
    for other in different:
        assert psnr(other, theirs) < SMALL_PICTURE_PSNR_DB


# The families


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
@pytest.mark.parametrize("name", ["sd1", "sd2 base", "sd2 768", "xl", "lcm", "turbo"])
def test_text_to_image(loaded, name, sampler):
    small, pipeline, _, _ = loaded(name)
    ours = draw(pipeline, sampler=sampler)
    other = draw(pipeline, "a house by the sea", sampler=sampler)
    assert_same_picture(ours, reference(small.reference, sampler=sampler), other)


@pytest.mark.parametrize("name", ["sd2 base", "xl", "lcm"])
def test_deep_features_are_kept_between_calls(loaded, name):
    small, pipeline, _, graphs = loaded(name)
    trace_graphs(pipeline.model, graphs, ["step_shallow"])
    ours = draw(pipeline, cache_interval=3)
    with keeping_deep_features(small.reference.unet, 3) as whole:
        expected = reference(small.reference)
    assert whole == [True, False, False, True]
    assert_same_picture(ours, expected, draw(pipeline))


@pytest.mark.parametrize("name", ["sd1", "xl"])
def test_a_negative_prompt_may_be_empty(loaded, name):
    """XL then attends to nothing."""
    small, pipeline, _, _ = loaded(name)
    empty = {"negative_prompt": None if name == "xl" else ""}
    ours, other = draw(pipeline, negative_prompt=""), draw(pipeline)
    assert_same_picture(ours, reference(small.reference, **empty), other)


@pytest.mark.parametrize("name", ["xl", "xl refiner"])
def test_image_to_image(loaded, name):
    small, pipeline, _, _ = loaded(name)
    image = drawing(PIXELS, PIXELS)
    kind, aesthetics = diffusers.StableDiffusionXLImg2ImgPipeline, name == "xl refiner"
    twin = reference_pipeline(kind, small, requires_aesthetics_score=aesthetics)
    fields = {"image": image, "strength": 0.6}
    size = {"height": None, "width": None}
    ours, other = (
        draw(pipeline, **fields, **size),
        draw(pipeline, "a house", **fields, **size),
    )
    expected = reference(twin, **fields)
    assert_same_picture(ours, expected, other)


def test_the_refiner_draws_from_a_text_alone(loaded):
    """diffusers has no such pipeline: its image-to-image gets the starting noise as latents."""
    small, pipeline, _, _ = loaded("xl refiner")
    noise = torch.randn((1, 4, SIDE, SIDE), generator=torch.Generator().manual_seed(SEED))
    image = drawing(PIXELS, PIXELS)
    expected = reference(small.reference, image=image, latents=noise, strength=1.0)
    assert_same_picture(draw(pipeline), expected, draw(pipeline, "a house by the sea"))


def test_inpainting_with_everything_masked(loaded):
    small, pipeline, _, _ = loaded("inpainting")
    white = Image.new("L", (PIXELS, PIXELS), 255)
    masked = {"image": drawing(PIXELS, PIXELS), "mask_image": white, "strength": 1.0}
    ours = draw(pipeline)
    # diffusers' gray lies between 127 and 128, and no picture of bytes has it
    assert psnr(ours, reference(small.reference, **masked)) >= PICTURE_PSNR_DB
    # Norms of a plane of one gray leave float32 three digits.
    gray = torch.full((1, 3, PIXELS, PIXELS), 128 / 127.5 - 1)
    expected = reference(small.reference, **masked, masked_image_latents=gray)
    assert psnr(ours, expected) >= BATCH_PSNR_DB
    assert psnr(draw(pipeline, "a house by the sea"), expected) < PICTURE_PSNR_DB


def half():
    mask = Image.new("L", (PIXELS, PIXELS))
    mask.paste(255, (PIXELS // 3, PIXELS // 4, PIXELS, PIXELS))
    return mask


def test_deep_features_of_nine_channels_are_kept(loaded):
    small, pipeline, _, graphs = loaded("inpainting")
    trace_graphs(pipeline.model, graphs, ["step_shallow"])
    image, mask = drawing(PIXELS, PIXELS), half()
    ours = draw(pipeline, image=image, mask=mask, paste_back=False, cache_interval=2)
    with keeping_deep_features(small.reference.unet, 2):
        expected = reference(small.reference, image=image, mask_image=mask, strength=1.0)
    assert psnr(ours, expected) >= PICTURE_PSNR_DB, "its gray is between two bytes"
    exact = draw(pipeline, image=image, mask=mask, paste_back=False)
    assert psnr(exact, expected) < PICTURE_PSNR_DB


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpainting_with_nine_channels(loaded, strength, sampler):
    small, pipeline, _, _ = loaded("inpainting")
    image, mask = drawing(PIXELS, PIXELS), half()
    fields = {"image": image, "strength": strength, "sampler": sampler}
    ours = draw(pipeline, mask=mask, paste_back=False, **fields)
    expected = reference(small.reference, mask_image=mask, **fields)
    assert psnr(ours, expected) >= PICTURE_PSNR_DB, "its gray is between two bytes"
    assert psnr(draw(pipeline, **fields), expected) < PICTURE_PSNR_DB


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", ["sd1", "xl"])
def test_inpainting_with_ordinary_models(loaded, name, strength):
    small, pipeline, _, _ = loaded(name)
    twin = reference_pipeline(getattr(diffusers, f"{small.kind}InpaintPipeline"), small)
    fields = {"image": drawing(PIXELS, PIXELS), "strength": strength}
    ours = draw(pipeline, mask=half(), paste_back=False, **fields)
    expected = reference(twin, mask_image=half(), **fields)
    assert_same_picture(ours, expected, draw(pipeline, **fields))


def test_a_distilled_model_recommends_steps_and_guidance(loaded):
    small, pipeline, _, _ = loaded("turbo")
    size = {"height": PIXELS, "width": PIXELS}
    ours = pipeline(PROMPT, seed=SEED, sampler="euler", **size).images[0]
    expected = reference(
        small.reference, sampler="euler", num_inference_steps=4, guidance_scale=0.0
    )
    assert_same_picture(ours, expected, draw(pipeline, sampler="euler"))
    assert pipeline.schedule.timestep_spacing == "trailing"
    assert any("few steps (turbo)" in note for note in pipeline.model.notes)


@pytest.mark.parametrize("guidance_scale", [1.5, 8.0])
def test_lcm_is_told_the_guidance_scale(loaded, guidance_scale):
    small, pipeline, _, _ = loaded("lcm")
    ours = draw(pipeline, guidance_scale=guidance_scale)
    expected = reference(small.reference, guidance_scale=guidance_scale)
    assert_same_picture(ours, expected, draw(pipeline, guidance_scale=3.0))
    assert pipeline.model.guidance_scale == 8.0


# The files


@pytest.mark.parametrize("name", SMALL)
def test_every_kind_of_file_gives_the_same_picture(loaded, tmp_path, name):
    small, pipeline, _, graphs = loaded(name)
    size = PIXELS, PIXELS
    shown = {"image": Image.new("RGB", size, "teal")} if pipeline.model.is_editing else {}
    wanted = draw(pipeline, **shown)
    with tempfile.TemporaryDirectory() as place:
        folder = small.write_folder(Path(place) / "folder")
        assert same(draw(opened(folder, graphs), **shown), wanted)
        averages = name == "sd1"
        checkpoint = small.write_training_checkpoint(Path(place), averages=averages)
        read = opened(checkpoint, graphs)
        assert same(draw(read, **shown), wanted)
        assert any("(EMA) are used" in note for note in read.model.notes) == averages


def test_a_sharded_folder_gives_the_same_picture(loaded):
    small, pipeline, _, graphs = loaded("sd1")
    with tempfile.TemporaryDirectory() as place:
        folder = small.write_folder(Path(place) / "folder", max_shard_size="1MB")
        assert len(list(folder.glob("unet/*-of-*.safetensors"))) > 1
        assert same(draw(opened(folder, graphs)), draw(pipeline))


def test_a_variant_of_half_the_size_gives_the_file_of_half_the_size(loaded):
    small, pipeline, _, graphs = loaded("sd1")
    half = replace(small)
    half.reference.to(torch.float16)
    with tempfile.TemporaryDirectory() as place:
        folder = half.write_folder(Path(place) / "folder", variant="fp16")
        assert list(folder.glob("unet/*.fp16.safetensors"))
        file = Path(place) / "half.safetensors"
        save_file({name: value.half() for name, value in small.tensors.items()}, file)
        ours = draw(opened(folder, graphs))
        assert same(draw(opened(file, graphs)), ours)
    half.reference.to(torch.float32)
    assert_same_picture(ours, reference(half.reference))
    assert not same(ours, draw(pipeline))


@pytest.mark.parametrize(
    ("stem", "asked", "taken", "why"),
    [
        ("model", None, "v_prediction", "nothing says so"),
        ("model", "epsilon", "epsilon", "as asked for"),
        ("512-base-ema", None, "epsilon", "from the file's name"),
        ("512-base-ema", "v_prediction", "v_prediction", "as asked for"),
    ],
)
def test_the_prediction_type_of_stable_diffusion_2(loaded, tmp_path, stem, asked, taken, why):
    small, _, file, graphs = loaded("sd2 768")
    path = tmp_path / f"{stem}.safetensors"
    path.symlink_to(file)
    pipeline = opened(path, graphs, prediction_type=asked)
    assert any(f"is {taken}, " in note and why in note for note in pipeline.model.notes)
    twin = small.reference
    own = twin.scheduler
    twin.scheduler = type(own).from_config(own.config, prediction_type=taken)
    expected = reference(twin)
    twin.scheduler = own
    assert_same_picture(draw(pipeline), expected)


def test_a_bad_file_is_one_error(tmp_path):
    for bad in bad_files(tmp_path):
        with pytest.raises(LatentrtError) as caught:
            Pipeline.load(bad.path)
        message = str(caught.value)
        assert isinstance(caught.value, ModelError), bad.name
        assert "\n" not in message, bad.name
        assert len(message) <= 500, bad.name
        assert str(bad.path) in message, bad.name


def test_weights_that_are_not_finite_are_found_before_a_step(loaded, tmp_path):
    small, _, _, graphs = loaded("sd1")
    name = f"{original.UNET}out.2.bias"
    path = tmp_path / "model.safetensors"
    save_file(small.tensors | {name: torch.full_like(small.tensors[name], torch.nan)}, path)
    pipeline = opened(path, graphs)
    with pytest.raises(ModelError, match=r"conv_out\.bias' holds values that are not finite"):
        draw(pipeline)
    path.unlink()


# Adapters


def kohya(small, path):
    """Write a LoRA of every attention, in the UNet and in the text encoders."""
    encoders = {"te": "text_encoder"}
    if small.is_xl:
        encoders = {"te1": "text_encoder", "te2": "text_encoder_2"}
    modules = {}
    for prefix, (component, ends) in {
        "unet": ("unet", ATTENTION),
        **{prefix: (name, TEXT) for prefix, name in encoders.items()},
    }.items():
        state = getattr(small.reference, component).state_dict()
        found = modules_of({name: tuple(value.shape) for name, value in state.items()}, *ends)
        top = "" if component == "unet" else "text_model."
        modules |= {
            f"lora_{prefix}_{top}{m.removeprefix('text_model.')}": s for m, s in found.items()
        }
    write_kohya(path, modules)
    return path


def factor(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 2


def low_rank(kind, shape, seed):
    """Make factors of LyCORIS, and what they add to a weight (arXiv:2309.14859)."""
    rows, columns, rank, alpha = shape[0], int(np.prod(shape[1:])), 4, 2.0
    kernel = (1,) * (len(shape) - 2)
    if kind == "locon":
        up, down = factor((rows, rank, *kernel), seed), factor((rank, *shape[1:]), seed + 1)
        parts = {"lora_up.weight": up, "lora_down.weight": down}
        change = up.flatten(1) @ down.flatten(1)
    elif kind == "loha":
        parts = {
            f"hada_{name}": factor(size, seed + i)
            for i, (name, size) in enumerate(
                {
                    "w1_a": (rows, rank),
                    "w1_b": (rank, columns),
                    "w2_a": (rows, rank),
                    "w2_b": (rank, columns),
                }.items()
            )
        }
        w1 = parts["hada_w1_a"] @ parts["hada_w1_b"]
        change = w1 * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    else:
        inner = (rows // 4, shape[1] // 4, *shape[2:])
        w1 = factor((4, 4), seed)
        a, b = factor((inner[0], rank), seed + 1), factor((rank, int(np.prod(inner[1:]))), seed + 2)
        parts = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}
        change = torch.kron(w1.reshape(4, 4, *(1 for _ in kernel)), (a @ b).reshape(inner))
    return parts | {"alpha": torch.tensor(alpha)}, (alpha / rank) * change.reshape(shape)


LYCORIS = ("locon", "loha", "lokr")
CHANGED = (*ATTENTION, "conv1", "conv_out")


def lycoris(small, kind, path):
    """Write an adapter of attentions and convolutions; return what it adds to the UNet."""
    state = small.reference.unet.state_dict()
    modules = modules_of({name: tuple(value.shape) for name, value in state.items()}, *CHANGED)
    written, changes = {}, {}
    for i, (module, shape) in enumerate(modules.items()):
        if kind == "lokr" and shape[0] < 16:  # conv_out, of 4 channels
            continue
        parts, change = low_rank(kind, shape, 10 * i + 1000 * LYCORIS.index(kind))
        flat = "lora_unet_" + module.replace(".", "_")
        written |= {f"{flat}.{part}": value.contiguous() for part, value in parts.items()}
        changes[f"{module}.weight"] = change
    save_file(written, path)
    return changes


@contextmanager
def fused(module, *changes):
    """Add changes to a module's weights by hand."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    weights = dict(before)
    for change, amount in changes:
        weights |= {name: weights[name] + amount * value for name, value in change.items()}
    module.load_state_dict(weights)
    try:
        yield
    finally:
        module.load_state_dict(before)


@pytest.mark.parametrize("name", ["sd1", "xl"])
def test_loras_of_kohya(loaded, tmp_path, name):
    small, pipeline, file, graphs = loaded(name)
    before = draw(pipeline)
    path = kohya(small, tmp_path / "a.safetensors")
    pipeline.set_loras([f"{path}:0.2"])
    ours = draw(pipeline)
    assert same(draw(opened(file, graphs, loras=[f"{path}:0.2"])), ours)
    small.reference.load_lora_weights(path, adapter_name="a")
    small.reference.set_adapters(["a"], [0.2])
    expected = reference(small.reference)
    small.reference.unload_lora_weights()
    assert_same_picture(ours, expected, before)
    pipeline.set_loras([])
    assert same(draw(pipeline), before)


@pytest.mark.parametrize("kind", LYCORIS)
@pytest.mark.parametrize("name", ["sd1", "xl"])
def test_adapters_of_lycoris(loaded, tmp_path, name, kind):
    small, pipeline, _, _ = loaded(name)
    before = draw(pipeline)
    path = tmp_path / f"{kind}.safetensors"
    changes = lycoris(small, kind, path)
    pipeline.set_loras([f"{path}:0.3"])
    ours = draw(pipeline)
    with fused(small.reference.unet, (changes, 0.3)):
        assert_same_picture(ours, reference(small.reference), before)
    pipeline.set_loras([])
    assert same(draw(pipeline), before)


def test_adapters_add_up_and_are_switched(loaded, tmp_path):
    small, pipeline, file, graphs = loaded("sd1")
    before = draw(pipeline)
    paths = [tmp_path / f"{kind}.safetensors" for kind in LYCORIS]
    changes = [lycoris(small, kind, path) for kind, path in zip(LYCORIS, paths, strict=True)]
    pipeline.set_loras([paths[2]])
    draw(pipeline)
    pipeline.set_loras([f"{paths[0]}:0.3", f"{paths[1]}:-0.2"])
    ours = draw(pipeline)
    with fused(small.reference.unet, (changes[0], 0.3), (changes[1], -0.2)):
        assert_same_picture(ours, reference(small.reference), before)
    fresh = opened(file, graphs, loras=[f"{paths[0]}:0.3", f"{paths[1]}:-0.2"])
    assert same(draw(fresh), ours)
    pipeline.set_loras([])
    assert same(draw(pipeline), before)


def test_an_adapter_of_another_family_is_refused(loaded, tmp_path):
    xl = kohya(loaded("xl")[0], tmp_path / "xl.safetensors")
    small, pipeline, file, graphs = loaded("sd1")
    own = kohya(small, tmp_path / "own.safetensors")
    pipeline.set_loras([own])
    before = draw(pipeline)
    for adapters in ([xl], [own, xl]):
        with pytest.raises(ModelError, match=r"xl\.safetensors .*use an adapter made for this"):
            pipeline.set_loras(adapters)
        assert same(draw(pipeline), before)
    with pytest.raises(ModelError, match=r"xl\.safetensors"):
        opened(file, graphs, loras=[xl])
    pipeline.set_loras([])


@pytest.mark.parametrize("name", ["sd1", "xl"])
def test_another_autoencoder_changes_the_decoder_alone(loaded, tmp_path, name):
    small, pipeline, file, graphs = loaded(name)
    other = replace(small, seed=9)
    names = original.autoencoder_names(small.params.vae)
    tensors = {n: other.tensors[original.VAE + n].contiguous() for n in names}
    path = tmp_path / "vae.safetensors"
    save_file(tensors, path)
    other.reference.vae.save_pretrained(tmp_path / "vae")
    request = Request(prompt=PROMPT, seed=SEED, **FIELDS)
    swapped = opened(file, graphs, vae=path)
    latents = [list(p.denoise(p.plan(request)))[-1].latents for p in (pipeline, swapped)]
    assert np.array_equal(*latents)
    ours = draw(swapped)
    assert same(draw(opened(file, graphs, vae=tmp_path / "vae")), ours)
    own, small.reference.vae = small.reference.vae, other.reference.vae
    expected = reference(small.reference)
    small.reference.vae = own
    assert_same_picture(ours, expected, draw(pipeline))


# Textual inversion

VECTORS = {name: factor((3, 64), seed) for seed, name in enumerate(("clip_l", "clip_g"), 50)}
WORD = "<lighthouse>"
TAUGHT = f"a painting of {WORD} at dusk, {WORD} again"


def a1111(path):
    state = {"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS["clip_l"]}}
    torch.save(state | {"name": WORD, "step": 999, "sd_checkpoint": None}, path)


def learned(path):
    save_file({WORD: VECTORS["clip_l"][0]}, path)


@pytest.mark.parametrize(("file", "write"), [("beacon.pt", a1111), ("beacon.safetensors", learned)])
def test_textual_inversions(loaded, tmp_path, file, write):
    small, pipeline, model, graphs = loaded("sd1")
    write(tmp_path / file)
    before = draw(pipeline, TAUGHT)
    pipeline.set_embeddings([tmp_path / file])
    ours = draw(pipeline, TAUGHT)
    assert same(draw(opened(model, graphs, embeddings=[tmp_path / file]), TAUGHT), ours)
    twin = replace(small)
    twin.reference.load_textual_inversion(tmp_path / file)
    assert_same_picture(ours, reference(twin.reference, TAUGHT), before)
    pipeline.set_embeddings([])
    assert same(draw(pipeline, TAUGHT), before)


def test_a_textual_inversion_of_both_encoders(loaded, tmp_path):
    small, pipeline, _, _ = loaded("xl")
    path = tmp_path / f"{WORD}.safetensors"
    save_file(VECTORS, path)
    before = draw(pipeline, TAUGHT)
    pipeline.set_embeddings([path])
    twin = replace(small).reference
    for vectors, tokenizer, encoder in (
        ("clip_l", "tokenizer", "text_encoder"),
        ("clip_g", "tokenizer_2", "text_encoder_2"),
    ):
        twin.load_textual_inversion(
            VECTORS[vectors],
            token=WORD,
            tokenizer=getattr(twin, tokenizer),
            text_encoder=getattr(twin, encoder),
        )
    ours = draw(pipeline, TAUGHT)
    pipeline.set_embeddings([])
    assert_same_picture(ours, reference(twin, TAUGHT), before)
    assert same(draw(pipeline, TAUGHT), before)


def test_a_textual_inversion_of_another_family_is_refused(loaded, tmp_path):
    _, pipeline, _, _ = loaded("xl")
    before = draw(pipeline)
    learned(tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="use one that was trained for this model's family"):
        pipeline.set_embeddings([tmp_path / "a.safetensors"])
    save_file(VECTORS, tmp_path / "!.safetensors")
    with pytest.raises(RequestError, match="'!' of a textual inversion is a token"):
        pipeline.set_embeddings([tmp_path / "!.safetensors"])
    assert same(draw(pipeline), before)


# The programs

NO_TORCH = """
import json, sys
from pathlib import Path
from engine.backends.settings import BackendSettings
from runtime import Pipeline
model, lora, graphs, fields = json.loads(sys.argv[1])
settings = BackendSettings(backend="cpu", threads=1)
pipeline = Pipeline.load(model, loras=[lora], graphs=Path(graphs), settings=settings)
pipeline(**fields).images[0].save(sys.stdout.buffer, "PNG")
assert not {"torch", "diffusers", "transformers", "safetensors", "onnx"} & sys.modules.keys()
"""


def test_a_file_and_an_adapter_need_no_torch(loaded, tmp_path):
    small, pipeline, file, graphs = loaded("sd1")
    lora = kohya(small, tmp_path / "a.safetensors")
    given = [str(file), str(lora), str(graphs), {**FIELDS, "prompt": PROMPT, "seed": SEED}]
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, json.dumps(given)], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    pipeline.set_loras([lora])
    assert same(Image.open(io.BytesIO(done.stdout)), draw(pipeline))
    pipeline.set_loras([])


def test_the_command_line(loaded, tmp_path, capsys):
    small, _, file, graphs = loaded("sd1")
    lora = kohya(small, tmp_path / "a.safetensors")
    a1111(tmp_path / "a.pt")
    vae = tmp_path / "vae.safetensors"
    names = original.autoencoder_names(small.params.vae)
    save_file(trained(names, 77), vae)
    wanted = opened(
        file,
        graphs,
        loras=[f"{lora}:0.5"],
        embeddings=[tmp_path / "a.pt"],
        vae=vae,
        prediction_type="v_prediction",
    )
    options = [TAUGHT, "--negative-prompt", "blurry", "--steps", "4", "--guidance-scale", "5"]
    options += ["--height", str(PIXELS), "--width", str(PIXELS), "--seed", str(SEED)]
    options += ["--model", str(file), "--graphs", str(graphs), "--threads", "1"]
    options += ["--lora", f"{lora}:0.5", "--vae", str(vae), "--embedding", str(tmp_path / "a.pt")]
    options += ["--prediction-type", "v_prediction", "--out", str(tmp_path / "a.png")]
    assert main(options) == 0
    assert "its prediction type is v_prediction, as asked for" in capsys.readouterr().err
    assert same(Image.open(tmp_path / "a.png"), draw(wanted, TAUGHT))
