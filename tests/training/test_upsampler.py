"""The second stage: its data, its two networks beside the runtime's, and its commands."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from PIL import Image

from engine.configs.upsampler import STEPS, UpsamplerConfig
from engine.configs.upscalers import CompactConfig
from runtime.images.upsampling import Sampling
from runtime.images.upscaler import Upscaler
from tests.support.unet2d import unet2d
from training import upsampler, upsampler_commands, upsampler_quality
from training.__main__ import main
from training.diffusers_folder import save_whole
from training.judge import frechet_distance
from training.loop import LoopSettings
from training.pictograms import MARGIN, Pictograms, render
from training.upsampler_networks import (
    OnePass,
    UpsamplerUNet,
    one_pass_config,
    one_pass_products,
)

CONFIG = UpsamplerConfig(block_out_channels=(8, 16), upscale=2)
SETTINGS = LoopSettings(
    steps=3, batch_size=4, learning_rate=2e-3, warmup_steps=2, muon=True, ema_decay=0.9
)
SIDE = 32


def shapes(count, side=SIDE, seed=0):
    """Draw disks of one colour on white, as icons are."""
    rng = np.random.default_rng(seed)
    pictures = np.full((count, side, side, 3), 255, np.uint8)
    places = np.stack(np.mgrid[:side, :side], axis=-1)
    for picture in pictures:
        for _ in range(3):
            near = np.hypot(*(places - rng.uniform(0, side, 2)).transpose(2, 0, 1))
            picture[near < rng.uniform(side / 8, side / 3)] = rng.integers(0, 256, 3)
    return pictures


def pictograms(subjects=6):
    held_out = np.zeros((subjects, 4), bool)
    held_out[1, 2] = held_out[4, 0] = True
    return Pictograms(
        names=tuple(f"subject {i}" for i in range(subjects)),
        keywords=((),) * subjects,
        images=shapes(4 * subjects).reshape(subjects, 4, SIDE, SIDE, 3),
        held_out=held_out,
        everyday=np.ones(subjects, bool),
    )


def randomised(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def test_a_subject_is_held_out_in_every_style():
    data = pictograms()
    train, held_out = upsampler.split(data)
    assert (len(train), len(held_out)) == (16, 8)
    np.testing.assert_array_equal(held_out[:4], data.images[1])
    np.testing.assert_array_equal(held_out[4:], data.images[4])
    assert not (train[:, None] == held_out).all((2, 3, 4)).any()


def test_pictograms_are_drawn_larger_in_the_same_place():
    pytest.importorskip("resvg_py")
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><path d="M0 0h8v8H0z"/></svg>'
    small, large = render(svg), render(svg, 256)
    assert large.shape == (256, 256, 3)
    np.testing.assert_array_equal(upsampler.made_low(large, 2), small)
    assert large[2 * MARGIN, 2 * MARGIN].sum() == 0 < large[2 * MARGIN - 1, 2 * MARGIN].sum()


@pytest.mark.parametrize("scale", [2, 4])
def test_crops_lie_above_each_other(scale, monkeypatch):
    monkeypatch.setattr(upsampler, "CROP", 16)
    images = shapes(5)
    batch = upsampler.pairs(images, scale, 12, np.random.default_rng(3))
    assert batch.high.shape == batch.enlarged.shape == (12, 3, 16, 16)
    assert batch.low.shape == (12, 3, 16 // scale, 16 // scale)
    means = torch.nn.functional.avg_pool2d(batch.high, scale)
    assert abs(means - batch.low).max() <= 1.01 / 127.5, "of bytes, rounded"
    again = upsampler.pairs(images, scale, 12, np.random.default_rng(3))
    torch.testing.assert_close(batch.high, again.high, rtol=0, atol=0)
    error = float((batch.enlarged - batch.high).abs().mean())
    assert error < float((batch.enlarged - batch.high.flip(3)).abs().mean()) / 2


@pytest.mark.parametrize(
    "config", [CONFIG, UpsamplerConfig(block_out_channels=(8, 8, 16), upscale=4)]
)
def test_the_unet_is_diffusers_and_draws_as_the_runtime_does(config, tmp_path):
    torch.manual_seed(0)
    unet = randomised(UpsamplerUNet(config))
    path = tmp_path / "up.safetensors"
    save_whole({f"upsampler.{n}": v for n, v in unet.state_dict().items()}, path)
    sample = torch.randn(2, 2 * config.out_channels, 8, 12)
    timesteps, levels = torch.tensor([999, 3]), torch.tensor([0, 80])
    with torch.no_grad():
        expected = unet2d(path, config)(sample, timesteps, class_labels=levels).sample
        found = unet(sample, timesteps, levels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    low = np.stack([upsampler.made_low(each, config.scale) for each in shapes(1)])
    drawn = np.asarray(Upscaler.load(path)(Image.fromarray(low[0])), int)
    with torch.autocast("cpu", enabled=False), pytest.MonkeyPatch.context() as patch:
        patch.setattr(upsampler, "autocast", lambda device: torch.autocast("cpu", enabled=False))
        ours = upsampler.upsampled(unet, low, "cpu")[0].astype(int)
    assert abs(drawn - ours).max() <= 1


def test_the_network_of_one_pass_is_the_runtimes(tmp_path):
    torch.manual_seed(0)
    config = CompactConfig(num_feat=8, num_conv=2, upscale=4)
    network = randomised(OnePass(config))
    save_whole(network.state_dict(), tmp_path / "once.safetensors")
    low = upsampler.made_low(shapes(1)[0], 4)
    with torch.no_grad():
        floats = torch.from_numpy(low.copy()).permute(2, 0, 1)[None].float() / 255
        expected = (network(floats)[0].permute(1, 2, 0) * 255).round().clamp(0, 255).numpy()
    file = Upscaler.load(tmp_path / "once.safetensors")
    assert file.file.config == config
    assert abs(np.asarray(file(Image.fromarray(low)), int) - expected).max() <= 1


@pytest.mark.parametrize("scale", [2, 4])
def test_both_make_as_many_multiplications(scale):
    config = UpsamplerConfig(block_out_channels=upsampler.WIDTHS[scale], upscale=scale)
    compact = one_pass_config(config, STEPS)
    assert one_pass_products(compact) == pytest.approx(STEPS * config.products(), rel=0.03)
    convolutions = [s for s in compact.tensor_shapes().values() if len(s) == 4]
    assert one_pass_products(compact) == sum(int(np.prod(s)) for s in convolutions)


def test_both_networks_learn(tmp_path, monkeypatch, capsys):
    """From repeated pixels and from Lanczos' picture on, in a few seconds."""
    monkeypatch.setattr(upsampler, "CROP", 16)
    images, watched = shapes(40), shapes(6, seed=9)
    many = LoopSettings(
        steps=60, batch_size=8, learning_rate=4e-3, warmup_steps=5, muon=True, ema_decay=0.9,
        sample_steps=60,
    )  # fmt: skip
    low = np.stack([upsampler.made_low(each, 2) for each in watched])
    plain = np.stack([upsampler.enlarge(each, 2) for each in low])
    compact = CompactConfig(num_feat=16, num_conv=2, upscale=2)
    begun = upsampler.psnr(watched, upsampler.enlarged(OnePass(compact), low, "cpu"))
    once = upsampler.train_one_pass(images, watched, compact, many, tmp_path)
    assert upsampler.psnr(watched, upsampler.enlarged(once, low, "cpu")) > begun + 0.4
    missed, mse_loss = [], upsampler.F.mse_loss

    def compared(found, wanted):
        loss = mse_loss(found, wanted)
        missed.append(float(loss.detach() / wanted.square().mean()))
        return loss

    monkeypatch.setattr(upsampler.F, "mse_loss", compared)
    config = UpsamplerConfig(block_out_channels=(24,), upscale=2)
    begun = upsampler.psnr(watched, upsampler.upsampled(UpsamplerUNet(config), low, "cpu"))
    assert begun == pytest.approx(upsampler.psnr(watched, plain), abs=0.1)
    upsampler.train_diffusion(images, watched, config, many, tmp_path)
    assert missed[0] == pytest.approx(1), "all that Lanczos' kernel leaves out"
    assert np.mean(missed[-10:]) < 0.8
    assert capsys.readouterr().out.count("of 6 held-out pictures, Lanczos") == 2


def test_what_is_noised_and_asked_for(tmp_path, monkeypatch):
    """What is asked for makes the picture of the low one; x is that, as diffusers noises it."""
    seen = []

    def nothing(unet, sample, timesteps, levels):
        seen.append((sample, timesteps, levels))
        nothing = sum(0 * parameter.sum() for parameter in unet.parameters())
        return nothing + 0 * sample[:, : sample.shape[1] // 2]

    def compared(found, wanted):
        seen.append(wanted)
        return (found - wanted).square().mean()

    monkeypatch.setattr(UpsamplerUNet, "forward", nothing)
    monkeypatch.setattr(upsampler.F, "mse_loss", compared)
    settings = LoopSettings(steps=1, batch_size=32, learning_rate=1e-3)
    images = shapes(4)
    upsampler.train_diffusion(images, images, CONFIG, settings, tmp_path)
    (sample, timesteps, levels), x0 = seen
    x, low = sample.chunk(2, dim=1)
    pictures = torch.nn.functional.pixel_shuffle(low + x0 / upsampler.RESIDUAL_SCALE, 2)
    found = (pictures * 127.5 + 127.5).permute(0, 2, 3, 1).numpy()
    known = np.concatenate([images, images[:, :, ::-1]]).astype(np.float32)
    distances = abs(found[:, None] - known[None]).max((2, 3, 4))
    assert distances.min(1).max() < 0.1
    scheduler = DDIMScheduler.from_config(dict(upsampler.SCHEDULER))
    still = scheduler.add_noise(x0, torch.zeros_like(x0), timesteps)
    sigmas = (1 - scheduler.alphas_cumprod[timesteps]).sqrt()
    spread = (x - still).flatten(1).std(1)
    torch.testing.assert_close(spread, sigmas, rtol=0.1, atol=1e-3)
    assert 0 <= int(levels.min()) < int(levels.max()) <= upsampler.MAX_NOISE_LEVEL
    assert 5 < int((levels == 0).sum()) < 27
    enlarged = np.stack([upsampler.enlarge(upsampler.made_low(i, 2), 2) for i in images])
    enlarged = np.concatenate([enlarged, enlarged[:, :, ::-1]])[distances.argmin(1)]
    cells = torch.nn.functional.pixel_unshuffle(torch.from_numpy(enlarged).movedim(3, 1), 2)
    low_res = DDPMScheduler.from_config(dict(upsampler.LOW_RES_SCHEDULER))
    still = low_res.add_noise(cells / 127.5 - 1, torch.zeros(cells.shape), levels)
    sigmas = (1 - low_res.alphas_cumprod[levels]).sqrt()
    torch.testing.assert_close((low - still).flatten(1).std(1), sigmas, rtol=0.1, atol=1e-3)


class Judge:
    """Sees means of squares, at two sizes."""

    def __call__(self, pixels):
        return [torch.nn.functional.avg_pool2d(pixels, n) for n in (4, 8)]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(upsampler, "CROP", 16)
    monkeypatch.setattr(upsampler, "WIDTHS", {2: (8, 16), 4: (8, 16)})
    drawn = []

    def build(folder, *, everyday, size, progress):
        drawn.append((everyday, size))
        return pictograms()

    monkeypatch.setattr(upsampler_commands.pictograms, "build", build)
    monkeypatch.setattr(upsampler_commands.MobileNet, "load", lambda folder: Judge())
    return drawn


@pytest.mark.parametrize("scale", [2, 4])
def test_the_commands_train_go_on_and_measure(scale, small, tmp_path, capsys):
    given = ["--scale", str(scale), "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    train = ["upsampler", *given, "--batch-size", "2"]
    assert main([*train, "--steps", "2"]) == 0
    written = [tmp_path / name.format(scale) for name in ("upsampler-{}x", "one-pass-{}x")]
    written = [path.with_suffix(".safetensors") for path in written]
    assert capsys.readouterr().out.split() == [str(path) for path in written]
    checkpoint = tmp_path / "work" / f"upsampler-{scale}x.pt"
    assert torch.load(checkpoint, weights_only=True)["step"] == 2
    assert main([*train, "--steps", "3"]) == 0
    assert torch.load(checkpoint, weights_only=True)["step"] == 3
    assert small == [(True, 256)], "drawn once"
    measure = ["evaluate-upsampler", *given, "--sampler-steps", "2", "--pictures"]
    capsys.readouterr()
    assert main([*measure, "5"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "work" / f"upsampler-{scale}x.json").read_text())
    assert (report["scale"], report["pictures"], report["steps"]) == (scale, 5, 2)
    assert all(report[name]["psnr"] > 5 for name in ("lanczos", "one_pass", "diffusion"))
    assert main([*measure, "9"]) == 2
    assert "--pictures is 9; 8 are held out" in capsys.readouterr().err


def test_the_measure_is_of_what_the_runtime_makes(tmp_path):
    """Against the figures of its own pieces, and what is the original is at no distance."""
    torch.manual_seed(0)
    up, once = tmp_path / "up.safetensors", tmp_path / "once.safetensors"
    unet = randomised(UpsamplerUNet(CONFIG))
    save_whole({f"upsampler.{n}": v for n, v in unet.state_dict().items()}, up)
    save_whole(OnePass(CompactConfig(num_feat=8, num_conv=1, upscale=2)).state_dict(), once)
    originals, sampling = shapes(8), Sampling(num_inference_steps=2)
    report = upsampler_quality.evaluate(up, once, originals, Judge(), sampling=sampling)
    low = [upsampler.made_low(each, 2) for each in originals]
    upscaler = Upscaler.load(up, sampling=sampling)
    drawn = np.stack([np.asarray(upscaler(Image.fromarray(each))) for each in low])
    lanczos = np.stack([upsampler.enlarge(each, 2) for each in low])
    features = [upsampler_quality.features(Judge(), each) for each in (drawn, lanczos, originals)]
    for name, pictures, seen in (
        ("diffusion", drawn, features[0]),
        ("lanczos", lanczos, features[1]),
    ):
        assert report[name]["psnr"] == upsampler.psnr(originals, pictures)
        assert report[name]["frechet"] == pytest.approx(frechet_distance(seen, features[2]))
    assert report["lanczos"]["psnr"] > report["diffusion"]["psnr"], "its weights are random"
    assert report["lanczos"]["feature_distance"] < report["diffusion"]["feature_distance"]
    multiplications = 2 * CONFIG.products() * (SIDE // 2) ** 2
    assert report["diffusion"]["multiplications"] == multiplications
    exact = upsampler_quality.features(Judge(), originals)
    assert frechet_distance(exact, features[2]) == pytest.approx(0, abs=1e-6)


def test_files_of_two_scales_are_refused(tmp_path):
    up, once = tmp_path / "up.safetensors", tmp_path / "once.safetensors"
    unet = UpsamplerUNet(CONFIG)
    save_whole({f"upsampler.{n}": v for n, v in unet.state_dict().items()}, up)
    save_whole(OnePass(CompactConfig(num_feat=8, num_conv=1, upscale=4)).state_dict(), once)
    with pytest.raises(upsampler_quality.RequestError, match=r"enlarges 4 times and .* 2 times"):
        upsampler_quality.evaluate(up, once, shapes(1), Judge(), sampling=Sampling())
