"""A LoRA that draws in few calls: its teacher's runs, what is learnt of them, and its file."""

import copy

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from engine.backends.settings import BackendSettings
from engine.errors import RequestError
from engine.model import find_model
from runtime import Pipeline, Request
from runtime.conditioning.tokenizer import Tokenizer
from training import autoencoder, distillation, ship
from training.autoencoder import Autoencoder
from training.diffusion import Denoiser
from training.loop import LoopSettings
from training.lora import add_lora, factors

SIZE = (8, 8, 8)  # latents of 64 by 64 pixels
PROMPTS = ("a red apple", "a cat face", "a rocket")


class Captions:
    """Three pictures that nobody looks at."""

    images, draws = np.zeros((3, 64, 64, 3), np.uint8), None

    def caption(self, index, rng):
        return PROMPTS[index]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(find_model("pictogram") / "tokenizer")


@pytest.fixture(scope="module")
def teacher(tokenizer):
    denoiser = Denoiser(tokenizer.vocab_size).eval()
    denoiser.load_state_dict(ship.read_model(find_model("pictogram"))[0])
    return denoiser


def draw(denoiser, tokenizer, folder, count=4, size=SIZE):
    return distillation.trajectories(
        Captions(), denoiser, tokenizer, folder, count=count, size=size, device="cpu"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def taught(teacher, tokenizer, folder):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(distillation, "BATCH", 2)
        return draw(teacher, tokenizer, folder / "trajectories")


@pytest.fixture(scope="module")
def student(teacher, taught, folder):
    settings = LoopSettings(
        steps=60, batch_size=4, learning_rate=1e-2, warmup_steps=5, sample_steps=40, ema_decay=0.9
    )
    trained = Autoencoder(autoencoder.CONFIG).eval()
    trained.load_state_dict(ship.read_model(find_model("pictogram"))[1])
    return distillation.train(taught, copy.deepcopy(teacher), trained, settings, folder, rank=4)


def relative_error(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_the_teacher_draws_as_the_runtime(teacher, tokenizer):
    pipeline = Pipeline.load("pictogram", settings=BackendSettings(threads=1))
    request = Request(
        prompt=list(PROMPTS), seed=3, width=64, height=64, sampler="ddim",
        num_inference_steps=distillation.TEACHER_STEPS, guidance_scale=5.0,
    )  # fmt: skip
    plan = pipeline.plan(request)
    (run,) = plan.runs()
    state = pipeline.start(run, None)
    expected = [state.registers[:, 0]]
    for inputs in run.steps():
        state = pipeline.step(state, inputs)
        expected.append(np.asarray(state.registers)[:, 0])
    ids = torch.from_numpy(tokenizer(["", *PROMPTS]).input_ids)
    states = distillation.teach(teacher, ids, torch.from_numpy(expected[0].copy())).numpy()
    assert states.shape == (3, distillation.STEPS + 1, *SIZE)
    for call in range(distillation.STEPS + 1):
        error = relative_error(states[:, call], expected[5 * call])
        assert error < 0.05, "bfloat16 beside float32"


def test_the_students_calls_begin_where_the_teachers_do():
    many, few = (distillation._program(n) for n in (20, 4))
    assert many.timesteps[::5].tolist() == few.timesteps.tolist()
    assert many.noise_scales[::5].tolist() == few.noise_scales.tolist()


def test_what_was_drawn_is_not_drawn_again(taught, tokenizer, folder, monkeypatch):
    monkeypatch.setattr(distillation, "BATCH", 2)
    again = draw(None, tokenizer, folder / "trajectories")
    assert torch.equal(again.states, taught.states)
    assert again.states.shape == (4, distillation.STEPS + 1, *SIZE)
    assert again.input_ids.shape == (4, 32)
    assert not torch.equal(again.states[0], again.states[2]), "every piece has noise of its own"
    with pytest.raises(RequestError, match="another working folder"):
        draw(None, tokenizer, folder / "trajectories", size=(4, 8, 8))


def test_factors_change_nothing_at_first(teacher):
    module = copy.deepcopy(teacher.unet)
    x, ids = torch.randn(1, *SIZE), torch.randn(1, 32, 192)
    with torch.no_grad():
        before = module(x, torch.tensor([500.0]), ids)
        add_lora(module, 4)
        after = module(x, torch.tensor([500.0]), ids)
    assert torch.equal(before, after)
    learnt = {name for name, value in module.named_parameters() if value.requires_grad}
    assert learnt
    assert all(name.endswith((".lora.up.weight", ".lora.down.weight")) for name in learnt)


def test_the_student_comes_near_in_few_calls(teacher, student, taught, folder):
    noise, end = taught.states[:, 0].float(), taught.states[:, -1].float().numpy()
    before, after = (
        relative_error(distillation.run(each, taught.input_ids, noise).numpy(), end)
        for each in (teacher, student)
    )
    assert after < 0.6 * before
    assert (folder / "distillation-000040.png").exists()


def test_pipelines_and_diffusers_read_the_file(teacher, student, taught, tmp_path):
    path = tmp_path / "few-steps.safetensors"
    distillation.write(student, path)
    assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    assert len(load_file(path)) == 2 * len(list(factors(student.unet)))
    x, ids = taught.states[:2, 1].float(), taught.input_ids[:2]
    with torch.no_grad():
        expected = student(x, torch.full((2,), 749.0), ids)
        context, _, _ = student.text_encoder(ids)
        unet = UNet2DConditionModel.from_pretrained(find_model("pictogram") / "unet")
        unet.load_lora_adapter(load_file(path), prefix="unet")
        theirs = unet(x, 749, context, added_cond_kwargs={}).sample
    assert relative_error(theirs.numpy(), expected.numpy()) < 2e-3

    options = {"width": 64, "height": 64, "sampler": "ddim", "guidance_scale": 1.0}
    pipeline = Pipeline.load("pictogram", loras=[path])
    plan = pipeline.plan(Request(prompt=PROMPTS[0], num_inference_steps=4, **options))
    (run,) = plan.runs()
    state = pipeline.start(run, None)
    noise = torch.from_numpy(state.registers[:, 0].copy())
    for inputs in run.steps():
        state = pipeline.step(state, inputs)
    ids = torch.from_numpy(tokenizer_of(PROMPTS[0]))
    ours = np.asarray(state.registers)[:, 0]
    assert relative_error(ours, distillation.run(student, ids, noise).numpy()) < 5e-3


def tokenizer_of(text):
    return Tokenizer.load(find_model("pictogram") / "tokenizer")([text]).input_ids
