"""Groups: the same bits however pictures are grouped, and no more of them at once than fit."""

from types import SimpleNamespace

import numpy as np
import pytest

from engine.backends.settings import BackendSettings
from engine.errors import BackendError, RequestError
from runtime import Hires, Pipeline, Request
from runtime.denoising.groups import batch_limit, groups_of
from runtime.denoising.rows import part_of
from tests.support.named_requests import IMAGE, MASK

SIDE = 32
COUNT = 3
WISHES = {
    "plain": {"num_images_per_prompt": COUNT},
    "a list": {"prompt": ["a cat", "a dog AND a hat", "x"], "sampler": "euler_a"},
    "not guided": {"num_images_per_prompt": COUNT, "guidance_scale": 1.0},
    "half guided": {"num_images_per_prompt": COUNT, "guidance_interval": (0.0, 0.5)},
    "painted": {"num_images_per_prompt": COUNT, "image": IMAGE, "mask": MASK, "sampler": "lms"},
    "enlarged": {"num_images_per_prompt": COUNT, "hires": Hires(scale=1.25), "cache_interval": 2},
}


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load(settings=BackendSettings(backend="cpu", threads=2), precision="float32")


def fields(**chosen):
    given = {"prompt": "a red apple", "seed": 3, "num_inference_steps": 2}
    return {**given, "height": SIDE, "width": SIDE, **chosen}


def asked(**chosen):
    return Request(**fields(**chosen))


def drawn(pipeline, plan, size):
    """Draw a plan in groups of a size; returns its images and the sizes of its groups."""
    images, sizes = [], []
    for group in pipeline.groups(plan, size):
        *_, last = pipeline.denoise(group)
        images += pipeline.finish(group, pipeline.decode(last.latents))
        sizes.append(len(group.seeds))
    return [np.asarray(image).tobytes() for image in images], sizes


@pytest.mark.parametrize("name", WISHES)
def test_the_bits_are_the_same_in_every_grouping(pipeline, name):
    plan = pipeline.plan(asked(**WISHES[name]))
    alone, sizes = drawn(pipeline, plan, 1)
    assert sizes == [1] * COUNT
    assert len(set(alone)) == COUNT
    for size, expected in ((2, [2, 1]), (COUNT, [COUNT])):
        images, sizes = drawn(pipeline, plan, size)
        assert images == alone
        assert sizes == ([1] * COUNT if plan.is_sensitive else expected)


def test_a_call_draws_in_groups(pipeline):
    plan = pipeline.plan(asked(num_images_per_prompt=6))
    expected, sizes = drawn(pipeline, plan, None)
    images = pipeline(**fields(num_images_per_prompt=6)).images
    assert sizes == [3, 3]
    assert [np.asarray(image).tobytes() for image in images] == expected


def test_unlike_requests_share_calls_and_keep_their_bits(pipeline):
    chosen = [
        {"sampler": "euler", "num_inference_steps": 3},
        {"sampler": "lms", "num_inference_steps": 4, "guidance_scale": 2.0},
        {"num_images_per_prompt": 2, "sampler": "ddpm"},
        {"guidance_scale": 1.0},
        {"hires": Hires(scale=1.25), "prompt": "a house"},
        {"height": 2 * SIDE},
    ]
    requests = [asked(**each) for each in chosen]
    sizes, engines = [], pipeline.engines

    class Counting:
        def __init__(self, engine):
            self.engine = engine

        def run(self, inputs):
            sizes.append(len(inputs["registers"]))
            return self.engine.run(inputs)

    step = pipeline.engine("step")
    engines.opened["step"] = Counting(step)
    try:
        results = list(pipeline.draw(requests, batch_size=4))
    finally:
        engines.opened["step"] = step
    assert sorted(each.request for each in results) == [0, 1, 2, 2, 3, 4, 5]
    assert max(sizes) == 4, "calls were shared"
    for index, request in enumerate(requests):
        expected, _ = drawn(pipeline, pipeline.plan(request), 1)
        mine = sorted((e for e in results if e.request == index), key=lambda e: e.settings["seed"])
        assert [np.asarray(each.image).tobytes() for each in mine] == expected
        assert all(each.settings["sampler"] == (request.sampler or "ddim") for each in mine)


def test_where_a_batch_changes_bits_every_group_has_one_size(pipeline):
    plan = pipeline.plan(asked(num_images_per_prompt=COUNT))
    for limit, is_filled, sizes in (
        (1, False, [1] * COUNT),
        (2, True, [2, 2]),
        (2, False, [2, 2]),
        (4, True, [4]),
        (4, False, [COUNT]),
    ):
        groups = groups_of(plan, limit, is_exact=False, is_filled=is_filled)
        assert [len(group.seeds) for group in groups] == sizes
        assert sum(sizes) - sum(group.surplus for group in groups) == COUNT
        assert [settings["seed"] for group in groups for settings in group.settings] == plan.seeds
    (group,) = groups_of(plan, 4, is_exact=False, is_filled=True)
    *_, last = pipeline.denoise(group)
    assert last.latents.shape[0] == 4
    assert len(pipeline.finish(group, pipeline.decode(last.latents))) == COUNT


def test_a_part_beyond_the_end_repeats_the_last(pipeline):
    plan = pipeline.plan(asked(num_images_per_prompt=2))
    part = part_of(plan, [1, 2])
    assert (part.seeds, part.surplus, len(part.settings)) == ([4, 4], 1, 1)
    assert part_of(plan, [0, 1]) is plan


def test_groups_are_small_by_default(pipeline):
    def sizes(**chosen):
        return [len(g.seeds) for g in pipeline.groups(pipeline.plan(asked(**chosen)))]

    assert sizes(num_images_per_prompt=64) == [4] * 16
    assert sizes(num_images_per_prompt=6) == [3, 3], "about equal"
    assert sizes(num_images_per_prompt=2, height=1024, width=1024) == [1, 1], "memory"
    assert sizes() == [1]


@pytest.mark.parametrize("size", [0, -1, 257, 1.5, True, "4"])
def test_a_size_that_is_none_is_refused(pipeline, size):
    with pytest.raises(RequestError, match="batch_size is"):
        pipeline.groups(pipeline.plan(asked()), size)


def test_other_backends_draw_one_by_one_or_what_a_gpu_holds():
    def limit(backend, fits):
        def require_memory(pictures):
            if pictures > fits:
                raise BackendError("too much")

        engines = SimpleNamespace(settings=SimpleNamespace(backend=backend), is_exact=False)
        sizes = {"height": 512, "width": 512, "batch": 9}
        return batch_limit(engines, ["step"], sizes, require_memory)

    assert limit("openvino", 1) == 1
    assert [limit("cuda", fits) for fits in (1, 3, 4, 100)] == [1, 2, 4, 8]


def test_openvino_draws_the_same_pictures_in_groups_of_one_size():
    """The bits of a picture are those of its group's size, wherever in the group it is."""
    pytest.importorskip("openvino")
    pipeline = Pipeline.load(settings=BackendSettings(backend="openvino", threads=1))
    together, sizes = drawn(pipeline, pipeline.plan(asked(num_images_per_prompt=4)), 3)
    again, _ = drawn(pipeline, pipeline.plan(asked(seed=5)), 3)
    assert (sizes, together[2]) == ([3, 3], again[0])
