"""The GAN beside the model in pixels: its size, who learns from which loss, its file."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine.errors import RequestError
from tests.support.digits import write_digits
from training import ddpm, gan
from training.__main__ import main
from training.diffusion import Denoiser
from training.gan import Generator, Opponents
from training.idx import LabelledPictures
from training.loop import LoopSettings, spent

SIDE, CLASSES = 12, 3
SETTINGS = LoopSettings(steps=3, batch_size=4, learning_rate=1e-3, warmup_steps=1, betas=gan.BETAS)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("idx")
    write_digits(folder, per_class=20, side=SIDE, classes=CLASSES)
    return LabelledPictures.read(folder, "train", CLASSES)


def size(module):
    return sum(value.numel() for value in module.parameters())


def test_the_generator_is_as_large_as_the_model_beside_it(tmp_path):
    tokenizer = ddpm.class_tokenizer(tmp_path, list("0123456789"))
    denoiser = Denoiser(tokenizer.vocab_size, ddpm.UNET)
    assert size(Generator(28, 10)) == pytest.approx(size(denoiser), rel=0.03)


@pytest.mark.parametrize("side", [8, 12, 28, 64])
def test_pictures_are_of_the_side_and_of_their_class(side):
    torch.manual_seed(0)
    generator = Generator(side, CLASSES).eval()
    drawn = gan.draw(generator, np.array([0, 1, 0, 0]), seed=1)
    assert drawn.shape == (4, side, side)
    assert drawn.dtype == np.uint8
    assert (drawn[0] != drawn[2]).any(), "noise tells them apart"
    np.testing.assert_array_equal(drawn, gan.draw(generator, np.array([0, 1, 0, 0]), seed=1))
    others = gan.draw(generator, np.array([2, 1, 0, 0]), seed=1)
    assert (drawn[0] != others[0]).any(), "the class tells them apart"
    np.testing.assert_array_equal(drawn[1:], others[1:])


def test_each_learns_from_its_own_loss_alone(pictures):
    torch.manual_seed(0)
    module = Opponents(SIDE, CLASSES).eval()  # which keeps the estimates of the spectral norms
    images = ddpm.as_latents(pictures.images[:4])
    labels = torch.from_numpy(pictures.labels[:4])
    noise, asked = torch.randn(4, gan.NOISE), torch.tensor([2, 0, 1, 1])
    losses = module.losses(noise, asked, images, labels)
    losses["loss"].backward()
    drawn = module.generator(noise, asked)
    real, fake = module.discriminator(images, labels), module.discriminator(drawn, asked)
    told = 0.5 * ((1 - real).relu() + (1 + fake).relu()).mean()
    for part, loss in ((module.discriminator, told), (module.generator, -fake.mean())):
        parameters = list(part.parameters())
        expected = torch.autograd.grad(loss, parameters, retain_graph=True)
        for parameter, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        assert sum(float(gradient.abs().sum()) for gradient in expected) > 0
    torch.testing.assert_close(losses["loss"], told - fake.mean())


def test_the_discriminator_sees_the_class_and_keeps_its_norms():
    torch.manual_seed(0)
    discriminator = gan.Discriminator(CLASSES)
    images = torch.randn(2, 1, SIDE, SIDE)
    for _ in range(50):  # of the power iteration
        first = discriminator(images, torch.tensor([0, 1]))
    second = discriminator.eval()(images, torch.tensor([0, 2]))
    assert first.shape == (2,)
    assert first[1] != second[1]
    for layer in (*discriminator.layers, discriminator.head, discriminator.classes):
        if hasattr(layer, "weight"):
            assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) < 1.1


def test_it_learns_what_pictures_look_like(pictures, tmp_path):
    """At first what is drawn is gray; after some steps it is as dark as the digits' pictures."""
    labels, wanted = np.arange(30) % CLASSES, pictures.images.mean()
    first = gan.draw(Generator(SIDE, CLASSES).eval(), labels, 0).mean()
    settings = dataclasses.replace(SETTINGS, steps=40, batch_size=8, ema_decay=0.9)
    drawn = gan.draw(gan.train(pictures, CLASSES, settings, tmp_path), labels, 0)
    assert abs(drawn.mean() - wanted) < 0.5 * abs(first - wanted)
    assert drawn.std() > 5, "and not all black"


def test_a_stopped_training_goes_on_and_draws_other_noise(pictures, tmp_path):
    gan.train(pictures, CLASSES, SETTINGS, tmp_path)
    assert spent(tmp_path / "gan.pt")[0] == 3
    before = torch.load(tmp_path / "gan.pt", weights_only=True)["module"]
    longer = dataclasses.replace(SETTINGS, steps=5)
    gan.train(pictures, CLASSES, longer, tmp_path)
    assert spent(tmp_path / "gan.pt")[0] == 5
    after = torch.load(tmp_path / "gan.pt", weights_only=True)["module"]
    assert any((before[name] != after[name]).any() for name in before)


def test_a_file_draws_what_was_written(tmp_path):
    torch.manual_seed(0)
    generator, path = Generator(SIDE, CLASSES).eval(), tmp_path / "new" / "gan.safetensors"
    gan.write(generator, path)
    labels = np.array([0, 2])
    expected = gan.draw(generator, labels, 5)
    np.testing.assert_array_equal(gan.draw(gan.read(path, CLASSES), labels, 5), expected)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_files_that_are_none_are_refused_in_a_sentence(tmp_path):
    path = tmp_path / "gan.safetensors"
    gan.write(Generator(SIDE, CLASSES), path)
    with pytest.raises(RequestError, match="where 4 are named"):
        gan.read(path, 4)
    with pytest.raises(RequestError, match="is no generator"):
        gan.read(tmp_path / "missing", CLASSES)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    for change, message in (
        ({"gan": "{"}, "is no generator"),
        ({"gan": "[]"}, "is no generator"),
        ({"gan": json.dumps({"side": 10**6, "classes": CLASSES})}, "1000000 pixels"),
        ({"gan": json.dumps({"side": [SIDE], "classes": CLASSES})}, "pixels"),
        ({"gan": json.dumps({"side": float(SIDE), "classes": CLASSES})}, "12.0 pixels"),
        ({"gan": "[" * 10**5}, "is no generator"),
        ({}, "is no generator"),
        ({"gan": json.dumps({"side": 16, "classes": CLASSES})}, "of another form"),
    ):
        save_file(state, path, metadata=change)
        with pytest.raises(RequestError, match=message):
            gan.read(path, CLASSES)
    save_file({n: v for n, v in state.items() if n != "first.bias"}, path, metadata=metadata)
    with pytest.raises(RequestError, match="of another form"):
        gan.read(path, CLASSES)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(RequestError, match="is no generator"):
        gan.read(path, CLASSES)


def test_the_commands_train_and_judge_it(tmp_path, capsys):
    write_digits(tmp_path, per_class=3, side=8)
    asked = ["--idx", str(tmp_path), "--work", str(tmp_path / "work")]
    out, picture = str(tmp_path / "gan.safetensors"), tmp_path / "grid.png"
    few = ["--steps", "2", "--batch-size", "2"]
    assert main(["gan", *asked, "--out", out, *few]) == 0
    capsys.readouterr()
    assert main(["judge", *asked, *few, "--gan", out, "--picture", str(picture)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pictures"] == 30
    assert report["drawing"] == {"seed": 0}
    assert set(report["diversity_of_real"]) == {"features", "pixels"}
    with Image.open(picture) as shown:
        assert shown.size == (16 * 8, 10 * 8)
    gan.write(Generator(12, 10), other := tmp_path / "other.safetensors")
    assert main(["judge", *asked, *few, "--gan", str(other)]) == 2
    assert "pictures of 12 pixels" in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
    assert main(["judge", *asked, *few, "--gan", out, "--classes", "a,b"]) == 2
    assert "beyond the 2 classes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["judge", *asked])
