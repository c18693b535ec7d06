"""Rows: pictures of every sampler and mode in shared calls, each bit for bit as it is alone."""

import tempfile
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.backends.settings import BackendSettings
from engine.errors import BackendError
from engine.graphs.graph import SIGNATURES
from runtime import Hires, Pipeline, Request
from runtime.denoising.rows import BY_GROUPS, BY_REGISTERS, rows_of, step_rows
from runtime.images.files import psnr
from runtime.samplers import SAMPLERS
from tests.support.named_requests import LORA, PAINTED, REQUESTS, write_lora

STEPS, TOGETHER, SIDE = 4, 8, 64
SMALL = {name: whole.resize((SIDE, SIDE), Image.NEAREST) for name, whole in PAINTED.items()}
# Stepped over here: 1088 pixels decode in 25 tiles, which no row has to do with.
MIXED = {
    name: chosen | {field: SMALL[field] for field in chosen.keys() & SMALL}
    for name, chosen in REQUESTS.items()
    if name not in ("tiles", LORA)
}


def load(threads):
    settings = BackendSettings(backend="cpu", threads=threads)
    return Pipeline.load(settings=settings, precision="float32")


@pytest.fixture(scope="module")
def pipeline():
    return load(threads=1)


@pytest.fixture(scope="module")
def two_threads():
    return load(threads=2)


class Watched:
    """An engine that writes down how many pictures each call had."""

    def __init__(self, engine, sizes):
        self.engine, self.sizes = engine, sizes

    def run(self, inputs):
        self.sizes.append(len(inputs["registers"]))
        return self.engine.run(inputs)


def fields(**chosen):
    """Return a small request; a picture that it begins from has a size of its own."""
    size = {} if "image" in chosen else {"height": SIDE, "width": SIDE}
    return {"prompt": "a red apple", "seed": 3, "num_inference_steps": STEPS, **size, **chosen}


def request(**chosen):
    return Request(**fields(**chosen))


def finished(pipeline, row):
    (image,) = pipeline.finish(row.plan, pipeline.decode(row.latents))
    return image


def draw_together(pipeline, requests, apart=2):
    """Draw requests as rows, one more arriving every so many turns; the oldest's bucket is next.

    Returns the images of each request and the number of pictures in each call.
    """
    sizes, waiting, drawn = [], list(requests.items()), {}

    def engine(part, variant=None):
        return Watched(pipeline.engine(part, variant), sizes)

    board = []
    for turn in count():
        if waiting and turn % apart == 0:
            name, asked = waiting.pop(0)
            for row in rows_of(pipeline.plan(asked)):
                row.enter(pipeline.start)
                board.append((name, row))
        if not board and not waiting:
            return drawn, sizes
        if board:
            oldest = board[0][1]
            fitting = [row for _, row in board if row.bucket == oldest.bucket]
            step_rows([oldest] if oldest.is_sensitive else fitting[:TOGETHER], engine)
        for name, row in list(board):
            if row.is_done:
                board.remove((name, row))
                drawn.setdefault(name, []).append(finished(pipeline, row))
            elif row.run_is_over:
                row.enter(pipeline.start)


def assert_equal(images, expected, name):
    assert len(images) == len(expected), name
    for image, wanted in zip(images, expected, strict=True):
        assert image.size == wanted.size, name
        assert np.asarray(image).tobytes() == np.asarray(wanted).tobytes(), name


def test_every_mode_is_what_it_is_alone(pipeline):
    """21 samplers and all modes, arriving one after the other, up to eight in a call."""
    requests = {name: request(**chosen) for name, chosen in MIXED.items()}
    drawn, sizes = draw_together(pipeline, requests, apart=1)
    for name, chosen in MIXED.items():
        assert_equal(drawn[name], pipeline(**fields(**chosen)).images, name)
    assert sum(sizes) > 2 * len(sizes), "many calls were shared"
    assert max(sizes) > 5


def test_every_sampler_beside_every_other(pipeline):
    """Other samplers, steps, scales and rescales, one arriving each turn."""
    chosen = {
        sampler: {
            "sampler": sampler,
            "num_inference_steps": 4 + index % 5,
            "guidance_scale": 2.0 + index % 4,
            "guidance_rescale": 0.35 * (index % 3),
            "seed": index,
        }
        for index, sampler in enumerate(SAMPLERS)
    }
    drawn, sizes = draw_together(
        pipeline, {name: request(**each) for name, each in chosen.items()}, apart=1
    )
    for name, each in chosen.items():
        assert_equal(drawn[name], pipeline(**fields(**each)).images, name)
    assert np.mean(sizes) > 4
    assert sum(sizes) == sum(pipeline.plan(request(**each)).calls for each in chosen.values())


def test_masks_and_images_beside_noise(two_threads):
    """Registers that hold an image, padded ones, and rows that change bucket in between."""
    chosen = {
        "painted": {**SMALL, "sampler": "lms"},
        "noise": {"sampler": "euler_a"},
        "image": {"image": SMALL["image"], "strength": 0.8, "sampler": "dpmpp_3m_sde"},
        "half guided": {"sampler": "plms", "guidance_interval": (0.0, 0.5)},
        "not guided": {"guidance_scale": 1.0, "sampler": "ipndm"},
        "shallow": {"cache_interval": 2, "sampler": "ddim"},
        "enlarged": {"hires": Hires(scale=1.25), "sampler": "unipc"},
    }
    drawn, sizes = draw_together(
        two_threads, {name: request(**each) for name, each in chosen.items()}, apart=1
    )
    for name, each in chosen.items():
        assert_equal(drawn[name], two_threads(**fields(**each)).images, name)
    assert max(sizes) > 2


def test_an_adapter_changes_all_rows_alike(pipeline):
    with tempfile.TemporaryDirectory() as folder:
        pipeline.set_loras([write_lora(Path(folder))])
        try:
            chosen = {sampler: {"sampler": sampler} for sampler in ("euler", "heun", "ddpm")}
            drawn, _ = draw_together(
                pipeline, {name: request(**each) for name, each in chosen.items()}, apart=1
            )
            for name, each in chosen.items():
                assert_equal(drawn[name], pipeline(**fields(**each)).images, name)
        finally:
            pipeline.set_loras([])


def test_a_call_that_failed_is_made_again_with_the_same_noise(pipeline):
    """Two rows fail together, then each goes on alone: nothing is drawn twice."""

    class Failing:
        def run(self, inputs):
            raise BackendError("out of memory")

    asked = request(sampler="ddpm", num_images_per_prompt=2)
    rows = rows_of(pipeline.plan(asked))
    for row in rows:
        row.enter(pipeline.start)
    while not rows[0].is_done:
        with pytest.raises(BackendError):
            step_rows(rows, lambda part, variant: Failing())
        for row in rows:
            step_rows([row], pipeline.engine)
    expected = pipeline(**fields(sampler="ddpm"))
    assert_equal([finished(pipeline, rows[0])], expected.images, "the first")


def test_a_preview_is_of_the_step_it_was_taken_at(pipeline):
    """What a step predicted can be read when the row is steps further."""
    asked = request(sampler="dpmpp_2m")
    expected = [p.denoised() for p in pipeline.denoise(pipeline.plan(asked))]
    first, second = (rows_of(pipeline.plan(asked))[0] for _ in range(2))
    for row in (first, second):
        row.enter(pipeline.start)
    seen = []
    while not first.is_done:
        step_rows([first, second], pipeline.engine)
        seen.append(first.denoised(pipeline.schedule))
    for later, wanted in zip(seen, expected, strict=True):
        np.testing.assert_array_equal(later(), wanted)
    assert (first.calls, first.total) == (STEPS, STEPS)


def test_prompts_of_a_list_may_have_other_lengths(pipeline):
    """A row keeps the tokens that its request had: those of the longest prompt."""
    given = fields(prompt=["a cat", "a dog, " * 30], seed=[1, 2])
    asked = Request(**given)
    drawn, _ = draw_together(pipeline, {"list": asked, "alone": request()})
    expected = pipeline(**given).images
    assert_equal(drawn["list"], expected, "list")
    rows = rows_of(pipeline.plan(asked))
    for row in rows:
        row.enter(pipeline.start)
    assert len({row.bucket for row in rows}) == 1
    assert [row.plan.settings[0]["seed"] for row in rows] == [1, 2]


def test_only_rows_of_one_group_feel_their_neighbours(pipeline):
    """Guided rows are equal beside any number of others; others differ, and say so."""
    for scale in (5.0, 1.0):
        asked = request(num_images_per_prompt=3, guidance_scale=scale)
        rows, alone = rows_of(pipeline.plan(asked)), rows_of(pipeline.plan(asked))
        for row in (*rows, *alone):
            row.enter(pipeline.start)
        step_rows(rows, pipeline.engine)
        for row in alone:
            assert row.is_sensitive == (scale == 1.0)
            step_rows([row], pipeline.engine)
        equal = [np.array_equal(a.latents, b.latents) for a, b in zip(rows, alone, strict=True)]
        assert all(equal) == (scale > 1), equal


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_neighbours_are_seen_a_little_on_openvino(precision):
    """Its kernels depend on the size of the batch; how little is said in docs/serving.md."""
    pytest.importorskip("openvino")
    settings = BackendSettings(backend="openvino", threads=2)
    with Pipeline.load("pictogram", settings=settings, precision=precision) as other:
        size = {"height": 128, "width": 128}  # the model's own, of which that is measured
        samplers = ("ddim", "euler_a", "dpmpp_2m", "unipc")
        chosen = {name: {"sampler": name, **size} for name in samplers}
        drawn, sizes = draw_together(
            other, {name: request(**each) for name, each in chosen.items()}, apart=1
        )
        assert max(sizes) > 1
        for name, each in chosen.items():
            (wanted,) = other(**fields(**each)).images
            least = {"float32": 60, "bfloat16": 30}[precision]
            assert psnr(np.asarray(drawn[name][0]), np.asarray(wanted)) > least, name


def test_axes_are_those_of_the_signatures():
    for part in ("step", "step_shallow"):
        signature = SIGNATURES[part]
        for name, tensor in {**signature.inputs, **signature.outputs}.items():
            assert tensor.shape.index("B") == int(name in BY_GROUPS), name
            has_registers = any(str(symbol).startswith("r") for symbol in tensor.shape)
            assert has_registers == (name in {*BY_REGISTERS, "next_registers"}), name


def test_an_image_is_read_once_for_each_row(pipeline):
    """What is outside the mask is the image's own, whoever is beside it."""
    chosen = {"a": {**SMALL, "mask_blur": 0.0}, "b": {"sampler": "lcm"}}
    drawn, _ = draw_together(
        pipeline, {name: request(**each) for name, each in chosen.items()}, apart=1
    )
    kept = np.asarray(SMALL["mask"]) == 0
    assert (np.asarray(drawn["a"][0])[kept] == np.asarray(SMALL["image"])[kept]).all()
    assert isinstance(drawn["b"][0], Image.Image)
