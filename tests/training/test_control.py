"""A control on edges: what it begins as, what it learns, its file, and how it is measured."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.checkpoints.control_lora import MARK
from engine.checkpoints.formats.files import open_weights
from engine.model import Model, find_model
from runtime.conditioning.tokenizer import Tokenizer
from runtime.preprocessors.named import Canny
from training import control, ship
from training.autoencoder import CONFIG, Autoencoder
from training.diffusion import Denoiser
from training.loop import LoopSettings

SIDE = 128
SETTINGS = LoopSettings(steps=6, batch_size=2, learning_rate=2e-3, warmup_steps=1, sample_steps=6)


class Shapes:
    """Three pictures with a caption each."""

    draws = None

    def __init__(self):
        y, x = np.mgrid[:SIDE, :SIDE]
        inside = [(x - 64) ** 2 + (y - 64) ** 2 < 900, abs(x - 64) + abs(y - 64) < 50, x > y]
        self.images = np.stack(
            [np.where(each[..., None], [200, 30, 30], 255) for each in inside]
        ).astype(np.uint8)

    def caption(self, index, rng):
        return ("a red disc", "a red kite", "a red half")[index]

    def captions(self, index, rng):
        return [self.caption(index, rng)]


@pytest.fixture(scope="module")
def parts():
    folder = find_model("pictogram")
    denoiser_state, autoencoder_state = ship.read_model(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    denoiser = Denoiser(tokenizer.vocab_size).eval()
    denoiser.load_state_dict(denoiser_state)
    autoencoder = Autoencoder(CONFIG).eval()
    autoencoder.load_state_dict(autoencoder_state)
    return denoiser, autoencoder, tokenizer


@pytest.fixture(scope="module")
def trained(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    made = control.train(Shapes(), *parts, SETTINGS, folder)
    control.write(made, folder / "edges.safetensors")
    return made, folder


def inputs(side=SIDE):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 8, side // 8, side // 8, generator=generator)
    picture = (torch.rand(2, 1, side, side, generator=generator) > 0.9).expand(-1, 3, -1, -1)
    context = torch.randn(2, 32, 192, generator=generator)
    return latents, torch.tensor([500.0, 20.0]), context, picture.float()


@torch.no_grad()
def test_it_begins_as_the_model_itself(parts):
    denoiser, *_ = parts
    latents, timesteps, context, picture = inputs()
    made = control.ControlledDenoiser(denoiser)
    out = made(latents, timesteps, context, picture)
    assert torch.equal(out, denoiser.unet(latents, timesteps, context))
    learnt = {name for name, value in made.named_parameters() if value.requires_grad}
    assert learnt
    assert all(name.startswith("net.") for name in learnt), "the model stays as it is"


def test_a_few_steps_teach_it_something_and_leave_the_model(trained, parts):
    made, folder = trained
    kept = ship.read_model(find_model("pictogram"))[0]
    for name, value in made.denoiser.state_dict().items():
        assert torch.equal(value, kept[name]), name
    latents, timesteps, context, picture = inputs()
    with torch.no_grad():
        steered = made(latents, timesteps, context, picture)
        assert not torch.equal(steered, made(latents, timesteps, context, 1 - picture))
    assert (folder / "control-000006.png").exists()
    again = control.train(Shapes(), *parts, SETTINGS, folder)
    for name, value in again.state_dict().items():
        assert torch.equal(value, made.state_dict()[name]), f"{name}: it is at its end"


def test_its_file_is_a_control_lora_of_the_model(trained):
    made, folder = trained
    path = folder / "edges.safetensors"
    assert path.stat().st_size <= 4_000_000
    model = Model.open(find_model("pictogram"))
    config, net = control.open_control_net(path, model.unet, model.weights("step"))
    assert config == made.net.config
    assert net.used() == set(open_weights(path)) - {MARK}
    merged = made.net.state_dict()
    for name, value in net.items():
        module, _, kind = name.rpartition(".")
        wanted, layer = merged[name], made.net.get_submodule(module)
        if kind == "weight" and hasattr(layer, "lora"):
            up, down = (end.weight.flatten(1) for end in (layer.lora.up, layer.lora.down))
            wanted = wanted + layer.lora.scale * (up @ down).reshape(wanted.shape)
        np.testing.assert_allclose(value, wanted.detach(), rtol=2e-2, atol=2e-3, err_msg=name)


@pytest.mark.slow
def test_what_is_drawn_along_edges_is_measured(trained, tmp_path, monkeypatch):
    """Three held-out pictures; the graphs are made once, and a picture's score is its own."""
    _, folder = trained
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path))
    monkeypatch.setattr(control, "STEPS", 2)
    data = SimpleNamespace(
        names=["red disc", "red kite", "red half"],
        held_out=np.eye(3, len(control.STYLES), dtype=bool),
        images=np.repeat(Shapes().images[:, None], len(control.STYLES), axis=1),
    )
    path = folder / "edges.safetensors"
    report = control.evaluate("pictogram", path, data, pictures=3)
    assert report["pictures"] == len(report["scores"]["with"]) == 3
    assert report["f1"] == pytest.approx(np.mean(report["scores"]["with"]))
    assert report["gain"] == pytest.approx(report["f1"] - report["f1_without"])
    assert report["scores"]["with"] != report["scores"]["without"], "the net moves the pictures"
    monkeypatch.setattr(control, "export_part", None)
    monkeypatch.setattr(control, "export_control_net", None)
    assert control.evaluate("pictogram", path, data, pictures=3) == report


def test_moved_and_bent_pictures_are_encoded_and_kept(parts, tmp_path):
    _, autoencoder, _ = parts
    images, path = Shapes().images, tmp_path / "edges.npz"
    pictures = control.EdgedPictures.of(images, autoencoder, path)
    assert pictures.latents.shape == (12, 8, SIDE // 8, SIDE // 8)
    seen = control.hints(torch.from_numpy(pictures.edges), SIDE)
    assert seen.shape == (12, 3, SIDE, SIDE)
    with torch.no_grad():
        latents = torch.from_numpy(pictures.latents).float()
        decoded = autoencoder.decode(latents / autoencoder.config.scaling_factor)
    for picture, hint in zip(decoded.clamp(-1, 1).add(1).mul(127.5).byte(), seen, strict=True):
        found = Canny()(picture.permute(1, 2, 0).numpy())[..., 0] > 0
        assert control.f1(found, hint[0].numpy() > 0) > 0.8, "edges are of what was encoded"
    np.savez(path, latents=pictures.latents, edges=pictures.edges[::-1])
    kept = control.EdgedPictures.of(images, autoencoder, path)
    assert np.array_equal(kept.edges, pictures.edges[::-1]), "what is kept is taken"
    others = control.EdgedPictures.of(images[1:], autoencoder, path)
    assert len(others.latents) == 8, "other pictures are encoded anew"


@pytest.mark.parametrize(
    ("change", "least", "most"),
    [(control.moved, 0.3 * 0.85, 1.21 * 1.1), (control.bent, 0.7 * 0.7, 1.21 * 1.4)],
)
def test_a_changed_picture_is_whole_on_white_and_another_each_time(change, least, most):
    image = np.full((SIDE, SIDE, 3), 255, np.uint8)
    image[40:80, 50:70] = (200, 30, 30)
    rng = np.random.default_rng(0)
    copies = np.stack([change(image, rng) for _ in range(40)])
    assert copies.shape == (40, SIDE, SIDE, 3)
    assert copies.dtype == np.uint8
    assert len(np.unique(copies, axis=0)) == 40
    red = (copies[..., 1] < 128).sum((1, 2))
    assert least < red.min() / 800 < red.max() / 800 < most
    assert (copies[:, 0, 0] == 255).all(), "beside the picture there is white"


def test_a_bent_picture_lies_where_it_lay():
    y, x = np.mgrid[:SIDE, :SIDE]
    image = np.where(((x - 64) ** 2 + (y - 64) ** 2 < 900)[..., None], 0, 255).astype(np.uint8)
    image = np.repeat(image, 3, axis=2)
    rng = np.random.default_rng(0)
    centres = [np.argwhere(control.bent(image, rng)[..., 0] < 128).mean(axis=0) for _ in range(20)]
    assert np.abs(np.array(centres) - 64).max() < 8


def test_f1_of_edges_at_one_pixel():
    lines = np.zeros((9, 9), bool)
    lines[4, 1:8] = True
    assert control.f1(lines, lines) == 1.0
    assert control.f1(np.roll(lines, 1, axis=0), lines) == 1.0
    assert control.f1(np.roll(lines, 2, axis=0), lines) == 0.0
    half = lines.copy()
    half[4, 4:] = False  # 3 of 7, and a fourth is a pixel away
    assert control.f1(half, lines) == pytest.approx(2 * 1 * (4 / 7) / (1 + 4 / 7))
    assert control.f1(np.zeros_like(lines), lines) == 0.0
    assert control.f1(np.zeros_like(lines), np.zeros_like(lines)) == 1.0
