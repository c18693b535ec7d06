import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from engine.backends.settings import BackendSettings
from engine.engines import Engines
from engine.errors import GraphError, ModelError, RequestError
from engine.model import Model, find_model
from runtime import Hires, Pipeline, Progress, Request, Result
from runtime.conditioning.tokenizer import Tokenizer
from runtime.presets import preset
from tests.support.pictures import drawing, psnr
from tests.support.tolerances import BATCH_PSNR_DB

STEPS = 3


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load("pictogram", settings=BackendSettings(threads=1))


class FakeEngine:
    """Keeps its weights and inputs; gives numbers of the right shapes."""

    def __init__(self, part, width, weights):
        self.part, self.width, self.weights, self.calls = part, width, weights, []
        self.rebound, self.refusing = [], 0

    def rebind(self, weights, names):
        self.rebound.append((weights, set(names)))
        self.refusing -= 1
        if self.refusing == 0:
            raise ModelError("not finite")

    def run(self, inputs):
        self.calls.append({name: value.copy() for name, value in inputs.items()})
        if self.part == "text_encoder":
            ids = inputs["input_ids"]
            hidden = np.repeat(ids[..., None], self.width, 2).astype("f")
            return {
                "last_hidden_state": hidden,
                "penultimate_hidden_state": hidden + 0.5,
                "pooled": hidden[:, 0],
            }
        if self.part in ("step", "step_shallow"):
            rows, size = inputs["context"].shape[:2], inputs["registers"].shape[-2:]
            deep = {"deep": np.full((*rows, 1, *size), len(self.calls), np.float32)}
            given = deep if self.part == "step" else {}
            return {"next_registers": inputs["registers"] + 1, **given}
        if self.part == "vae_encoder":
            return {"latents": inputs["noise"] * 0 + 100}
        batch, _, height, width = inputs["latents"].shape
        return {"pixels": np.zeros((batch, 8 * height, 8 * width, 3), np.uint8)}


@pytest.fixture
def recorded():
    """Give a pipeline on fake engines, and the engines that it has opened."""
    model, engines = Model.open(find_model("pictogram")), {}

    class FakeEngines(Engines):
        def open(self, part, weights, variant=None):
            assert variant is None
            assert part not in engines, "an engine is opened once"
            width = model.text_encoders["text_encoder"].hidden_size
            return engines.setdefault(part, FakeEngine(part, width, weights))

    def load(model):
        tokenizers = {"text_encoder": Tokenizer.load(model.path / "tokenizer")}
        settings = BackendSettings(backend="cpu")
        return Pipeline(FakeEngines(model, settings, "float32"), tokenizers)

    return SimpleNamespace(draw=load(model), engines=engines, load=load)


def pixels(image):
    return np.asarray(image).tolist()


def test_a_picture_has_the_models_size(pipeline):
    result = pipeline("a red apple", seed=3, num_inference_steps=STEPS)
    assert isinstance(result, Result)
    side = pipeline.model.sample_size * 8
    assert [(image.size, image.mode) for image in result.images] == [((side, side), "RGB")]
    assert result.seeds == [3]
    assert [settings["seed"] for settings in result.settings] == [3]


def test_the_same_request_gives_the_same_picture(pipeline):
    first, second = (pipeline("house", seed=0, num_inference_steps=STEPS) for _ in range(2))
    assert first.seeds == second.seeds == [0]
    assert pixels(first.images[0]) == pixels(second.images[0])


def test_every_engine_gets_the_weights_of_its_part(recorded):
    recorded.draw.start(recorded.draw.plan(Request(prompt="a", image=drawing(64, 64))))
    for part, engine in recorded.engines.items():
        assert set(engine.weights) == set(recorded.draw.model.weights(part))


def test_without_a_seed_every_picture_is_another(pipeline):
    first, second = (pipeline("house", num_inference_steps=1) for _ in range(2))
    assert first.seeds != second.seeds
    assert pixels(first.images[0]) != pixels(second.images[0])
    again = pipeline("house", num_inference_steps=1, seed=first.seeds[0])
    assert pixels(first.images[0]) == pixels(again.images[0])


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m"])
def test_a_picture_is_the_same_alone_and_in_a_batch(pipeline, sampler):
    prompts, negative = ["a red apple", "house", "blue fish"], ["", "blurry", "red"]
    options = {"num_inference_steps": STEPS, "sampler": sampler}
    together = pipeline(prompts, negative_prompt=negative, seed=20, **options).images
    for i, (prompt, avoid) in enumerate(zip(prompts, negative, strict=True)):
        alone = pipeline(prompt, negative_prompt=avoid, seed=20 + i, **options).images[0]
        assert psnr(alone, together[i]) >= BATCH_PSNR_DB


def test_image_to_image_is_the_same_alone_and_in_a_batch(pipeline):
    options = {"num_inference_steps": 4, "image": drawing(128, 128), "strength": 0.5}
    together = pipeline("house", num_images_per_prompt=2, seed=20, **options).images
    alone = pipeline("house", seed=21, **options).images[0]
    assert psnr(alone, together[1]) >= BATCH_PSNR_DB


def test_two_pipelines_do_not_disturb_each_other(pipeline):
    plan = pipeline.plan(Request(prompt="house", seed=5, num_inference_steps=4, sampler="euler_a"))
    first, second = pipeline.denoise(plan), pipeline.denoise(plan)
    interleaved = [(next(first).latents, next(second).latents) for _ in range(4)]
    for one, other in interleaved:
        np.testing.assert_array_equal(one, other)


def test_progress_counts_the_steps(pipeline):
    plan = pipeline.plan(Request(prompt=["a", "b"], seed=1, num_inference_steps=4))
    seen = list(pipeline.denoise(plan))
    assert all(isinstance(progress, Progress) for progress in seen)
    assert [(progress.step, progress.total) for progress in seen] == [(i, 4) for i in (1, 2, 3, 4)]
    side = pipeline.model.sample_size
    for progress in seen:
        assert progress.latents.shape == (2, 8, side, side)
        assert progress.latents.dtype == np.float32
    assert not np.array_equal(seen[0].latents, seen[1].latents), "a later step overwrote it"
    previews = pipeline.decode(seen[1].latents)
    assert [preview.size for preview in previews] == [(8 * side, 8 * side)] * 2


def test_leaving_the_loop_stops_the_work(recorded):
    plan = recorded.draw.plan(Request(prompt="house", num_inference_steps=10))
    for progress in recorded.draw.denoise(plan):
        if progress.step == 3:
            break
    assert len(recorded.engines["step"].calls) == 3
    assert not recorded.engines["vae_decoder"].calls


@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler", "euler_a", "dpmpp_2m"])
def test_every_step_is_one_call_of_one_engine(recorded, sampler, steps):
    recorded.draw(["a", "b"], sampler=sampler, num_inference_steps=steps)
    calls = {part: len(engine.calls) for part, engine in recorded.engines.items()}
    assert calls == {"text_encoder": 1, "step": steps, "vae_decoder": 1}, "no vae_encoder"


@pytest.mark.parametrize(("strength", "steps"), [(0.1, 1), (0.5, 5), (0.79, 7), (1.0, 10)])
def test_strength_leaves_steps_out(recorded, strength, steps):
    recorded.draw("a", image=drawing(64, 64), strength=strength, num_inference_steps=10)
    assert len(recorded.engines["step"].calls) == steps


@pytest.mark.parametrize(
    ("recommended", "given", "steps", "scale"),
    [
        ({}, {}, 20, 5.0),
        ({"steps": 4, "guidance_scale": 8.0}, {}, 4, 8.0),
        ({"steps": 1, "guidance_scale": 1.0}, {}, 1, 1.0),
        ({"steps": 4, "guidance_scale": 8.0}, {"num_inference_steps": 2}, 2, 8.0),
        ({"steps": 4, "guidance_scale": 8.0}, {"guidance_scale": 0}, 4, 0),
    ],
)
def test_what_is_given_the_models_recommendation_or_the_default(
    recorded, recommended, given, steps, scale
):
    model = replace(recorded.draw.model, **recommended)
    draw = recorded.load(model)
    plan = draw.plan(Request(prompt="a", **given))
    (settings,) = plan.settings
    assert (settings["num_inference_steps"], settings["guidance_scale"]) == (steps, scale)
    assert len(plan.program.timesteps) == len(plan.conditioning) == steps
    assert len(plan.conditioning[0]["guidance"]) == (2 if scale > 1 else 1)


def test_engine_inputs_of_a_guided_batch(recorded):
    recorded.draw(
        ["a", "b"],
        negative_prompt="c",
        num_images_per_prompt=2,
        guidance_scale=3.0,
        num_inference_steps=2,
        sampler="dpmpp_2m",
        height=64,
        width=96,
        seed=8,
    )
    call = recorded.engines["step"].calls[0]
    assert call["registers"].shape == (4, 2, 8, 8, 12)
    assert call["matrices"].shape == (4, 2, 4)
    assert call["noise"].shape == (4, 8, 8, 12)
    assert not call["noise"].any(), "this sampler draws none"
    assert call["guidance"][..., 0, 0, 0].tolist() == [[-2.0] * 4, [3.0] * 4]
    assert call["mask"].tolist() == np.ones((4, 1, 8, 12)).tolist(), "nothing is kept"
    assert call["outside"].tolist() == np.zeros((4, 4)).tolist()
    assert call["guidance_rescale"].tolist() == [0] * 4
    assert {value.dtype for value in call.values()} == {np.dtype(np.float32)}
    negative, a, b = (
        recorded.draw.encoder.tokenizers["text_encoder"]([text]).input_ids[0] for text in "cab"
    )
    rows = call["context"][..., 0]
    np.testing.assert_array_equal(rows, [[negative] * 4, [a, a, b, b]])
    assert len(recorded.engines["text_encoder"].calls[0]["input_ids"]) == 3, "each text once"


@pytest.mark.parametrize("guidance_scale", [0, 0.5, 1, 1.0])
def test_without_guidance_the_unet_sees_each_picture_once(recorded, guidance_scale):
    recorded.draw(["a", "b"], guidance_scale=guidance_scale, num_inference_steps=1)
    calls = recorded.engines["step"].calls
    assert [call["guidance"][..., 0, 0, 0].tolist() for call in calls] == [[[1.0]]] * 2, (
        "one by one"
    )
    assert {call["context"].shape[:2] for call in calls} == {(1, 1)}


def test_an_image_is_brought_to_size_and_noised(recorded):
    recorded.draw(
        "a",
        image=drawing(100, 150).convert("L"),
        height=64,
        width=32,
        num_images_per_prompt=2,
        num_inference_steps=4,
        strength=0.5,
    )
    encoded = recorded.engines["vae_encoder"].calls[0]
    assert encoded["pixels"].shape == (2, 64, 32, 3)
    assert encoded["pixels"].dtype == np.uint8
    start = recorded.engines["step"].calls[0]["registers"][:, 0]
    assert start.mean() > 30, "the fake latents are 100"
    assert start.std() > 0.1


def test_numbers_of_numpy_are_numbers(recorded):
    result = recorded.draw(
        "a",
        num_inference_steps=np.int64(2),
        guidance_scale=np.float32(2),
        height=np.int32(64),
        seed=np.uint64(2**63),
    )
    assert result.seeds == [2**63]
    assert result.images[0].height == 64


def test_a_long_prompt_is_drawn_whole(pipeline):
    row = pipeline.encoder.tokenizers["text_encoder"].max_length
    options = {"num_inference_steps": 1, "seed": 1}
    start = "1 " * (row - 2)
    plan = pipeline.plan(Request(prompt=[start, start + "red apple"], **options))
    assert plan.conditioning[0]["context"].shape[:3] == (2, 2, 2 * row)
    first, second = pipeline([start, start + "red apple"], **options).images
    assert pixels(first) != pixels(second)


def test_a_prompt_that_changes_is_one_call_a_step(recorded):
    recorded.draw("[a:b:0.5]", num_inference_steps=4, guidance_scale=3.0, seed=8)
    calls = recorded.engines["step"].calls
    tokenizer = recorded.draw.encoder.tokenizers["text_encoder"]
    empty, a, b = (tokenizer([text]).input_ids[0] for text in ("", "a", "b"))
    for call, now in zip(calls, [a, a, b, b], strict=True):
        np.testing.assert_array_equal(call["context"][:, 0, :, 0], [empty, now])
        assert call["guidance"][..., 0, 0, 0].tolist() == [[-2.0], [3.0]]
    assert len(recorded.engines["text_encoder"].calls) == 1
    plan = recorded.draw.plan(Request(prompt="[a|b]", num_inference_steps=4))
    for _ in range(2):
        list(recorded.draw.denoise(plan))
        told = [call["context"][1, 0, 1, 0] for call in recorded.engines["step"].calls[-4:]]
        assert told == [a[1], b[1], a[1], b[1]], "every time from the start"


def test_outside_the_interval_the_batch_is_halved(recorded):
    recorded.draw("a", num_inference_steps=5, guidance_scale=[5, 3], guidance_interval=(0.2, 0.8))
    calls = recorded.engines["step"].calls
    assert [len(call["context"]) for call in calls] == [1, 2, 2, 2, 1]
    assert [call["guidance"][:, 0, 0, 0, 0].tolist() for call in calls[1:4]] == [
        [-3.5, 4.5],
        [-3, 4],
        [-2.5, 3.5],
    ]


def test_prompts_that_are_drawn_together(recorded):
    recorded.draw(
        ["a AND b :0.5", "c"],
        negative_prompt="no",
        negative_scale=2,
        guidance_scale=4,
        guidance_rescale=0.7,
        num_inference_steps=1,
    )
    (call,) = recorded.engines["step"].calls
    encode = recorded.draw.encoder.tokenizers["text_encoder"]
    empty, no, a, b, c = (encode([text]).input_ids[0] for text in ("", "no", "a", "b", "c"))
    np.testing.assert_array_equal(call["context"][..., 0], [[empty] * 2, [no] * 2, [a, c], [b, c]])
    assert call["guidance"][..., 0, 0, 0].tolist() == [[-3, -1], [-2, -2], [4, 4], [2, 0]]
    assert call["guidance_rescale"].tolist() == np.float32([0.7, 0.7]).tolist()


def half(height, width):
    """Paint the right half of a mask white."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 2, 0, width, height))
    return mask


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "euler_a", "heun"])
def test_inpainting_keeps_what_is_not_masked_in_the_step(recorded, sampler):
    options = {"image": drawing(64, 64), "mask": half(64, 64), "num_inference_steps": 3}
    recorded.draw("a", sampler=sampler, seed=4, **options)
    calls = recorded.engines["step"].calls
    run = recorded.draw.plan(Request(prompt="a", sampler=sampler, **options)).program
    assert len(calls) == len(run.timesteps), "one call a step"
    assert len(recorded.engines["vae_encoder"].calls) == 1
    for k, call in enumerate(calls):
        assert call["mask"].tolist() == [[[[0] * 4 + [1] * 4] * 8]]
        registers = call["registers"].shape[1]
        levels = np.float32([run.signal_scales[k + 1], run.noise_scales[k + 1]])
        np.testing.assert_array_equal(call["outside"], [[*[0] * (registers - 2), *levels, 0, 0]])
        kept = call["matrices"][0, -2:, registers - 2 : registers]
        assert kept.tolist() == [[1, 0], [0, 1]]
    first = calls[0]["registers"][0]
    np.testing.assert_array_equal(first[-2], 100)
    start = np.float32(run.initial_noise) * first[-1]
    np.testing.assert_array_equal(first[0], start)
    assert run.signal_scales[-1] == 1
    assert run.noise_scales[-1] == 0


def test_a_canvas_that_grows(recorded):
    result = recorded.draw(
        "a", image=drawing(64, 64), extend=(0, 0, 32, 0), num_inference_steps=2, strength=0.9
    )
    assert result.images[0].size == (96, 64)
    call = recorded.engines["step"].calls[0]
    assert call["mask"][0, 0, 0].tolist() == [0] * 7 + [1] * 5, "and a little of the picture"
    np.testing.assert_array_equal(
        np.asarray(result.images[0])[:, :32], np.asarray(drawing(64, 64))[:, :32]
    )


def counted(recorded):
    """Return which deep features each call of a shallow step got, and the calls of whole steps."""
    whole, shallow = (recorded.engines[part].calls for part in ("step", "step_shallow"))
    return [int(call["deep"].flat[0]) for call in shallow], len(whole)


def test_every_fourth_call_is_whole(recorded):
    recorded.draw("a", num_inference_steps=20, cache_interval=4)
    got, whole = counted(recorded)
    assert (len(got), whole) == (15, 5)
    assert got == [call for call in range(1, 6) for _ in range(3)], "those of the last whole call"
    first, second = (recorded.engines[part].calls[0] for part in ("step", "step_shallow"))
    assert [*second] == [*first, "deep"]
    assert np.array_equal(second["registers"], first["registers"] + 1)


@pytest.mark.parametrize(
    ("sampler", "steps", "calls"), [("ddim", 5, 5), ("heun", 5, 9), ("dpm2", 5, 9), ("lcm", 5, 5)]
)
def test_an_interval_counts_calls(recorded, sampler, steps, calls):
    recorded.draw("a", num_inference_steps=steps, cache_interval=3, sampler=sampler)
    got, whole = counted(recorded)
    assert (len(got) + whole, whole) == (calls, -(-calls // 3))


def test_other_rows_or_texts_make_a_call_whole(recorded):
    def whole(prompt, **options):
        options = {"num_inference_steps": 10, "cache_interval": 4} | options
        return recorded.draw.plan(Request(prompt=prompt, **options)).full_calls

    def calls(*numbers):
        return [call in numbers for call in range(10)]

    assert whole("a") == calls(0, 4, 8)
    assert whole("a", guidance_interval=(0.0, 0.6)) == calls(0, 4, 6)
    assert whole("a", guidance_interval=(0.1, 0.6)) == calls(0, 1, 5, 6)
    assert whole("[a:b:0.5]") == calls(0, 4, 5, 9)
    assert whole("a", guidance_scale=[7, 3]) == calls(0, 4, 8), "a curve changes no row"
    assert whole("a", cache_interval=1) == [True] * 10
    assert whole("a", cache_interval=10) == calls(0)
    recorded.draw("a", num_inference_steps=10, cache_interval=4, guidance_interval=(0.1, 0.6))
    rows = [call["deep"].shape[0] for call in recorded.engines["step_shallow"].calls]
    assert rows == [2] * 3 + [1] * 3, "those of call 1 and 6"
    assert all(
        len(call["deep"]) == len(call["context"]) for call in recorded.engines["step_shallow"].calls
    )


def test_the_second_run_of_hires_begins_whole(recorded):
    hires = Hires(scale=1.5, strength=1.0, num_inference_steps=3, upscaler="bilinear")
    options = {"hires": hires, "num_inference_steps": 4, "height": 64, "width": 32}
    recorded.draw("a", cache_interval=3, **options)
    got, whole = counted(recorded)
    assert (got, whole) == ([1, 1, 3, 3], 3)


def start(pipeline, **options):
    return pipeline.start(pipeline.plan(Request(prompt="a", **options)))


def test_the_shallow_step_is_opened_only_if_it_is_called(recorded):
    start(recorded.draw)
    start(recorded.draw, cache_interval=1, num_inference_steps=1)
    plan = recorded.draw.plan(Request(prompt="[a|b]", cache_interval=2, num_inference_steps=4))
    recorded.draw.start(plan)
    assert "step_shallow" not in recorded.engines
    start(recorded.draw, cache_interval=2, num_inference_steps=2)
    assert not recorded.engines["step_shallow"].calls


def test_a_plan_opens_nothing_but_what_encodes_its_texts(recorded):
    recorded.draw.plan(Request(prompt="a", image=drawing(64, 64)))
    assert set(recorded.engines) == {"text_encoder"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (0, "cache_interval is 0; give a whole number from 1 to 1000000"),
        (-2, "cache_interval is -2; give a whole number from 1"),
        (1.5, "cache_interval is 1.5; give a whole number from 1"),
        (True, "cache_interval is True; give a whole number from 1"),
        ("2", "cache_interval is '2'; give a whole number from 1"),
        (5, "cache_interval is 5; give a whole number from 1 to 4"),
    ],
)
def test_an_interval_is_a_number_of_steps(recorded, given, said):
    with pytest.raises(RequestError, match=f"^{said}"):
        recorded.draw("a", num_inference_steps=4, cache_interval=given)
    assert "step" not in recorded.engines


def test_an_interval_is_kept_in_the_pictures_settings(recorded):
    (settings,) = recorded.draw("a", cache_interval=2, num_inference_steps=2).settings
    assert settings["cache_interval"] == 2


def test_kept_features_save_work_and_change_the_picture_a_little(pipeline):
    options = {"seed": 1, "num_inference_steps": 8}
    exact = pipeline("a red apple", **options).images[0]
    cached = pipeline("a red apple", cache_interval=2, **options).images[0]
    other = pipeline("house", **options).images[0]
    assert psnr(exact, other) < psnr(exact, cached) < BATCH_PSNR_DB
    assert pixels(pipeline("a red apple", cache_interval=1, **options).images[0]) == pixels(exact)


def test_hires_draws_over_the_enlarged_picture(recorded):
    hires = Hires(scale=1.5, strength=0.5, num_inference_steps=4, upscaler="bilinear")
    plan = recorded.draw.plan(
        Request(prompt="a", hires=hires, num_inference_steps=3, height=64, width=32)
    )
    seen = list(recorded.draw.denoise(plan))
    assert [(progress.step, progress.total) for progress in seen] == [(i, 5) for i in range(1, 6)]
    sizes = [call["registers"].shape[-2:] for call in recorded.engines["step"].calls]
    assert sizes == [(8, 4)] * 3 + [(12, 6)] * 2
    assert "vae_encoder" not in recorded.engines
    recorded.draw("a", hires=Hires(num_inference_steps=1, strength=1.0), num_inference_steps=1)
    (call,) = recorded.engines["vae_encoder"].calls
    assert call["pixels"].shape == (1, 256, 256, 3)


def test_seeds_of_each_picture_and_noise_of_either_kind(recorded):
    result = recorded.draw(["a", "b"], seed=[9, 7], num_inference_steps=1)
    again = recorded.draw("b", seed=7, num_inference_steps=1)
    recorded.draw("b", seed=7, noise="cuda", num_inference_steps=1)
    assert result.seeds == [9, 7]
    first, second, other = (call["registers"] for call in recorded.engines["step"].calls)
    np.testing.assert_array_equal(first[1:], second)
    assert not np.array_equal(second, other)
    assert [s["prompt"] for s in (*result.settings, *again.settings)] == ["a", "b", "b"]


def test_a_preset_stands_in_for_what_is_not_said(recorded):
    chosen = preset("quality", recorded.draw.model)
    plan = recorded.draw.plan(Request(prompt="a", preset="quality"))
    assert plan.settings[0]["sampler"] == chosen.sampler
    assert plan.settings[0]["num_inference_steps"] == chosen.num_inference_steps
    plan = recorded.draw.plan(
        Request(prompt="a", preset="quality", sampler="ddim", num_inference_steps=2)
    )
    assert [plan.settings[0][k] for k in ("sampler", "schedule")] == ["ddim", None]
    assert len(plan.conditioning) == 2


def test_settings_make_the_picture_again(pipeline):
    options = {
        "negative_prompt": "blurry",
        "sampler": "euler_a",
        "guidance_scale": (6.0, 2.0),
        "guidance_interval": (0.0, 0.6),
        "hires": Hires(scale=1.5, strength=0.4),
        "num_inference_steps": STEPS,
    }
    result = pipeline(["a red apple", "house"], **options)
    settings = json.loads(json.dumps(result.settings[1]))
    settings["hires"] = Hires(**settings["hires"])
    again = pipeline(**settings)
    assert psnr(again.images[0], result.images[1]) >= BATCH_PSNR_DB
    assert pixels(again.images[0]) == pixels(pipeline(**settings).images[0])


def test_prompts_without_syntax(recorded):
    text = "[a] (b:1.5) BREAK"
    plan = recorded.draw.plan(Request(prompt=text, prompt_syntax=False, guidance_scale=1))
    (ids,) = recorded.draw.encoder.tokenizers["text_encoder"]([text]).input_ids
    np.testing.assert_array_equal(plan.conditioning[0]["context"][0, 0, :, 0], ids)


def test_clip_skip_takes_the_layer_before_the_last(pipeline):
    one, two = (
        pipeline("house", clip_skip=skip, num_inference_steps=STEPS, seed=1).images[0]
        for skip in (1, 2)
    )
    assert pixels(one) != pixels(two)


def test_new_weights_encode_texts_again(recorded, lora):
    for _ in range(2):
        recorded.draw.plan(Request(prompt="a"))
    assert len(recorded.engines["text_encoder"].calls) == 1
    recorded.draw.set_loras([lora])
    recorded.draw.plan(Request(prompt="a"))
    assert len(recorded.engines["text_encoder"].calls) == 2


def test_options_of_the_wrong_kind(recorded):
    for options, said in (
        ({"sampler": "dpmpp-4m"}, "did you mean 'dpmpp_2m'"),
        ({"num_inference_steps": 1001}, "from 1 to 1000"),
        ({"num_inference_steps": 0}, "from 1 to 1000"),
        ({"num_inference_steps": -3}, "from 1 to 1000"),
        ({"height": 100}, "multiple of 8, such as 96"),
        ({"image": drawing(64, 64), "strength": 0.0}, "above 0"),
        ({"image": drawing(64, 64), "strength": 0.01}, "runs no step"),
        ({"eta": 0.5, "sampler": "euler"}, "eta"),
        ({"clip_skip": 3}, "clip_skip is 3; give a whole number from 1 to 2"),
        ({"prompt_syntax": 1}, "prompt_syntax is 1; give True or False"),
        ({"steps": 3}, "did you mean num_inference_steps"),
        ({"preset": "best"}, "preset is 'best'; choose one of fast"),
        ({"noise": "mps"}, "noise is 'mps'; choose one of cpu, cuda"),
        ({"guidance_scale": "7"}, "guidance_scale is '7'; give a number from 0 to 1000"),
        ({"guidance_scale": [7, -1]}, "guidance_scale is -1; give a number"),
        ({"guidance_interval": (0.8, 0.2)}, "must not end before it begins"),
        ({"guidance_interval": 0.5}, "give two parts of the run"),
        ({"guidance_rescale": 2}, "guidance_rescale is 2; give a number from 0 to 1"),
        ({"mask": half(64, 64)}, "mask came without image"),
        ({"image": drawing(64, 64), "mask": "mask.png"}, "mask came as str"),
        ({"image": drawing(64, 64), "mask": Image.new("L", (64, 64))}, "black everywhere"),
        ({"image": drawing(64, 64), "extend": (0, 0, 0, 0)}, "grows on no side"),
        ({"image": drawing(64, 64), "extend": (1, 2)}, "extend is .*; give four"),
        ({"seed": [1, 2]}, "seed has 2 numbers for 1 picture"),
        ({"hires": 2}, "hires is 2; give Hires"),
        ({"prompt": "a AND " * 20}, "joins 21 parts with AND"),
    ):
        with pytest.raises(RequestError, match=said):
            recorded.draw(**{"prompt": "a"} | options)
    for hires, said in (
        ({"scale": 9}, "hires.scale is 9"),
        ({"upscaler": "esrgan"}, "choose one of lanczos"),
        ({"strength": 0.01}, "runs no step"),
    ):
        with pytest.raises(RequestError, match=said):
            recorded.draw("a", hires=Hires(**hires))
    with pytest.raises(RequestError, match="surrogate"):
        recorded.draw("\ud800")
    step = recorded.engines.get("step")
    assert step is None or not step.calls, "refused before the first step"


def test_what_is_damaged_is_found_before_the_first_step(recorded):
    start(recorded.draw, image=drawing(64, 64))
    assert set(recorded.engines) == {"text_encoder", "step", "vae_decoder", "vae_encoder"}
    assert not recorded.engines["step"].calls


def test_eta_draws_noise(recorded):
    recorded.draw("a", eta=0.5, num_inference_steps=2)
    assert all(call["noise"].any() for call in recorded.engines["step"].calls)


def test_model_path_and_loading_a_folder(pipeline):
    assert (pipeline.model_path / "model_index.json").is_file()
    other = Pipeline.load(pipeline.model_path, settings=BackendSettings(threads=1))
    options = {"seed": 1, "num_inference_steps": 1}
    ours, theirs = pipeline("a", **options).images[0], other("a", **options).images[0]
    assert pixels(ours) == pixels(theirs)


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(ModelError, match="did you mean 'pictogram'"):
        Pipeline.load("pictograms")
    with pytest.raises(ModelError, match="give the path of one"):
        Pipeline.load("x" * 5000)
    missing = Pipeline.load("pictogram", graphs=tmp_path)
    with pytest.raises(GraphError, match=r"python -m export .*pictogram"):
        missing("a")


CHANGED = {
    "unet": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "text_encoder": "text_model.encoder.layers.0.self_attn.q_proj",
}


@pytest.fixture
def lora(tmp_path):
    """Write a LoRA of one layer of the UNet and one of the text encoder."""
    model, state = Model.open(find_model("pictogram")), {}
    for component, name in CHANGED.items():
        rows, columns = model.find(component)[f"{name}.weight"].shape
        random = np.random.default_rng(rows)
        for end, shape in (("A", (2, columns)), ("B", (rows, 2))):
            values = random.standard_normal(shape).astype(np.float32)
            state[f"{component}.{name}.lora_{end}.weight"] = values
    save_file(state, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def test_an_adapter_rebinds_what_it_changes_in_open_engines(recorded, lora):
    start(recorded.draw)
    recorded.draw.set_loras([])
    assert not any(engine.rebound for engine in recorded.engines.values())
    recorded.draw.set_loras([lora])
    base = {part: engine.weights for part, engine in recorded.engines.items()}
    for part, component in (("step", "unet"), ("text_encoder", "text_encoder")):
        ((weights, names),) = recorded.engines[part].rebound
        (name,) = names
        assert name == f"{CHANGED[component]}.weight"
        assert not np.array_equal(weights[name], base[part][name])
    assert not recorded.engines["vae_decoder"].rebound
    recorded.draw.set_loras([])
    for part in ("step", "text_encoder"):
        weights, (name,) = recorded.engines[part].rebound[1]
        np.testing.assert_array_equal(weights[name], base[part][name], strict=True)


def test_an_adapter_is_in_the_weights_of_engines_that_open_later(recorded, lora):
    recorded.draw.set_loras([f"{lora}:0.5"])
    start(recorded.draw)
    name = f"{CHANGED['unet']}.weight"
    base = recorded.draw.model.find("unet")
    given = recorded.engines["step"].weights
    assert not np.array_equal(given[name], base[name])
    assert set(given) == set(base)
    assert not recorded.engines["step"].rebound


@pytest.mark.parametrize("part", ["step", "text_encoder"])
def test_an_adapter_is_in_all_engines_or_in_none(recorded, lora, part):
    start(recorded.draw)
    recorded.engines[part].refusing = 1
    with pytest.raises(ModelError, match="not finite"):
        recorded.draw.set_loras([lora])
    for engine in recorded.engines.values():
        if engine.rebound:
            weights, names = engine.rebound[-1]
            for name in names:
                np.testing.assert_array_equal(weights[name], engine.weights[name], strict=True)
    counts = {name: len(engine.rebound) for name, engine in recorded.engines.items()}
    recorded.draw.set_loras([])
    assert counts == {name: len(engine.rebound) for name, engine in recorded.engines.items()}


def test_an_adapter_is_in_both_engines_of_the_unet(recorded, lora):
    start(recorded.draw, cache_interval=2)
    recorded.draw.set_loras([lora])
    for part in ("step", "step_shallow"):
        ((_, names),) = recorded.engines[part].rebound
        assert names == {f"{CHANGED['unet']}.weight"}
    recorded.draw.engines.opened.clear()
    del recorded.engines["step"], recorded.engines["step_shallow"]
    del recorded.engines["vae_decoder"], recorded.engines["text_encoder"]
    start(recorded.draw, cache_interval=2)
    name = f"{CHANGED['unet']}.weight"
    base = recorded.draw.model.find("unet")
    for part in ("step", "step_shallow"):
        assert not np.array_equal(recorded.engines[part].weights[name], base[name])


def test_an_adapter_changes_what_the_shallow_step_computes(tmp_path):
    """Of the last residual block, which is all that it runs of the UNet's way up."""
    model, name = Model.open(find_model("pictogram")), "up_blocks.2.resnets.1.time_emb_proj"
    rows, columns = model.find("unet")[f"{name}.weight"].shape
    random, state = np.random.default_rng(0), {}
    for end, shape in (("A", (2, columns)), ("B", (rows, 2))):
        values = random.standard_normal(shape).astype(np.float32)
        state[f"unet.{name}.lora_{end}.weight"] = values
    save_file(state, tmp_path / "lora.safetensors")
    pipeline = Pipeline.load("pictogram", settings=BackendSettings(threads=1))
    plan = pipeline.plan(Request(prompt="a", seed=1, num_inference_steps=2, cache_interval=2))

    def latents(*loras):
        pipeline.set_loras(loras)
        return [progress.latents for progress in pipeline.denoise(plan)][-1]

    base, adapted = latents(), latents(tmp_path / "lora.safetensors")
    fresh = Pipeline.load("pictogram", settings=BackendSettings(threads=1))
    fresh.set_loras([tmp_path / "lora.safetensors"])
    expected = [progress.latents for progress in fresh.denoise(plan)][-1]
    assert not np.array_equal(base, adapted)
    np.testing.assert_array_equal(adapted, expected)
    np.testing.assert_array_equal(latents(), base)


def test_taking_an_adapter_off_restores_the_picture(lora):
    pipeline = Pipeline.load("pictogram", settings=BackendSettings(threads=1))
    options = {"seed": 1, "num_inference_steps": 1}
    before = pixels(pipeline("a", **options).images[0])
    pipeline.set_loras([lora])
    assert pixels(pipeline("a", **options).images[0]) != before
    with pytest.raises(ModelError):
        pipeline.set_loras([lora, lora.parent / "missing.safetensors"])
    adapted = pixels(pipeline("a", **options).images[0])
    assert adapted != before
    pipeline.set_loras([])
    assert pixels(pipeline("a", **options).images[0]) == before


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "euler_a"},
        {"cache_interval": 2, "num_inference_steps": 5},
        {"image": drawing(128, 128), "strength": 0.6, "sampler": "dpmpp_2m"},
        {"image": drawing(128, 128), "mask": Image.new("L", (128, 128), 255)},
        {"hires": Hires(scale=1.5), "height": 64, "width": 64},
        {"prompt": ["a", "b [c:d:0.5]"], "num_images_per_prompt": 2},
    ],
)
def test_a_run_can_be_driven_step_by_step(pipeline, options):
    """`start`, `step` and a step's inputs are all that a call of the pipeline does."""
    given = {"prompt": "a", "seed": 4, "num_inference_steps": STEPS} | options
    plan, latents, calls = pipeline.plan(Request(**given)), None, 0
    for run in plan.runs():
        state = pipeline.start(run, latents)
        steps = run.steps()
        for inputs in steps:
            rows = [array.shape[0] for array in inputs.per_step.values()]
            assert rows == [len(run.seeds)] * 4
            assert inputs.conditioning["guidance"].shape[1] == len(run.seeds)
            before, state = state, pipeline.step(state, inputs)
            assert before.registers is not state.registers
            calls += 1
        latents = state.latents
    assert calls == plan.calls
    images = pipeline.finish(plan, pipeline.decode(latents))
    expected = pipeline(**given).images
    assert [pixels(image) for image in images] == [pixels(image) for image in expected]


def test_rows_of_two_requests_may_share_a_call(pipeline):
    """Each row has its own matrix, timestep and guidance, whatever its sampler and its step."""
    requests = [
        {"prompt": "a red apple", "sampler": "ddim", "num_inference_steps": 6, "seed": 1},
        {"prompt": "a hat", "sampler": "euler_a", "num_inference_steps": 4, "guidance_scale": 3.0},
    ]
    plans = [pipeline.plan(Request(**{"seed": 2} | each)) for each in requests]
    alone = [[progress.latents for progress in pipeline.denoise(plan)] for plan in plans]
    states, steps = [pipeline.start(plan) for plan in plans], [plan.steps() for plan in plans]
    states[0] = pipeline.step(states[0], steps[0][0])  # one is a step ahead
    pair = [steps[0][1], steps[1][0]]
    merged = replace(
        pair[0],
        conditioning={
            name: np.concatenate([inputs.conditioning[name] for inputs in pair], axis=1)
            for name in pair[0].conditioning
        },
        per_step={
            name: np.concatenate([inputs.per_step[name] for inputs in pair])
            for name in pair[0].per_step
        },
    )
    both = replace(
        states[0],
        registers=np.concatenate([state.registers for state in states]),
        constant={
            name: np.concatenate([state.constant[name] for state in states])
            for name in states[0].constant
        },
        noise=iter([np.concatenate([next(state.noise) for state in states])]),
    )
    after = pipeline.step(both, merged)
    np.testing.assert_array_equal(after.latents[0], alone[0][1][0])
    np.testing.assert_array_equal(after.latents[1], alone[1][0][0])
