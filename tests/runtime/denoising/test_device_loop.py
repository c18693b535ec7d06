"""The loop on a device: the same pictures as on a processor, and what it queues, counted."""

from threading import Thread

import numpy as np
import pytest
from PIL import Image

from engine.backends.settings import BackendSettings
from engine.devices.device import DeviceArray
from engine.errors import BackendError
from runtime import Hires, Pipeline, Request
from runtime.denoising import device_loop
from runtime.regions import Region
from tests.support.fake_cuda import FakeDevice, FakeEngine, moved
from tests.support.pictures import drawing

PARTS = ("text_encoder", "step", "step_shallow", "vae_decoder", "vae_encoder")
STEPS = 5
PROVEN = 3  # runs of a form, until a recording is believed
SIDE = 64  # the smallest that all parts take: the processor stands for the device
REQUEST = {
    **{"prompt": "a red apple", "seed": 3, "num_inference_steps": STEPS, "sampler": "euler_a"},
    **{"height": SIDE, "width": SIDE},
}
MASK = Image.fromarray(np.pad(np.full((64, 32), 255, np.uint8), ((0, 0), (32, 0))))
OPTIONS = {
    "plain": {},
    "several registers": {"sampler": "pndm"},
    "unguided": {"guidance_scale": 1.0},
    "guided for a while": {"guidance_interval": (0.0, 0.5), "guidance_scale": (7.0, 3.0)},
    "other words on the way": {"prompt": "a [red:blue:0.5] apple"},
    "a batch": {"prompt": ["a dog", "a cat"], "num_images_per_prompt": 2, "sampler": "dpmpp_2m"},
    "deep features kept": {"cache_interval": 2, "guidance_interval": (0.0, 0.7)},
    "from an image": {"image": drawing(64, 64), "strength": 0.7},
    "inpainting": {"image": drawing(64, 64), "mask": MASK},
    "regions": {"regions": [Region(mask=MASK, prompt="a green tree")]},
    "hires": {"hires": Hires(scale=1.5)},
    "edges that join": {"seamless": "x", "sampler": "ddim"},
    "perturbed attention": {"pag_scale": 3.0, "guidance_interval": (0.2, 1.0)},
    "projected guidance": {"apg": (0.2, 5.0, -0.5), "image": drawing(64, 64), "mask": MASK},
    "CFG++, deep features kept": {"sampler": "dpmpp_2m_cfg_pp", "cache_interval": 2},
    "lower levels shrunk": {"deep_shrink": 0.5, "cache_interval": 2},
}


@pytest.fixture(scope="module")
def host():
    return Pipeline.load(settings=BackendSettings(threads=1))


@pytest.fixture
def device():
    return FakeDevice()


def on_device(host, device):
    found = moved(Pipeline.load(settings=BackendSettings(threads=1)), device)
    for part in PARTS:
        found.engines.opened[part] = FakeEngine(host.engine(part), device)
    return found, device


@pytest.fixture
def pipeline(host, device):
    return on_device(host, device)[0]


def pixels(result):
    return [np.asarray(image) for image in result.images]


@pytest.mark.parametrize("name", OPTIONS)
def test_pictures_are_those_of_the_processor(host, pipeline, device, name):
    options = REQUEST | OPTIONS[name]
    expected = pixels(host(**options))
    for run in range(3):  # call by call, recorded, launched
        np.testing.assert_array_equal(pixels(pipeline(**options)), expected, err_msg=f"run {run}")
    assert device.counts["replay"] > 0 or "hires" in options


@pytest.mark.parametrize("name", OPTIONS)
def test_pictures_are_the_same_where_memory_has_no_addresses(host, name):
    options = REQUEST | OPTIONS[name]
    pipeline, _ = on_device(host, FakeDevice(has_addresses=False))
    expected = pixels(host(**options))
    for run in range(2):
        np.testing.assert_array_equal(pixels(pipeline(**options)), expected, err_msg=f"run {run}")
    plan = pipeline.plan(Request(**options))
    for step in pipeline.denoise(plan):
        assert isinstance(step.state.registers, DeviceArray)
    if "hires" not in options:
        latents = pipeline.decode(step.latents, plan)
        images = pipeline.finish(plan, latents)
        np.testing.assert_array_equal([np.asarray(image) for image in images], expected)


def test_what_calls_have_the_same_is_uploaded_once_where_memory_has_no_addresses(host):
    pipeline, device = on_device(host, FakeDevice(has_addresses=False))
    options = REQUEST | {"sampler": "ddim"}
    pipeline(**options)
    device.counts.clear()
    pipeline(**options)
    told = {"registers", "context", "guidance", "guidance_rescale", "mask", "noise", "outside"}
    for_every_step = {"matrices", "timestep"}
    scale_of_ddim = 1
    latents, latents_again = 1, 1  # to the processor, and to the decoder
    assert device.counts["upload"] == (
        len(told) + scale_of_ddim + STEPS * len(for_every_step) + latents_again
    )
    assert device.counts["download"] == latents + 1, "the pixels"


@pytest.mark.parametrize("name", OPTIONS)
def test_every_step_may_be_read_when_all_is_over(host, pipeline, name):
    request = Request(**REQUEST | OPTIONS[name])
    expected, found = ([*p.denoise(p.plan(request))] for p in (host, pipeline))
    assert len(expected) == len(found)
    for theirs, ours in zip(expected, found, strict=True):
        assert (theirs.step, theirs.total) == (ours.step, ours.total)
        np.testing.assert_array_equal(theirs.latents, ours.latents)
        np.testing.assert_array_equal(theirs.denoised(), ours.denoised())


def test_two_runs_in_turn(host, pipeline):
    requests = [Request(**REQUEST | {"seed": seed}) for seed in (1, 2)]
    runs = [pipeline.denoise(pipeline.plan(request)) for request in requests]
    *_, (first, second) = zip(*runs, strict=True)
    for request, progress in zip(requests, (first, second), strict=True):
        *_, expected = host.denoise(host.plan(request))
        np.testing.assert_array_equal(progress.latents, expected.latents)


def test_nothing_waits_between_the_first_step_and_the_picture(pipeline, device):
    plan = pipeline.plan(Request(**REQUEST))
    device.counts.clear()
    pipeline._run(plan, pipeline.start(plan))
    assert device.counts["wait"] == device.counts["download"] == device.counts["run"] == 0
    draw(pipeline, PROVEN)
    device.counts.clear()
    pipeline(**REQUEST)
    assert device.counts["download"] == 1, "the pixels"


def draw(pipeline, times=1, **options):
    """Draw pictures of one form, of other seeds."""
    for seed in range(times):
        pipeline(**REQUEST | {"seed": seed} | options)


def test_what_is_uploaded_once_a_picture(pipeline, device):
    draw(pipeline, PROVEN, sampler="ddim")
    device.counts.clear()
    draw(pipeline, sampler="ddim")
    told = {"context", "guidance", "guidance_rescale", "mask", "noise"}
    tables = {"matrices", "outside", "timestep", "input_scale"}
    assert device.counts["upload"] == len({"registers", *told, *tables})
    assert device.counts["record"] == 0
    assert device.counts["replay"] == 1


def test_a_recording_is_made_in_the_second_run_and_proven_in_the_third(host, pipeline, device):
    seen = []
    for seed in range(5):
        device.counts.clear()
        found = pixels(pipeline(**REQUEST | {"seed": seed}))
        np.testing.assert_array_equal(found, pixels(host(**REQUEST | {"seed": seed})))
        calls = {part: device.counts[part] for part in ("record", "replay", "run")}
        seen.append(
            calls | {"run": calls["run"] - 1 - (not seen)}
        )  # the decoder, and the text once
    once = {"record": 0, "replay": 1, "run": STEPS}
    assert seen == [
        {"record": 0, "replay": 0, "run": STEPS},
        {"record": 1, "replay": 0, "run": STEPS},
        {"record": 0, "replay": 1, "run": 2 * STEPS},
        once,
        once,
    ]


def test_forms_in_turn_are_recorded_once_each(host, pipeline, device):
    """As pictures come to a server: alone, two at once, and of another size."""
    forms = [{}, {"prompt": ["a dog", "a cat"]}, {"height": 72, "width": 72}]
    for form in forms * PROVEN:
        pipeline(**REQUEST | form)
    assert device.counts["record"] == len(forms)
    device.counts.clear()
    for seed, form in enumerate(forms * 2):
        options = REQUEST | form | {"seed": seed}
        np.testing.assert_array_equal(pixels(pipeline(**options)), pixels(host(**options)))
    assert device.counts["record"] == 0
    assert device.counts["replay"] == 2 * len(forms)


def test_the_memory_of_a_form_that_is_used_no_more_is_freed(pipeline, device, monkeypatch):
    monkeypatch.setattr(device_loop, "FORMS", 2)
    sides = (64, 72, 80)
    for side in sides[:2]:
        draw(pipeline, PROVEN, height=side, width=side)
    held = device.allocated
    for side in sides[2:] + sides[:2]:
        draw(pipeline, PROVEN, height=side, width=side)
    assert device.counts["record"] == 5
    assert device.allocated == held


def test_forms_that_do_not_fit_together_are_drawn_in_turn(host):
    options, peaks = [REQUEST | {"height": side, "width": side} for side in (64, 96)], []
    for each in options:
        pipeline, device = on_device(host, FakeDevice())
        pipeline(**each)
        peaks.append(device.peak)
    expected = [pixels(host(**each)) for each in options]
    pipeline, device = on_device(host, FakeDevice(total=max(peaks)))
    for _ in range(2):
        for each, pictures in zip(options, expected, strict=True):
            np.testing.assert_array_equal(pixels(pipeline(**each)), pictures)
    with pytest.raises(BackendError, match="are missing"):
        pipeline(**REQUEST | {"height": 192, "width": 192})
    np.testing.assert_array_equal(pixels(pipeline(**options[0])), expected[0])


def test_recorded_work_is_dropped_with_the_adapters_or_the_shared_memory(host, pipeline, device):
    draw(pipeline, PROVEN)
    assert device.counts["record"] == 1
    pipeline.set_loras([])
    draw(pipeline, PROVEN)
    assert device.counts["record"] == 2
    device.scratch(2**20)
    for seed in range(PROVEN):
        expected = pixels(host(**REQUEST | {"seed": seed}))
        np.testing.assert_array_equal(pixels(pipeline(**REQUEST | {"seed": seed})), expected)
    assert device.counts["record"] == 3


@pytest.mark.parametrize("after", [0, 1], ids=["at once", "and the next call is told so"])
def test_what_cannot_be_recorded_is_queued_call_by_call(
    host, pipeline, device, monkeypatch, caplog, after
):
    failures = []
    enqueue = FakeEngine.enqueue

    def refuse(work):
        device.counts["record"] += 1
        failures.extend(["told late"] * after)
        raise BackendError("the GPU failed")

    def fail(self, inputs, outputs):
        if failures:
            raise BackendError(failures.pop())
        enqueue(self, inputs, outputs)

    monkeypatch.setattr(device, "record", refuse)
    monkeypatch.setattr(FakeEngine, "enqueue", fail)
    expected = pixels(host(**REQUEST))
    for _ in range(4):
        np.testing.assert_array_equal(pixels(pipeline(**REQUEST)), expected)
    assert device.counts["record"] == 1
    assert device.counts["replay"] == 0
    (line,) = caplog.messages
    assert "not recorded as a graph: the GPU failed" in line


def test_a_recording_that_makes_other_latents_draws_nothing(
    host, pipeline, device, monkeypatch, caplog
):
    """As one would that holds copies of what the processor computed for the picture before."""
    record = device.record

    def stale(work):
        replay = record(work)
        recording = next(reversed(pipeline._device_loop._recordings.values()))

        def launch():
            replay()
            device.upload(np.zeros(recording.latents.shape, np.float32), recording.latents)

        return launch

    monkeypatch.setattr(device, "record", stale)
    for seed in range(5):
        options = REQUEST | {"seed": seed}
        np.testing.assert_array_equal(pixels(pipeline(**options)), pixels(host(**options)))
    assert device.counts["record"] == device.counts["replay"] == 1
    (line,) = caplog.messages
    assert "makes other latents" in line


def test_an_engine_that_cannot_be_recorded_is_not(host, pipeline, device, monkeypatch):
    monkeypatch.setattr(FakeEngine, "records", False)
    expected = pixels(host(**REQUEST))
    for _ in range(3):
        np.testing.assert_array_equal(pixels(pipeline(**REQUEST)), expected)
    assert device.counts["record"] == 0


def test_tables_begin_where_tensors_may(pipeline, device, monkeypatch):
    seen = []
    enqueue = FakeEngine.enqueue

    def watch(self, inputs, outputs):
        seen.extend(array.address for array in (*inputs.values(), *outputs.values()))
        enqueue(self, inputs, outputs)

    monkeypatch.setattr(FakeEngine, "enqueue", watch)
    pipeline(**REQUEST | {"prompt": ["a", "b", "c"]})
    assert len(seen) > STEPS
    assert not [address for address in seen if address % 256]


def test_threads(host, pipeline):
    found = {}

    def work(seed):
        for _ in range(3):
            found[seed] = pixels(pipeline(**REQUEST | {"seed": seed}))

    threads = [Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, pictures in found.items():
        np.testing.assert_array_equal(pictures, pixels(host(**REQUEST | {"seed": seed})))
