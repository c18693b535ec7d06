"""LoRA and whole trainings of small Stable Diffusions: what is learnt, written and drawn again."""

import json
from functools import cache

import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_snr
from PIL import Image
from safetensors.torch import load_file

from engine.backends.settings import BackendSettings
from engine.errors import USER_ERROR
from engine.model import Model
from runtime import Pipeline
from runtime.conditioning.tokenizer import load_tokenizers
from runtime.samplers.noise_schedule import NoiseSchedule
from tests.support.pictures import psnr
from tests.support.small_models import SMALL, trace_graphs
from tests.support.tolerances import PARITY_RTOL, SMALL_PICTURE_PSNR_DB
from training import encoded, stable_diffusion
from training.__main__ import main
from training.captions import read_folder
from training.encoded import Encoded
from training.loop import Loop, LoopSettings
from training.stable_diffusion import StableDiffusion, TuningSettings, target, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SIDE = 64
DRAWN = {
    "height": SIDE,
    "width": SIDE,
    "num_inference_steps": 3,
    "guidance_scale": 4.0,
    "negative_prompt": "blurry",
}
PROMPT = "a red square"
STEPS = ["--steps", "3", "--batch-size", "2", "--size", str(SIDE), "--precision", "float32"]
FAST = ["--learning-rate", "0.05"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for index, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (90 + 10 * index, 70), colour).save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"a {colour} square\n{colour}\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def model(place):
    """Write a small model's file and trace its graphs, when it is first asked for."""

    @cache
    def write(name):
        folder = place / name.replace(" ", "-")
        folder.mkdir()
        file = SMALL[name].write_file(folder)
        trace_graphs(Model.open(file), place)
        return file

    return write


def tune(command, file, pictures, out, work, *more):
    asked = ["--model", str(file), "--images", str(pictures), "--out", str(out)]
    assert main([command, *asked, *STEPS, "--work", str(work), *more]) == 0
    return out


def draw(place, path, **options):
    pipeline = Pipeline.load(path, graphs=place, settings=BackendSettings(threads=1), **options)
    return pipeline(PROMPT, seed=3, sampler="ddim", **DRAWN).images[0]


def reference(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return pipeline(PROMPT, generator=generator, **DRAWN).images[0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sd1", ["--text-encoder", "--layers", "all", "--ema", "0.5", "--alpha", "2"]),
        ("sd1", ["--naming", "diffusers", "--alpha", "8", "--min-snr-gamma", "5"]),
        ("sd2 768", ["--text-encoder"]),
        ("xl", ["--text-encoder", "--layers", "all"]),
        ("xl", ["--text-encoder", "--naming", "diffusers", "--no-recompute"]),
    ],
    ids=["sd1 kohya", "sd1 diffusers", "sd2 768", "xl kohya", "xl diffusers"],
)
def test_a_lora_draws_the_same_in_the_runtime_and_in_diffusers(
    model, place, pictures, tmp_path, name, options
):
    file, lora = model(name), tmp_path / "tuned.safetensors"
    tune("lora", file, pictures, lora, tmp_path, "--rank", "4", *FAST, *options)
    before, ours = draw(place, file), draw(place, file, loras=[lora])
    theirs = SMALL[name].reference
    theirs.load_lora_weights(lora)
    try:
        expected = reference(theirs)
    finally:
        theirs.unload_lora_weights()
    assert psnr(ours, expected) >= SMALL_PICTURE_PSNR_DB
    assert psnr(ours, before) < 40, "the LoRA changes what is drawn"


@pytest.mark.parametrize("name", ["sd1", "xl"])
def test_a_tuned_model_draws_the_same_in_the_runtime_and_in_diffusers(
    model, place, pictures, tmp_path, name
):
    file, out = model(name), tmp_path / "tuned"
    tune("fine-tune", file, pictures, out, tmp_path, "--text-encoder", "--learning-rate", "1e-3")
    theirs = diffusers.DiffusionPipeline.from_pretrained(out, torch_dtype=torch.float32)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    assert psnr(draw(place, out), reference(theirs)) >= SMALL_PICTURE_PSNR_DB
    assert psnr(draw(place, out), draw(place, file)) < 40


def test_a_tuned_folder_keeps_its_other_files(pictures, tmp_path, model, place):
    source, out = SMALL["sd2 base"].write_folder(tmp_path / "source"), tmp_path / "tuned"
    (source / "LICENSE").write_text("as you like")
    tune("fine-tune", source, pictures, out, tmp_path, "--learning-rate", "1e-3")
    inside = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    assert {path.relative_to(out) for path in out.rglob("*") if path.is_file()} == inside
    same = "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "LICENSE"
    assert all((source / name).read_bytes() == (out / name).read_bytes() for name in same)
    weight = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(source / weight), load_file(out / weight)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[n].half(), after[n]) for n in before if "conv1" in n)
    Model.open(out)


@pytest.mark.parametrize("name", ["sd1", "sd2 768", "xl"])
def test_the_module_is_diffusers_and_its_target_too(model, name):
    opened = Model.open(model(name))
    module = StableDiffusion(opened).eval()
    theirs, scheduler = (
        SMALL[name].reference,
        diffusers.DDPMScheduler.from_config(SMALL[name].reference.scheduler.config),
    )
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([10, 900])
    schedule = NoiseSchedule.from_config(opened.scheduler)
    signal = torch.tensor(schedule.alphas_cumprod).float()[timesteps][:, None, None, None]
    alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
    x = scheduler.add_noise(x0, noise, timesteps)
    torch.testing.assert_close(alpha * x0 + sigma * noise, x)
    wanted = noise if name != "sd2 768" else scheduler.get_velocity(x0, noise, timesteps)
    found = target(schedule.prediction_type, x0, noise, alpha, sigma)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    texts = ["a red square", "a lighthouse"]
    ids = {
        part: torch.from_numpy(tokenizer(texts).input_ids)
        for part, tokenizer in load_tokenizers(opened).items()
    }
    added, time_ids = {}, torch.tensor([[70.0, 90, 0, 11, 64, 64]]).expand(2, -1)
    with torch.no_grad():
        if name == "xl":
            embeds, _, pooled, _ = theirs.encode_prompt(texts, do_classifier_free_guidance=False)
            added = {"text_embeds": pooled, "time_ids": time_ids}
        else:
            embeds, _ = theirs.encode_prompt(texts, "cpu", 1, False)
        expected = theirs.unet(x, timesteps, embeds, added_cond_kwargs=added).sample
        actual = module(x, timesteps, ids, torch.zeros(2, dtype=torch.bool), time_ids)
    assert float((actual - expected).norm() / expected.norm()) < PARITY_RTOL


def test_an_empty_text_is_what_the_runtime_takes_for_one(model):
    """Zeros in XL, and the encoded empty text elsewhere."""
    nothing = torch.tensor([True, False])
    for name in ("xl", "sd1"):
        opened = Model.open(model(name))
        module = StableDiffusion(opened).eval()
        ids = {
            part: torch.from_numpy(tokenizer(["", "a"]).input_ids)
            for part, tokenizer in load_tokenizers(opened).items()
        }
        context, pooled = module.condition(ids, nothing)
        assert bool((context[0] == 0).all()) == bool((pooled[0] == 0).all()) == (name == "xl")
        assert context[1].abs().min() > 0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_as_its_authors_do(kind):
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear")
    timesteps = torch.tensor([0, 50, 400, 999])
    snr = compute_snr(scheduler, timesteps)
    least = torch.minimum(snr, torch.tensor(5.0))
    expected = {"epsilon": least / snr, "v_prediction": least / (snr + 1), "sample": least}[kind]
    tuning = TuningSettings(size=64, min_snr_gamma=5.0)
    torch.testing.assert_close(weights(kind, snr, tuning), expected)
    ones = weights(kind, snr, TuningSettings(size=64))
    assert torch.equal(ones, torch.ones(4))
    assert weights("epsilon", torch.zeros(1), tuning).item() == 1, "where there is no signal"


def test_half_of_the_memory_is_enough_for_frozen_matrices(model):
    module = StableDiffusion(Model.open(model("sd1")), half=True)
    stable_diffusion.learn_lora(module, TuningSettings(size=64), rank=2, alpha=2, everywhere=False)
    kinds = {p.dtype for p in module.parameters() if not p.requires_grad and p.ndim > 1}
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}


def test_a_stopped_training_goes_on_and_pictures_are_encoded_once(
    model, pictures, tmp_path, monkeypatch
):
    file, out = model("sd1"), tmp_path / "a.safetensors"
    tune("lora", file, pictures, out, tmp_path, "--rank", "2")
    first = json.loads((tmp_path / "tuning.json").read_text())
    assert first["steps"] == 3
    assert first["peak_memory_bytes"] > 2**27
    state = torch.load(tmp_path / "tuning.pt", weights_only=True)
    assert all(name.endswith(("up.weight", "down.weight")) for name in state["module"])
    monkeypatch.setattr(encoded, "encode", None)
    tune("lora", file, pictures, out, tmp_path, "--rank", "2", "--steps", "5")
    assert json.loads((tmp_path / "tuning.json").read_text())["steps"] == 5


def test_another_training_is_refused_its_checkpoint(model, pictures, tmp_path, capsys):
    file, out = model("sd1"), tmp_path / "a.safetensors"
    tune("lora", file, pictures, out, tmp_path, "--rank", "2")
    asked = ["--model", str(file), "--images", str(pictures), "--out", str(out)]
    again = ["lora", *asked, *STEPS, "--work", str(tmp_path), "--rank", "3"]
    assert main(again) == USER_ERROR
    assert "another training" in capsys.readouterr().err


def test_pictures_are_encoded_as_the_model_encodes(model, pictures, tmp_path):
    opened = Model.open(model("sd1"))
    records = list(read_folder(pictures))
    autoencoder = stable_diffusion.load_autoencoder(opened)
    encoded.encode(records, autoencoder, SIDE, tmp_path / "encoded", "this")
    data = Encoded.load(tmp_path / "encoded")
    assert len(data) == 3
    assert list(data.captions) == [(f"a {n} square", n) for n in ("blue", "green", "red")]
    # 110 by 70 pixels: 101 by 64, and the middle of it
    assert data.sizes[0].tolist() == [70, 110, 0, 18]
    pixels, _ = encoded.square(records[0].image(), SIDE)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        posterior = SMALL["sd1"].reference.vae.encode(x).latent_dist
    expected = torch.cat([posterior.mean, posterior.std], dim=1)[0]
    torch.testing.assert_close(data.moments[0].float(), expected, rtol=2e-3, atol=2e-3)
    assert encoded.is_made_of(tmp_path / "encoded", "this")
    assert not encoded.is_made_of(tmp_path / "encoded", "that")


@pytest.mark.parametrize(
    ("name", "message"),
    [("inpainting", "to fill masks"), ("lcm", "distilled"), ("xl refiner", "refiner")],
)
def test_models_of_another_purpose_are_refused(pictures, tmp_path, capsys, name, message):
    file = SMALL[name].write_file(tmp_path)
    asked = ["--model", str(file), "--images", str(pictures), "--out", str(tmp_path / "a")]
    assert main(["lora", *asked, "--work", str(tmp_path)]) == USER_ERROR
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--size", "60"], "multiples of"),
        (["--rank", "0"], "from 1 on"),
        (["--min-snr-gamma", "-1"], "above 0"),
        (["--drop-captions", "2"], "0 to 1"),
        (["--images", "nowhere"], "is no folder"),
    ],
)
def test_what_cannot_run_is_said(model, pictures, tmp_path, capsys, changes, message):
    asked = ["--model", str(model("sd1")), "--images", str(pictures), "--out", str(tmp_path / "a")]
    assert main(["lora", *asked, "--work", str(tmp_path), *changes]) == USER_ERROR
    assert message in capsys.readouterr().err


def test_colours_are_learnt(model, pictures, tmp_path):
    """A step of the optimiser lowers the loss: the mean of the last is below the first."""
    opened = Model.open(model("sd1"))
    module = StableDiffusion(opened)
    tuning = TuningSettings(size=SIDE, half=False, drop_captions=0, recompute=False)
    stable_diffusion.learn_lora(module, tuning, rank=4, alpha=4, everywhere=True)
    records = read_folder(pictures)
    autoencoder = stable_diffusion.load_autoencoder(opened)
    encoded.encode(records, autoencoder, SIDE, tmp_path / "encoded", "")
    losses = []
    settings = LoopSettings(
        steps=14, batch_size=3, learning_rate=3e-2, warmup_steps=3, ema_decay=None
    )
    update = Loop._update

    def recorded(self, loss):
        losses.append(loss.item())
        update(self, loss)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Loop, "_update", recorded)
        stable_diffusion.train(
            Encoded.load(tmp_path / "encoded"),
            module,
            load_tokenizers(opened),
            opened,
            tuning,
            settings,
            tmp_path,
        )
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
