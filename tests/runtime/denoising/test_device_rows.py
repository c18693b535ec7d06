"""Rows on a device: the processor's pictures bit for bit, and what is recorded, counted."""

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from engine.backends.settings import BackendSettings
from engine.errors import BackendError
from runtime import Hires, Pipeline, Request
from runtime.denoising.device_rows import SLOTS
from runtime.denoising.rows import rows_of
from tests.support.fake_cuda import FakeDevice, FakeEngine, moved
from tests.support.pictures import drawing

PARTS = ("text_encoder", "step", "step_shallow", "vae_decoder", "vae_encoder")
MASK = Image.fromarray(np.pad(np.full((64, 32), 255, np.uint8), ((0, 0), (32, 0))))
SMALL = {"height": 64, "width": 64}
UNLIKE = [
    {"sampler": "euler_a", "num_inference_steps": 4},
    {"sampler": "lms", "num_inference_steps": 6, "guidance_scale": 7.0},
    {"sampler": "ddim", "num_inference_steps": 5, "image": drawing(64, 64), "mask": MASK},
    {"sampler": "dpmpp_2m", "num_inference_steps": 3, "cache_interval": 2},
    {"sampler": "unipc", "num_inference_steps": 4, "height": 96, "width": 64},
    {"num_inference_steps": 3, "hires": Hires(scale=1.5, num_inference_steps=4)},
    {"sampler": "euler", "num_inference_steps": 4, "apg": (0.0, 15.0, -0.5), "pag_scale": 2.0},
    {
        "sampler": "dpmpp_2m_cfg_pp",
        "num_inference_steps": 4,
        "image": drawing(64, 64),
        "mask": MASK,
    },
    {"num_inference_steps": 4, "deep_shrink": 0.5},
]
EVERY_NAME = {"registers", "matrices", "outside", "timestep", "input_scale", "context", "guidance"}


@pytest.fixture(scope="module")
def host():
    return Pipeline.load(settings=BackendSettings(threads=1))


@pytest.fixture
def device():
    return FakeDevice()


@pytest.fixture
def pipeline(host, device):
    found = moved(Pipeline.load(settings=BackendSettings(threads=1)), device)
    for part in PARTS:
        found.engines.opened[part] = FakeEngine(host.engine(part), device)
    return found


def begun(pipeline, *, seed=1, steps=4, **fields):
    request = Request(prompt="a hat", seed=seed, num_inference_steps=steps, **{**SMALL, **fields})
    (row,) = rows_of(pipeline.plan(request))
    row.enter(pipeline.start)
    return row


def step(pipeline, *rows):
    pipeline.step_rows(list(rows))


def finished(pipeline, row):
    while not row.is_done:
        step(pipeline, row)
    return row.latents


def test_unlike_rows_are_those_of_the_processor(host, pipeline, device):
    """Other samplers, steps, masks, sizes, shallow calls and second runs, in shared calls."""
    requests = [
        Request(prompt="a hat", seed=n, **{**SMALL, **choice})
        for n, choice in enumerate(UNLIKE * 2)
    ]
    drawn = {each.request: each.image for each in pipeline.draw(requests, batch_size=4)}
    for number, choice in enumerate(UNLIKE * 2):
        (image,) = host("a hat", seed=number, **{**SMALL, **choice}).images
        np.testing.assert_array_equal(drawn[number], np.asarray(image), err_msg=f"{choice}")
    assert device.counts["record"] > 0
    assert device.counts["replay"] > 0


def test_two_buckets_in_turn_are_recorded_once_each(pipeline, device):
    """Numbers of rows change too: as many recordings as forms, and none after that."""
    buckets = [
        [begun(pipeline, seed=n, steps=60, height=height) for n in range(4)] for height in (64, 96)
    ]
    forms = [(rows, count) for rows in buckets for count in (1, 2, 4)]
    for _ in range(3):  # call by call, recorded, launched and proven
        for rows, count in forms:
            step(pipeline, *rows[:count])
    assert device.counts["record"] == len(forms)
    before = device.counts.copy()
    for _ in range(6):
        for rows, count in forms:
            step(pipeline, *rows[:count])
        for rows in buckets:
            step(pipeline, *rows[:3])  # in four slots
    calls = 6 * (len(forms) + len(buckets))
    assert device.counts["record"] == before["record"]
    assert device.counts["replay"] - before["replay"] == calls
    assert device.counts["run"] - before["run"] == calls


def test_samplers_of_other_registers_share_a_recording(pipeline, device):
    for sampler in ("ddim", "euler_a", "dpmpp_2m", "lms"):
        row = begun(pipeline, steps=5, sampler=sampler)
        for _ in range(4):
            step(pipeline, row)
    assert device.counts["record"] == 1


def test_what_a_row_keeps_is_uploaded_once(pipeline, device):
    rows = [begun(pipeline, seed=n, steps=9, sampler="ddim") for n in range(2)]
    step(pipeline, *rows)
    for _ in range(3):
        step(pipeline, *rows)
    before = device.counts["upload"]
    step(pipeline, *rows)
    # The tables of both rows at once; nothing of texts, guidance, noise or masks.
    assert device.counts["upload"] - before == 4
    step(pipeline, *reversed(rows))
    assert device.counts["upload"] - before > 8, "they have changed slots"
    assert {"context", "mask", "noise"} <= {name for name, _ in held(pipeline)}


def held(pipeline):
    (slots,) = pipeline._device_rows._slots.values()
    assert set(slots.inputs) >= EVERY_NAME
    return slots.held


def test_a_slot_has_nothing_left_of_the_row_before(host, pipeline):
    """Rows of many registers leave, and one of few takes the place."""
    many = [begun(pipeline, seed=n, steps=3, sampler="lms") for n in range(2)]
    while not many[0].is_done:
        step(pipeline, *many)
    few = [begun(pipeline, seed=n, steps=4, sampler="ddim") for n in (5, 6)]
    while not few[0].is_done:
        step(pipeline, *few)
    expected = finished(host, begun(host, seed=5, steps=4, sampler="ddim"))
    np.testing.assert_array_equal(few[0].latents, expected)


def test_a_preview_stays_what_it_is_while_the_row_goes_on(host, pipeline):
    rows = [begun(each, steps=5, sampler="dpmpp_2m") for each in (pipeline, host)]
    later = []
    for each, row in zip((pipeline, host), rows, strict=True):
        for _ in range(2):
            each.step_rows([row])
        later.append(row.denoised(each.schedule))
        finished(each, row)
    np.testing.assert_array_equal(later[0](), later[1]())


def test_a_call_that_fails_leaves_every_row_where_it_was(host, pipeline, monkeypatch):
    row = begun(pipeline, sampler="euler_a")
    step(pipeline, row)
    engine = pipeline.engine("step")

    def fail(inputs, outputs):
        raise BackendError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "enqueue", fail)
        with pytest.raises(BackendError, match="no memory"):
            step(pipeline, row)
    assert row.calls == 1
    expected = finished(host, begun(host, sampler="euler_a"))
    np.testing.assert_array_equal(finished(pipeline, row), expected)


def test_memory_is_free_when_rows_and_recordings_have_gone(pipeline, device):
    rows = [begun(pipeline, seed=n, steps=5) for n in range(2)]
    before = device.allocated
    for _ in range(4):
        step(pipeline, *rows)
    assert device.allocated > before
    del rows
    pipeline._device_rows.reset()
    device.wait()
    assert device.allocated == before


def test_slots_hold_any_number_of_rows():
    assert SLOTS[0] == 1
    assert all(above <= 2 * below for below, above in pairwise(SLOTS))
