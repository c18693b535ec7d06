"""The model in pixels: its schedules, its training, its folder in the runtime, and its judge."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from scipy.linalg import sqrtm
from scipy.spatial.distance import pdist

from engine.backends.settings import BackendSettings
from engine.configs.diffusion import IdentityAutoencoderConfig
from engine.engines import open_engine
from engine.errors import ModelError
from engine.graphs.graph import Graph, graph_name
from engine.model import COMPONENTS, Model
from runtime import Pipeline
from runtime.samplers.noise_schedule import NoiseSchedule
from tests.support.digits import write_digits
from tests.support.pixel_models import TINY
from tests.support.tolerances import NOISE_SCHEDULE
from tests.support.traced import trace_once
from training import ddpm, judge
from training.__main__ import main
from training.idx import LabelledPictures
from training.loop import LoopSettings

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CLASSES = ["zero", "One", "2"]
SETTINGS = LoopSettings(steps=3, batch_size=8, learning_rate=1e-3, muon=True)
PARTS = ("text_encoder", "step", "vae_decoder", "vae_encoder")


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("idx")
    write_digits(folder, per_class=40, side=12, classes=3)
    return [LabelledPictures.read(folder, name, 3) for name in ("train", "test")]


@pytest.fixture(scope="module")
def model(splits, tmp_path_factory):
    """Train a tiny model for three steps, write it, and trace its graphs."""
    work = tmp_path_factory.mktemp("work")
    tokenizer = ddpm.class_tokenizer(work / "tokenizer", CLASSES)
    config = ddpm.scheduler("sigmoid", "v_prediction")
    trained = ddpm.train(
        splits[0], tokenizer, CLASSES, SETTINGS, work, config=config, loss="huber", unet=TINY
    )
    ddpm.write(work / "model", trained, work / "tokenizer", config, 12)
    opened = Model.open(work / "model")
    for part in PARTS:
        traced = trace_once(part, opened.configs[COMPONENTS[part]], "float32")
        path = work / "graphs" / graph_name(part, traced.config, "float32")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(traced.model.SerializeToString())
    return work / "model"


def load(model, backend="cpu"):
    settings = BackendSettings(backend=backend, threads=1)
    return Pipeline.load(
        model, graphs=model.parent / "graphs", settings=settings, precision="float32"
    )


@pytest.mark.parametrize("schedule", list(ddpm.SCHEDULES))
@pytest.mark.parametrize("timesteps", [300, 1000])
def test_the_schedules_are_those_of_diffusers(schedule, timesteps):
    config = ddpm.scheduler(schedule, "epsilon", timesteps)
    ours = NoiseSchedule.from_config(config).alphas_cumprod
    theirs = DDPMScheduler.from_config(config).alphas_cumprod.double().numpy()
    np.testing.assert_allclose(np.sqrt(ours), np.sqrt(theirs), rtol=NOISE_SCHEDULE)


def test_what_is_noised_is_what_diffusers_noises(splits, tmp_path, monkeypatch):
    """The loss on known noise is that of diffusers' scheduler's own pictures and targets."""
    tokenizer = ddpm.class_tokenizer(tmp_path / "tokenizer", CLASSES)
    for prediction in ddpm.PREDICTIONS:
        config = ddpm.scheduler("quadratic", prediction)
        scheduler = DDPMScheduler.from_config(config)
        seen = []

        def forward(unet, x, timesteps, context, seen=seen):
            seen.append((x, timesteps))
            return unet.conv_in.weight.sum() * x

        def l2(out, wanted, seen=seen):
            seen.append(wanted)
            return (out - wanted).square().mean()

        monkeypatch.setattr(ddpm.Denoiser, "__call__", forward)
        monkeypatch.setattr("export.modules.unet.UNet.__call__", forward)
        monkeypatch.setitem(ddpm.LOSSES, "l2", l2)
        one = dataclasses.replace(SETTINGS, steps=1)
        folder = tmp_path / prediction
        ddpm.train(splits[0], tokenizer, CLASSES, one, folder, config=config, loss="l2", unet=TINY)
        (x, timesteps), wanted = seen
        alpha = scheduler.alphas_cumprod[timesteps].sqrt()[:, None, None, None]
        sigma = (1 - alpha**2).sqrt()
        if prediction == "epsilon":
            noise, x0 = wanted, (x - sigma * wanted) / alpha
        else:
            noise, x0 = sigma * x + alpha * wanted, alpha * x - sigma * wanted
            velocity = scheduler.get_velocity(x0, noise, timesteps)
            torch.testing.assert_close(velocity, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            scheduler.add_noise(x0, noise, timesteps), x, rtol=1e-4, atol=1e-4
        )
        images = {tuple(i.flatten().tolist()) for i in splits[0].images}
        drawn = ((x0 + 1) * 127.5).round().int()
        gentle = timesteps < 100  # where float32 gives back what was there, byte for byte
        assert all(tuple(i.flatten().tolist()) in images for i in drawn[gentle])


@pytest.mark.parametrize("backend", ["cpu", "openvino"])
def test_the_runtime_draws_it_without_an_autoencoder(model, backend):
    pipeline = load(model, backend)
    assert pipeline.model.vae == IdentityAutoencoderConfig(latent_channels=1)
    result = pipeline(["zero", "2"], seed=3, num_inference_steps=4, sampler="ddpm")
    assert [image.size for image in result.images] == [(12, 12)] * 2
    for image in map(np.asarray, result.images):
        np.testing.assert_array_equal(image[..., 0], image[..., 1])
    latents = pipeline(
        ["zero", "2"], seed=3, num_inference_steps=4, sampler="ddpm", output_type="latent"
    ).images
    expected = (latents[:, 0] * 127.5 + 127.5).clip(0, 255).round()
    np.testing.assert_array_equal(np.stack(result.images)[..., 0], expected)


@pytest.mark.parametrize("backend", ["cpu", "openvino"])
def test_a_picture_starts_from_itself(model, backend):
    """Image-to-image at the least strength is one step from the picture's own pixels."""
    rng = np.random.default_rng(0)
    start = Image.fromarray(rng.integers(0, 256, (16, 20, 3), np.uint8))
    pipeline = load(model, backend)
    plan_options = {"num_inference_steps": 4, "strength": 0.25, "seed": 1}
    image = pipeline("zero", image=start, **plan_options).images[0]
    assert image.size == (20, 16)
    reference = load(model)("zero", image=start, **plan_options).images[0]
    assert np.abs(np.asarray(image, int) - np.asarray(reference, int)).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("backend", ["cpu", "openvino"])
def test_pixels_come_back_as_they_went_in(tmp_path, channels, backend):
    config = IdentityAutoencoderConfig(latent_channels=channels)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), np.uint8)
    engines = {}
    for part in ("vae_encoder", "vae_decoder"):
        path = tmp_path / graph_name(part, config, "float32")
        path.write_bytes(trace_once(part, config, "float32").model.SerializeToString())
        engines[part] = open_engine(
            Graph.read(path), {}, BackendSettings(backend=backend), "float32"
        )
    noise = np.ones((2, channels, 8, 12), np.float32)
    latents = engines["vae_encoder"].run({"pixels": pixels, "noise": noise})["latents"]
    back = engines["vae_decoder"].run({"latents": latents})["pixels"]
    if channels == 3:
        np.testing.assert_array_equal(back, pixels)
        return
    gray = np.stack([np.asarray(Image.fromarray(each).convert("L"), int) for each in pixels])
    assert np.abs(back[..., 0] - gray).max() <= 1, "Pillow cuts off, and this rounds"


def test_an_identity_of_two_channels_or_another_class_is_refused():
    with pytest.raises(ModelError, match="latent_channels is 4; 1"):
        IdentityAutoencoderConfig(latent_channels=4)
    with pytest.raises(ModelError, match="an IdentityAutoencoder's is expected"):
        IdentityAutoencoderConfig.from_dict({"_class_name": "AutoencoderKL"})


def test_the_judge_knows_drawn_digits_and_tells_what_is_drawn(splits, model, tmp_path):
    settings = LoopSettings(steps=150, batch_size=32, learning_rate=3e-3, warmup_steps=20)
    trained = judge.train(splits[0], 3, settings, tmp_path)
    seen, _ = judge.look(trained, splits[1].images)
    assert (seen == splits[1].labels).mean() > 0.9
    prompts = [CLASSES[label] for label in splits[1].labels]
    drawn = judge.draw(load(model), prompts, 0, num_inference_steps=2)
    report = judge.evaluate(trained, drawn, *splits)
    assert report["pictures"] == 120
    assert 0 <= report["accuracy_drawn"] < report["accuracy_real_test"]
    assert report["times_the_floor"] > 1, "three steps teach nothing"
    perfect = judge.evaluate(trained, splits[1].images, *splits)
    assert perfect["times_the_floor"] == 1
    assert perfect["accuracy_drawn"] == perfect["accuracy_real_test"]
    assert perfect["diversity_of_real"] == {"features": 1, "pixels": 1}
    firsts = [int((splits[1].labels == label).argmax()) for label in range(3)]
    collapsed = judge.evaluate(trained, splits[1].images[firsts][splits[1].labels], *splits)
    assert collapsed["diversity_of_real"] == pytest.approx({"features": 0, "pixels": 0}, abs=1e-6)
    assert collapsed["times_the_floor"] > 1


def test_pictures_of_a_class_that_are_all_alike_have_no_diversity():
    labels = np.array([0, 1, 0, 1, 0, 2])
    values = np.random.default_rng(0).normal(size=(3, 5))[labels]
    assert judge.diversity(values, labels) == pytest.approx(0, abs=1e-6)
    values[4] += [3, 0, 4, 0, 0]  # two of the three pairs of a class are 5 apart, and none of b's
    assert judge.diversity(values, labels) == pytest.approx((2 / 3 * 5 + 0) / 2)
    rng = np.random.default_rng(1)
    values, labels = rng.normal(size=(40, 7)), np.arange(40) % 4
    expected = np.mean([pdist(values[labels == each]).mean() for each in range(4)])
    assert judge.diversity(values, labels) == pytest.approx(expected)
    assert judge.diversity(values[:3], labels[:3]) == 0, "classes of one picture have no pairs"


def test_the_grid_has_a_row_for_each_class():
    labels = np.array([1, 0, 1, 1, 0])
    images = np.arange(5, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 8), np.uint8)
    rows = judge.grid(images, labels, count=3)
    assert [row.shape for row in rows] == [(3, 8, 8, 3)] * 2
    assert [row[:, 0, 0, 0].tolist() for row in rows] == [[1, 4, 0], [0, 2, 3]]


def test_the_frechet_distance_is_that_of_the_equation():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200, 6)), rng.normal(1, 2, (300, 6)) @ rng.normal(size=(6, 6))
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root)
    assert judge.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert judge.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    a[:, 5] = b[:, 5] = 0  # a feature that never fires counts for nothing
    assert judge.frechet_distance(a, b) == pytest.approx(
        judge.frechet_distance(a[:, :5], b[:, :5]), rel=1e-6
    )


def test_the_commands_refuse_in_a_sentence_and_train(tmp_path, capsys):
    asked = ["--idx", str(tmp_path), "--work", str(tmp_path / "work")]
    out = ["--out", str(tmp_path / "model"), "--steps", "1", "--batch-size", "2"]
    assert main(["ddpm", *asked, *out]) == 2
    assert "has no train-images-idx3-ubyte" in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
    write_digits(tmp_path, per_class=1, side=8)
    assert main(["ddpm", *asked, *out, "--classes", "a,A,b"]) == 2
    assert "no two alike" in capsys.readouterr().err
    assert main(["ddpm", *asked, *out, "--classes", "a,b"]) == 2
    assert "beyond the 2 classes" in capsys.readouterr().err
    assert main(["ddpm", *asked, *out, "--beta-schedule", "linear", "--loss", "l1"]) == 0
    written = json.loads((tmp_path / "model/scheduler/scheduler_config.json").read_text())
    assert (written["beta_schedule"], written["num_train_timesteps"]) == ("linear", 300)
    assert Model.open(tmp_path / "model").sample_size == 8
    assert "python -m export" in capsys.readouterr().out
