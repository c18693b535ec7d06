import gc

import numpy as np
import pytest
import tensorrt_rtx_bindings

from engine.backends.onnxruntime.cpu import OnnxRuntimeEngine
from engine.backends.tensorrt.engine import TensorRTEngine
from engine.errors import BackendError
from engine.graphs.graph import find_graph, graph_folders
from engine.model import Model, find_model
from tests.support.fake_cuda import FakeDevice
from tests.support.fake_tensorrt import FakeTensorRT

MODEL = Model.open(find_model("pictogram"))
PARTS = ("text_encoder", "preview_decoder", "step")
GRAPHS = {
    part: find_graph(part, MODEL.config(part), "float32", graph_folders(), MODEL.path)
    for part in PARTS
}
WEIGHTS = {part: dict(MODEL.weights(part)) for part in PARTS}
TOKENS = MODEL.config("text_encoder").max_position_embeddings
BIAS = "decoder.layers.0.bias"
LATENTS = {"latents": ((1, 8, 8, 8), (1, 8, 8, 8), (2, 8, 16, 16))}


def step_profile(most_registers=4):
    context, tokens = MODEL.unet.cross_attention_dim, TOKENS
    limits = {
        "registers": ((1, 1, 8, 8, 8), (1, most_registers, 8, 16, 16)),
        "matrices": ((1, 1, 3), (1, most_registers, most_registers + 2)),
        "timestep": ((1,), (1,)),
        "input_scale": ((1,), (1,)),
        "context": ((1, 1, tokens, context), (2, 1, tokens, context)),
        "guidance": ((1, 1, 1, 1, 1), (2, 1, 1, 1, 1)),
        "guidance_rescale": ((1,), (1,)),
        "noise": ((1, 8, 8, 8), (1, 8, 16, 16)),
        "mask": ((1, 1, 8, 8), (1, 1, 16, 16)),
        "outside": ((1, 3), (1, most_registers + 2)),
    }
    return {name: (least, least, most) for name, (least, most) in limits.items()}


def step_inputs():
    random = np.random.default_rng(0)
    profile = step_profile()
    inputs = {
        name: random.standard_normal(least).astype(np.float32)
        for name, (least, _, _) in profile.items()
    }
    inputs["timestep"][:] = 500
    inputs["mask"][:] = 1
    return inputs


@pytest.fixture
def device():
    return FakeDevice()


@pytest.fixture
def library(device):
    return FakeTensorRT(device)


def write_decoder(library, folder, profiles=(LATENTS,), **settings):
    part = "preview_decoder"
    return library.write_plan(
        folder / "decoder.engine", GRAPHS[part], WEIGHTS[part], profiles, **settings
    )


def open_decoder(library, plan, **settings):
    return TensorRTEngine(library, plan, GRAPHS["preview_decoder"], library.device, **settings)


def latents(*shape, seed=0):
    return {"latents": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}


def expected(part, inputs, weights=None):
    return OnnxRuntimeEngine(GRAPHS[part], weights or WEIGHTS[part], 1).run(inputs)


def assert_same(made, reference):
    assert made.keys() == reference.keys()
    for name, array in reference.items():
        np.testing.assert_array_equal(made[name], array, err_msg=name)


def changed_bias(amount):
    return WEIGHTS["preview_decoder"] | {
        BIAS: WEIGHTS["preview_decoder"][BIAS] + np.float32(amount)
    }


def test_a_run_from_the_processor_is_that_of_the_graph(library, device, tmp_path):
    width = MODEL.config("text_encoder").hidden_size
    ids = np.arange(TOKENS, dtype=np.int64)[None]
    inputs = {"input_ids": ids, "extra_embeddings": np.zeros((1, width), np.float32)}
    profile = {name: (array.shape,) * 3 for name, array in inputs.items()}
    graph, weights = GRAPHS["text_encoder"], WEIGHTS["text_encoder"]
    plan = library.write_plan(tmp_path / "text.engine", graph, weights, [profile])

    engine = TensorRTEngine(library, plan, graph, device)

    assert_same(engine.run(inputs), expected("text_encoder", inputs))


def test_an_input_may_be_on_the_device_already(library, device, tmp_path):
    engine = open_decoder(library, write_decoder(library, tmp_path))
    inputs = latents(1, 8, 8, 8)
    placed = device.empty((1, 8, 8, 8), np.dtype(np.float32))
    device.upload(inputs["latents"], placed)

    assert_same(engine.run({"latents": placed}), expected("preview_decoder", inputs))


def test_steps_are_queued_recorded_and_done_again(library, device, tmp_path):
    graph = GRAPHS["step"]
    plan = library.write_plan(tmp_path / "step.engine", graph, WEIGHTS["step"], [step_profile()])
    engine = TensorRTEngine(library, plan, graph, device)
    inputs = step_inputs()
    reference = dict(inputs)
    for _ in range(3):
        made = expected("step", reference)
        reference["registers"] = made["next_registers"]
    placed = {name: device.empty(array.shape, array.dtype) for name, array in inputs.items()}
    outputs = engine.prepare({name: array.shape for name, array in inputs.items()})
    other = device.empty(inputs["registers"].shape, np.dtype(np.float32))
    engine.enqueue(placed, outputs)  # TensorRT-RTX compiles at the first run
    device.wait()
    device.counts.clear()

    def three_steps():
        source = placed["registers"]
        for target in (outputs["next_registers"], other, outputs["next_registers"]):
            engine.enqueue(placed | {"registers": source}, outputs | {"next_registers": target})
            source = target

    replay = device.record(three_steps)
    assert device.counts == {"record": 1}
    for _ in range(2):  # the second from what the first left of its memory
        for name, array in inputs.items():
            device.upload(array, placed[name])
        replay()
        result = device.download(outputs["next_registers"])
        np.testing.assert_array_equal(result, reference["registers"])
    assert device.counts["wait"] == 0
    assert device.counts["run"] == 6


def test_rows_of_a_table_are_taken_wherever_they_begin(library, device, tmp_path):
    graph = GRAPHS["step"]
    plan = library.write_plan(tmp_path / "step.engine", graph, WEIGHTS["step"], [step_profile()])
    engine = TensorRTEngine(library, plan, graph, device)
    inputs = step_inputs()
    placed = {name: device.empty(array.shape, array.dtype) for name, array in inputs.items()}
    for name, array in inputs.items():
        device.upload(array, placed[name])
    table = device.empty((5, 1), np.dtype(np.float32))
    device.upload(np.arange(5, dtype=np.float32)[:, None] * 100, table)
    outputs = engine.prepare({name: array.shape for name, array in inputs.items()})

    engine.enqueue(placed | {"timestep": table[3]}, outputs)

    wanted = expected("step", inputs | {"timestep": np.float32([300])})
    np.testing.assert_array_equal(
        device.download(outputs["next_registers"]), wanted["next_registers"]
    )


def test_the_narrowest_profile_is_chosen(library, tmp_path):
    narrow = {"latents": ((1, 8, 8, 8),) * 3}
    engine = open_decoder(library, write_decoder(library, tmp_path, [LATENTS, narrow]))
    profile = engine._loaded.fitting_profile
    assert profile({"latents": (1, 8, 8, 8)}) == 1
    assert profile({"latents": (2, 8, 16, 8)}) == 0
    for shape in ((1, 8, 8, 8), (2, 8, 16, 8)):
        inputs = latents(*shape)
        assert_same(engine.run(inputs), expected("preview_decoder", inputs))


@pytest.mark.parametrize("shape", [(3, 8, 8, 8), (1, 8, 8, 24), (1, 8, 4, 8), (1, 8, 8)])
def test_a_shape_outside_the_profiles_is_refused_with_what_they_allow(library, tmp_path, shape):
    engine = open_decoder(library, write_decoder(library, tmp_path))
    with pytest.raises(BackendError) as refused:
        engine.prepare({"latents": shape})
    message = str(refused.value)
    assert "(1, 8, 8, 8) to (2, 8, 16, 16)" in message
    assert str(shape) in message


def test_what_was_recorded_stays_good_when_other_shapes_are_prepared(library, device, tmp_path):
    engine = open_decoder(library, write_decoder(library, tmp_path))
    inputs = latents(1, 8, 8, 8)
    placed = {"latents": device.empty((1, 8, 8, 8), np.dtype(np.float32))}
    outputs = engine.prepare({"latents": (1, 8, 8, 8)})
    engine.enqueue(placed, outputs)
    replay = device.record(lambda: engine.enqueue(placed, outputs))

    larger = latents(2, 8, 16, 16)  # its activations need a larger piece of the shared memory
    assert_same(engine.run(larger), expected("preview_decoder", larger))
    device.upload(inputs["latents"], placed["latents"])
    replay()

    reference = expected("preview_decoder", inputs)
    np.testing.assert_array_equal(device.download(outputs["pixels"]), reference["pixels"])


def test_all_engines_work_in_the_same_memory(library, device, tmp_path):
    first = open_decoder(library, write_decoder(library, tmp_path))
    graph = GRAPHS["step"]
    plan = library.write_plan(tmp_path / "step.engine", graph, WEIGHTS["step"], [step_profile()])
    second = TensorRTEngine(library, plan, graph, device)
    small, inputs = latents(1, 8, 8, 8), step_inputs()
    for _ in range(2):  # the step's needs are larger, so the decoder's address has changed
        assert_same(first.run(small), expected("preview_decoder", small))
        assert_same(second.run(inputs), expected("step", inputs))
    needs = max(
        context.activations for engine in (first, second) for context in engine._ready.values()
    )
    assert device.scratch(1).nbytes == needs


def test_pipelines_share_weights_until_one_changes_its_own(library, device, tmp_path):
    plan = write_decoder(library, tmp_path)
    first, second = open_decoder(library, plan), open_decoder(library, plan)
    assert device.counts["load"] == 1
    inputs = latents(1, 8, 8, 8)
    reference = expected("preview_decoder", inputs)
    first.run(inputs)

    weights = changed_bias(0.3)
    first.rebind(weights, {BIAS})

    assert device.counts["load"] == 2
    adapted = expected("preview_decoder", inputs, weights)
    assert (adapted["pixels"] != reference["pixels"]).any()
    assert_same(first.run(inputs), adapted)
    assert_same(second.run(inputs), reference)
    first.rebind(WEIGHTS["preview_decoder"], {BIAS})
    assert device.counts["load"] == 2  # now alone, in place
    assert_same(first.run(inputs), reference)


def test_a_changed_engine_is_not_shared_with_the_next(library, device, tmp_path):
    plan, inputs = write_decoder(library, tmp_path), latents(1, 8, 8, 8)
    first = open_decoder(library, plan)
    first.rebind(changed_bias(0.3), {BIAS})
    assert device.counts["load"] == 1

    second = open_decoder(library, plan)

    assert device.counts["load"] == 2
    assert_same(second.run(inputs), expected("preview_decoder", inputs))


def test_prepared_shapes_survive_a_change_of_weights(library, device, tmp_path):
    plan, inputs = write_decoder(library, tmp_path), latents(1, 8, 8, 8)
    first, _second = open_decoder(library, plan), open_decoder(library, plan)
    placed = {"latents": device.empty((1, 8, 8, 8), np.dtype(np.float32))}
    device.upload(inputs["latents"], placed["latents"])
    outputs = first.prepare({"latents": (1, 8, 8, 8)})
    first.enqueue(placed, outputs)  # the weights are not to change under it
    weights = changed_bias(0.3)

    first.rebind(weights, {BIAS})

    assert device.counts["wait"] == 1
    before = expected("preview_decoder", inputs)
    np.testing.assert_array_equal(device.download(outputs["pixels"]), before["pixels"])
    first.enqueue(placed, outputs)
    after = expected("preview_decoder", inputs, weights)
    np.testing.assert_array_equal(device.download(outputs["pixels"]), after["pixels"])


def test_weights_that_were_merged_are_handed_over_together(device, tmp_path):
    other = next(name for name in WEIGHTS["preview_decoder"] if name != BIAS)
    library = FakeTensorRT(device, merged=[BIAS, other])
    engine = open_decoder(library, write_decoder(library, tmp_path))
    inputs, weights = latents(1, 8, 8, 8), changed_bias(0.3)

    # In another precision, so that what is handed over is nobody else's.
    engine.rebind(weights | {BIAS: weights[BIAS].astype(np.float64)}, {BIAS})

    assert_same(engine.run(inputs), expected("preview_decoder", inputs, weights))


def test_constant_weights_are_not_changed(library, device, tmp_path):
    engine = open_decoder(library, write_decoder(library, tmp_path, refit=False))
    with pytest.raises(BackendError, match="--refit"):
        engine.rebind(changed_bias(0.3), {BIAS})
    del engine
    library = FakeTensorRT(device, constants=[BIAS])
    engine = open_decoder(library, write_decoder(library, tmp_path))
    with pytest.raises(BackendError, match=rf"{BIAS}.*is a constant"):
        engine.rebind(changed_bias(0.3), {BIAS})


def test_a_refit_that_fails_is_an_error_and_the_base_can_be_bound_again(
    library, tmp_path, monkeypatch
):
    engine = open_decoder(library, write_decoder(library, tmp_path))
    inputs = latents(1, 8, 8, 8)
    monkeypatch.setattr(library, "merged", frozenset({BIAS, "unknown"}))
    with pytest.raises(BackendError, match="could not change the weights"):
        engine.rebind(changed_bias(0.3), {BIAS})
    monkeypatch.setattr(library, "merged", frozenset())
    engine.rebind(WEIGHTS["preview_decoder"], {BIAS})
    assert_same(engine.run(inputs), expected("preview_decoder", inputs))


@pytest.mark.parametrize("content", [b"", b"half an eng", None])
def test_a_damaged_or_foreign_file_is_one_error(library, tmp_path, content):
    plan = tmp_path / "decoder.engine"
    if content is not None:
        plan.write_bytes(content)
    with pytest.raises(BackendError, match=r"decoder\.engine.*build.*again"):
        open_decoder(library, plan)


def test_the_library_s_own_words_are_in_the_error(library, tmp_path):
    plan = tmp_path / "decoder.engine"
    plan.write_bytes(b"of another version")
    with pytest.raises(BackendError, match="magic tag does not match"):
        open_decoder(library, plan)


def test_the_last_engine_frees_the_weights(library, device, tmp_path):
    plan = write_decoder(library, tmp_path)
    before = device.allocated
    engines = [open_decoder(library, plan), open_decoder(library, plan)]
    held = device.allocated
    assert held > before
    engines.pop()
    gc.collect()
    assert device.allocated == held
    engines.pop()
    gc.collect()
    assert device.allocated == before


def test_what_the_device_compiled_is_kept_for_the_next_process(device, tmp_path):
    kernels, inputs = tmp_path / "kernels", latents(1, 8, 8, 8)
    compiled = []
    for content in (None, None, b"damaged"):
        if content:
            kernels.write_bytes(content)
        library = FakeTensorRT(device)
        plan = write_decoder(library, tmp_path)
        device.counts.clear()
        open_decoder(library, plan, kernels=kernels).run(inputs)
        compiled.append(device.counts["compile"])
        gc.collect()
    assert compiled == [1, 0, 1]


def test_kernels_are_written_only_when_there_may_be_new_ones(library, tmp_path):
    kernels = tmp_path / "kernels"
    engine = open_decoder(library, write_decoder(library, tmp_path), kernels=kernels)
    engine.run(latents(1, 8, 8, 8))
    kernels.unlink()
    engine.run(latents(1, 8, 8, 8, seed=1))
    assert not kernels.exists()
    engine.run(latents(1, 8, 16, 8))
    assert kernels.exists()


def test_tensorrt_compiles_nothing_on_the_device(device, tmp_path):
    library = FakeTensorRT(device, rtx=False)
    kernels, inputs = tmp_path / "kernels", latents(1, 8, 8, 8)
    engine = open_decoder(library, write_decoder(library, tmp_path), kernels=kernels)
    assert_same(engine.run(inputs), expected("preview_decoder", inputs))
    assert not kernels.exists()
    assert device.counts["compile"] == 0


def test_a_device_without_enough_memory_says_what_is_missing_and_goes_on(tmp_path):
    device = FakeDevice(total=3 * 2**20)
    library = FakeTensorRT(device)
    large = {"latents": ((1, 8, 8, 8), (1, 8, 8, 8), (2, 8, 128, 128))}
    engine = open_decoder(library, write_decoder(library, tmp_path, [large]))
    with pytest.raises(BackendError, match="are missing"):
        engine.run(latents(2, 8, 128, 128))
    inputs = latents(1, 8, 8, 8)
    assert_same(engine.run(inputs), expected("preview_decoder", inputs))


def test_doubles_refuse_what_the_library_does_not_take(library, device, tmp_path):
    engine = open_decoder(library, write_decoder(library, tmp_path))
    engine.prepare({"latents": (1, 8, 8, 8)})
    (context,) = (found.context for found in engine._ready.values())
    with pytest.raises(TypeError, match="set_input_shape"):
        context.set_input_shape("latents", "1x4x8x8")
    with pytest.raises(TypeError, match="set_device_memory"):
        context.set_device_memory(0)
    with pytest.raises(AttributeError):
        context.enqueue_v3(1)
    with pytest.raises(TypeError, match="Runtime"):
        library.Runtime("a logger")


def test_the_real_library_says_why_it_cannot_load_a_file(device, tmp_path):
    plan = tmp_path / "decoder.engine"
    plan.write_bytes(b"no engine" * 100)
    with pytest.raises(BackendError, match=r"TensorRT cannot load it: decoder\.engine \(.+\)"):
        TensorRTEngine(tensorrt_rtx_bindings, plan, GRAPHS["preview_decoder"], device)
