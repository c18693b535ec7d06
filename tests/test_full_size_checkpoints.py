"""Checkpoints of published sizes, random numbers: every format against diffusers (`-m slow`).

Files are written with the names of the original training code and read by diffusers' own
conversion code, the oracle, and by ours. Needs 24 GB of memory and 25 GB of disk for XL.
"""

import gc
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils as diffusers_names
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from engine.backends.settings import BackendSettings
from engine.configs.diffusion import XL_SCALING_FACTOR
from engine.engines import open_engine
from engine.graphs.graph import find_graph, graph_folders
from engine.model import Model
from export.parity import TOLERANCES, relative_error
from runtime import Pipeline
from tests.support import original_layout as original
from tests.support import published_configs as published
from tests.support.pictures import psnr
from tests.support.small_models import make_tokenizer
from tests.support.tolerances import CHECKPOINT_RTOL, PICTURE_PSNR_DB

pytestmark = pytest.mark.slow

UNETS = {"sd1": published.UNET_SD15, "sd2": published.UNET_SD21, "xl": published.UNET_XL}
VAES = {"sd1": published.VAE_SD15, "sd2": published.VAE_SD15, "xl": published.VAE_XL}
FILES = {  # the file's name, family, prediction type
    "sd15": ("v1-5-pruned-emaonly", "sd1", "epsilon"),
    "sd21-base": ("v2-1_512-ema-pruned", "sd2", "epsilon"),
    "sd21-768": ("v2-1_768-ema-pruned", "sd2", "v_prediction"),
    "xl": ("sd_xl_base_1.0", "xl", "epsilon"),
}
SETTINGS = BackendSettings()


def random_tensors(names):
    """float16 numbers with which activations keep the size they come in, as after training."""
    pool = np.random.default_rng(len(names)).standard_normal(2**24).astype(np.float32)
    tensors = {}
    for name, shape in names.items():
        values = np.resize(pool, shape)
        if len(shape) < 2:
            is_norm = name.endswith("weight")  # no other weight has one axis
            values = 0.05 * values + (1.0 if is_norm else 0.0)
        else:
            values = values / math.sqrt(math.prod(shape[1:]))
        tensors[name] = np.asarray(values, np.float16)
    return tensors


class Files:
    """One model in every format, and what diffusers makes of it."""

    def __init__(self, folder, stem, family):
        self.family, self.params = family, original.FULL[family]
        self.single = folder / f"{stem}.safetensors"
        self.pickled = folder / "pickled" / f"{stem}.ckpt"
        self.folder = folder / "diffusers"
        tensors = random_tensors(original.model_names(self.params))
        safetensors.numpy.save_file(tensors, self.single)
        self.pickled.parent.mkdir()
        state = {name: torch.from_numpy(value) for name, value in tensors.items()}
        torch.save({"state_dict": state, "global_step": 1, "epoch": 0}, self.pickled)

    def state(self, prefix):
        """The original tensors of one part in float32."""
        with safetensors.safe_open(self.single, "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name: file.get_tensor(name).float() for name in names}

    def formats(self):
        return {"one file": self.single, "pickled": self.pickled, "sharded folder": self.folder}

    def save(self, model, name):
        """Write a component as diffusers and transformers do, in shards and float16."""
        model.half().save_pretrained(self.folder / name, max_shard_size="500MB")


@pytest.fixture(scope="module", params=FILES)
def files(request, tmp_path_factory):
    stem, family, prediction_type = FILES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    made = Files(folder, stem, family)
    made.prediction_type = prediction_type
    describe_folder(made)
    yield made
    shutil.rmtree(folder)


def built(model_class, config, state):
    """A model whose parameters are those of a state dict, without a second copy."""
    with torch.device("meta"):
        model = model_class(config) if config is not None else model_class
    left = model.load_state_dict(state, strict=False, assign=True)
    assert all("position_ids" in name for name in (*left.missing_keys, *left.unexpected_keys)), left
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            assert name.endswith("position_ids")
            owner = model.get_submodule(name.rpartition(".")[0])
            owner.position_ids = torch.arange(buffer.shape[-1])[None]
    return model.eval()


def unet_of(files):
    values = UNETS[files.family]
    state = diffusers_names.convert_ldm_unet_checkpoint(files.state(original.UNET), dict(values))
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(values)
    return built(model, None, state)


def vae_of(files):
    values = VAES[files.family]
    state = diffusers_names.convert_ldm_vae_checkpoint(files.state(original.VAE), dict(values))
    with torch.device("meta"):
        model = AutoencoderKL.from_config(values)
    return built(model, None, state)


def text_encoders_of(files):
    """The text encoders by the name of their component."""
    if files.params.clip:
        place = original.XL_CLIP if files.family == "xl" else original.CLIP
        state = diffusers_names.convert_ldm_clip_checkpoint(files.state(place))
        state = {name.removeprefix("text_model."): value for name, value in state.items()}
        config = CLIPTextConfig.from_dict(published.TEXT_SD15)
        yield "text_encoder", built(CLIPTextModel, config, state)
    if files.params.open_clip:
        place = original.XL_OPEN_CLIP if files.family == "xl" else original.OPEN_CLIP
        values = published.TEXT_XL_2 if files.family == "xl" else published.TEXT_SD21
        shape = SimpleNamespace(config=SimpleNamespace(hidden_size=values["hidden_size"]))
        state = diffusers_names.convert_open_clip_checkpoint(shape, files.state(place), place)
        if files.family == "xl":
            model_class, name = CLIPTextModelWithProjection, "text_encoder_2"
        else:
            model_class, name = CLIPTextModel, "text_encoder"
            state = {
                key.removeprefix("text_model."): value
                for key, value in state.items()
                if ".layers.23." not in key and "text_projection" not in key
            }
        yield name, built(model_class, CLIPTextConfig.from_dict(values), state)


def engine(model, part, precision="float32"):
    graph = find_graph(part, model.config(part), precision, graph_folders(), model.path)
    return open_engine(graph, model.weights(part), SETTINGS)


def in_every_format(files, part, inputs, expected):
    """Run a part of each format and compare one output after the other; one also in float16."""
    cases = [(*item, "float32", CHECKPOINT_RTOL) for item in files.formats().items()]
    cases.append(("one file", files.single, "float16", TOLERANCES["float16"]))
    for layout, path, precision, tolerance in cases:
        given = engine(Model.open(path), part, precision).run(inputs)
        for name, value in expected.items():
            error = relative_error(given[name], value)
            print(f"{files.single.stem}, {layout}, {precision} {part}, {name}: {error:.1e}")
            assert error < tolerance
        gc.collect()


def describe_folder(files):
    """Write what a folder says beside the weights."""
    kind = "StableDiffusionXLPipeline" if files.family == "xl" else "StableDiffusionPipeline"
    files.folder.mkdir(exist_ok=True)
    (files.folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=files.prediction_type,
    )
    scheduler.save_pretrained(files.folder / "scheduler")
    for name, values in (("unet", UNETS[files.family]), ("vae", VAES[files.family])):
        (files.folder / name).mkdir(exist_ok=True)
        (files.folder / name / "config.json").write_text(json.dumps(values))
    for name, _ in text_configs(files).items():
        (files.folder / name).mkdir(exist_ok=True)
        (files.folder / name / "config.json").write_text(json.dumps(text_configs(files)[name]))


def text_configs(files):
    if files.family == "sd1":
        return {"text_encoder": published.TEXT_SD15}
    if files.family == "sd2":
        return {"text_encoder": published.TEXT_SD21}
    return {"text_encoder": published.TEXT_SD15, "text_encoder_2": published.TEXT_XL_2}


@torch.no_grad()
def test_text_encoders_and_what_the_files_are(files):
    for path in files.formats().values():
        model = Model.open(path)
        assert model.scheduler["prediction_type"] == files.prediction_type
        scaling_factor = XL_SCALING_FACTOR if files.family == "xl" else 0.18215
        assert model.vae.scaling_factor == scaling_factor
    input_ids = torch.randint(0, 49406, (2, 77), generator=torch.Generator().manual_seed(0))
    input_ids[:, 0], input_ids[:, 20:] = 49406, 49407
    for name, reference in text_encoders_of(files):
        out = reference(input_ids, output_hidden_states=True)
        expected = {
            "last_hidden_state": out.last_hidden_state.numpy(),
            "penultimate_hidden_state": out.hidden_states[-2].numpy(),
        }
        if name == "text_encoder_2":
            expected["pooled"] = out.text_embeds.numpy()
        files.save(reference, name)
        del reference, out
        width = expected["last_hidden_state"].shape[-1]
        inputs = {
            "input_ids": input_ids.numpy(),
            "extra_embeddings": np.zeros((1, width), np.float32),
        }
        in_every_format(files, name, inputs, expected)


@torch.no_grad()
def test_autoencoder(files):
    reference = vae_of(files)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 32, 24, generator=generator)
    factor = VAES[files.family].get("scaling_factor", 0.18215)
    pixels = reference.decode(latents / factor).sample
    pixels = (pixels * 127.5 + 127.5).clamp(0, 255).round().permute(0, 2, 3, 1)
    shown = torch.randint(0, 256, (1, 256, 192, 3), generator=generator).to(torch.uint8)
    moments = reference.encode(shown.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    encoded = moments.mean.numpy() * factor
    files.save(reference, "vae")
    del reference
    noise = np.zeros((1, 4, 32, 24), np.float32)
    in_every_format(
        files, "vae_encoder", {"pixels": shown.numpy(), "noise": noise}, {"latents": encoded}
    )
    for layout, path in files.formats().items():
        given = engine(Model.open(path), "vae_decoder").run({"latents": latents.numpy()})["pixels"]
        difference = np.abs(given.astype(int) - pixels.numpy().astype(int))
        print(f"{files.single.stem}, {layout}, vae_decoder: {psnr(given, pixels):.0f} dB")
        assert difference.max() <= 1, "rounding to bytes alone"
    half = engine(Model.open(files.single), "vae_decoder", "float16")
    given = half.run({"latents": latents.numpy()})["pixels"]
    print(f"{files.single.stem}, float16 vae_decoder: {psnr(given, pixels):.0f} dB")
    assert psnr(given, pixels) >= PICTURE_PSNR_DB
    assert pixels.std() > 5, "not one colour"


@torch.no_grad()
def test_unet(files):
    reference = unet_of(files)
    generator = torch.Generator().manual_seed(0)
    values = UNETS[files.family]
    sample = torch.randn(1, 4, 32, 24, generator=generator)
    context = torch.randn(1, 77, values["cross_attention_dim"], generator=generator)
    inputs = {
        "registers": sample[:, None].numpy(),
        "matrices": np.array([[[0, 1, 0]]], np.float32),  # what the UNet gives, and nothing else
        "timestep": np.array([500], np.float32),
        "input_scale": np.ones(1, np.float32),
        "context": context[None].numpy(),
        "guidance": np.ones((1, 1, 1, 1, 1), np.float32),
        "guidance_rescale": np.zeros(1, np.float32),
        "noise": np.zeros((1, 4, 32, 24), np.float32),
        "mask": np.ones((1, 1, 32, 24), np.float32),
        "outside": np.zeros((1, 3), np.float32),
    }
    added = None
    if files.family == "xl":
        text_embeds = torch.randn(1, 1280, generator=generator)
        time_ids = torch.tensor([[1024.0, 768, 0, 0, 1024, 768]])
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        inputs |= {"text_embeds": text_embeds[None].numpy(), "time_ids": time_ids[None].numpy()}
    out = reference(sample, 500, context, added_cond_kwargs=added).sample
    expected = out.numpy()[:, None]
    files.save(reference, "unet")
    del reference
    gc.collect()
    in_every_format(files, "step", inputs, {"next_registers": expected})


def test_a_whole_picture_of_stable_diffusion_15(tmp_path):
    made = Files(tmp_path, "v1-5-pruned-emaonly", "sd1")
    options = {"num_inference_steps": 4, "guidance_scale": 7.5, "height": 512, "width": 512}
    prompt, negative = "a lighthouse at dusk", "blurry"
    pipeline = Pipeline.load(made.single)
    ours = pipeline(prompt, negative_prompt=negative, seed=7, **options).images[0]
    scheduler = DDIMScheduler.from_config(dict(pipeline.model.scheduler))
    del pipeline
    gc.collect()
    reference = StableDiffusionPipeline(
        vae=vae_of(made),
        text_encoder=dict(text_encoders_of(made))["text_encoder"],
        tokenizer=make_tokenizer("<|endoftext|>"),
        unet=unet_of(made),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    reference.set_progress_bar_config(disable=True)
    theirs = reference(
        prompt, negative_prompt=negative, generator=[torch.Generator().manual_seed(7)], **options
    ).images[0]
    for name, image in (("ours", ours), ("theirs", theirs)):
        image.save(Path(tmp_path) / f"{name}.png")
    print(f"a 512 × 512 picture of Stable Diffusion 1.5 size: {psnr(ours, theirs):.1f} dB")
    assert ours.size == (512, 512)
    assert np.asarray(theirs).std() > 5, "not one colour"
    assert psnr(ours, theirs) >= PICTURE_PSNR_DB
