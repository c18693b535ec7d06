"""What is compared: each contender opens a model and gives a function for each part.

A part's function takes nothing, computes what `benchmarks.scenarios` says on the scenario's inputs,
and returns float32 numbers or the bytes of a picture. Libraries are imported where one is opened.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.scenarios import SEED, TIMESTEP, WHOLE, Scenario, arrays, engine_inputs
from engine.backends import BackendSettings
from engine.model import Model

Parts = Mapping[str, Callable[[], NDArray[Any]]]
PEAK_SIDE = 2000  # of the square matrices whose product is the machine's peak
REFERENCE = "latentrt, ONNX Runtime float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A way to run a model.

    open: makes it ready for a scenario on that many threads; raises whatever its library raises
    precision: what it computes in; settings: how it was set up, for the report
    quick: whether it is ready soon enough for the model that ships
    """

    open: Callable[[Scenario, int], Parts]
    precision: str
    settings: str
    quick: bool = True


def _ours(precision: str, backend: str, scenario: Scenario, threads: int) -> Parts:
    from runtime import Pipeline

    pipeline = Pipeline.load(
        scenario.model(),
        precision=precision,  # type: ignore[arg-type]
        settings=BackendSettings(backend=backend, threads=threads),
    )
    inputs = engine_inputs(scenario, pipeline.model)

    def whole() -> NDArray[Any]:
        pipeline.encoder = pipeline.encoder.forgetful()  # the text is encoded each time
        drawn = pipeline(scenario.prompt, sampler="ddim", **_wishes(scenario), seed=SEED)
        return np.asarray(drawn.images[0])

    return {
        "text": lambda: pipeline.engine("text_encoder").run(inputs["text_encoder"])[
            "last_hidden_state"
        ],
        "step": lambda: pipeline.engine("step").run(inputs["step"])["next_registers"][:, 0],
        "decode": lambda: pipeline.engine("vae_decoder").run(inputs["vae_decoder"])["pixels"],
        WHOLE: whole,
    }


def _wishes(scenario: Scenario) -> dict[str, Any]:
    return {
        "height": scenario.size,
        "width": scenario.size,
        "num_inference_steps": scenario.steps,
        "guidance_scale": scenario.guidance_scale,
    }


def _diffusers(precision: str, compiled: bool, scenario: Scenario, threads: int) -> Parts:
    import diffusers
    import torch

    torch.set_num_threads(threads)
    dtype = getattr(torch, precision)
    library: Any = diffusers  # it has no types
    pipe = library.StableDiffusionPipeline.from_pretrained(
        scenario.folder(), torch_dtype=dtype, safety_checker=None
    ).to(dtype)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    if compiled:
        import torch._inductor.config as inductor

        inductor.freezing = True
        pipe.unet = torch.compile(pipe.unet, fullgraph=True)
        pipe.vae.decode = torch.compile(pipe.vae.decode, fullgraph=True)
    return _parts(pipe, dtype, scenario)


def _optimum(kind: str, precision: str, scenario: Scenario, threads: int) -> Parts:
    import torch

    pipe: Any
    if kind == "openvino":
        from optimum.intel import OVStableDiffusionPipeline

        hints = {"float32": "f32", "bfloat16": "bf16"}
        config = {
            "INFERENCE_PRECISION_HINT": hints[precision],
            "INFERENCE_NUM_THREADS": str(threads),
            "PERFORMANCE_HINT": "LATENCY",
        }
        pipe = OVStableDiffusionPipeline.from_pretrained(
            scenario.folder(), export=True, compile=False, ov_config=config
        )
        pipe.reshape(
            batch_size=1, height=scenario.size, width=scenario.size, num_images_per_prompt=1
        )
        pipe.compile()
    else:
        import onnxruntime
        from optimum.onnxruntime import ORTStableDiffusionPipeline

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        pipe = ORTStableDiffusionPipeline.from_pretrained(
            scenario.folder(), export=True, session_options=options
        )
    return _parts(pipe, torch.float32, scenario)


def _parts(pipe: Any, dtype: Any, scenario: Scenario) -> Parts:
    """Return the parts of a pipeline of diffusers, or of one that looks like it."""
    import torch

    pipe.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {
        name: torch.from_numpy(array)
        for name, array in arrays(scenario, Model.open(scenario.model())).items()
    }
    x, context = given["latents"].to(dtype), given["context"].to(dtype)
    timestep, scale = torch.tensor(TIMESTEP), scenario.guidance_scale

    def text() -> NDArray[Any]:
        rows = [pipe.text_encoder(row)[0] for row in given["input_ids"].split(1)]  # as it does
        return _numpy(torch.cat(rows))

    def step() -> NDArray[Any]:
        out = pipe.unet(
            torch.cat([x, x]), timestep, encoder_hidden_states=context, return_dict=False
        )[0]
        uncond, cond = out.chunk(2)
        return _numpy(uncond + scale * (cond - uncond))

    def decode() -> NDArray[Any]:
        image = pipe.vae.decode(x / pipe.vae.config.scaling_factor, return_dict=False)[0]
        pictures = pipe.image_processor.postprocess(image, output_type="pil")
        return np.stack([np.asarray(picture) for picture in pictures])

    def whole() -> NDArray[Any]:
        noise = torch.Generator().manual_seed(SEED)
        return np.asarray(pipe(scenario.prompt, generator=noise, **_wishes(scenario)).images[0])

    parts = {"text": text, "step": step, "decode": decode, WHOLE: whole}
    return {name: torch.inference_mode()(function) for name, function in parts.items()}


def _numpy(tensor: Any) -> NDArray[Any]:
    array: NDArray[Any] = tensor.float().numpy()
    return array


def _peak(scenario: Scenario, threads: int) -> Parts:
    """Multiply matrices, in float32 by two libraries, and in bfloat16."""
    matrix = np.random.default_rng(SEED).random((PEAK_SIDE, PEAK_SIDE), np.float32)
    parts: dict[str, Callable[[], NDArray[Any]]] = {"float32": lambda: matrix @ matrix}
    try:
        import torch
    except ImportError:
        return parts
    torch.set_num_threads(threads)
    wide = torch.from_numpy(matrix)
    narrow = wide.bfloat16()
    return {
        **parts,
        "float32 of torch": lambda: (wide @ wide)[:1].numpy(),
        "bfloat16": lambda: (narrow @ narrow)[:1].float().numpy(),
    }


_EAGER = "channels_last, torch.inference_mode, attention by scaled_dot_product_attention"
_COMPILED = f"{_EAGER}, UNet and decoder by torch.compile(fullgraph=True), inductor's freezing"
_OPENVINO = "INFERENCE_PRECISION_HINT={}, PERFORMANCE_HINT=LATENCY, static shapes"

CONTENDERS: Mapping[str, Contender] = {
    REFERENCE: Contender(
        open=partial(_ours, "float32", "cpu"),
        precision="float32",
        settings='BackendSettings(backend="cpu")',
    ),
    **{
        f"latentrt, OpenVINO {precision}": Contender(
            open=partial(_ours, precision, "openvino"),
            precision=precision,
            settings=f'precision="{precision}", BackendSettings(backend="openvino")',
        )
        for precision in ("float32", "bfloat16")
    },
    **{
        f"diffusers, {way} {precision}": Contender(
            open=partial(_diffusers, precision, way == "torch.compile"),
            precision=precision,
            settings=_COMPILED if way == "torch.compile" else _EAGER,
            quick=way != "torch.compile",
        )
        for way in ("eager", "torch.compile")
        for precision in ("float32", "bfloat16")
    },
    **{
        f"optimum-intel, OpenVINO {precision}": Contender(
            open=partial(_optimum, "openvino", precision),
            precision=precision,
            settings=_OPENVINO.format(hint),
        )
        for precision, hint in (("float32", "f32"), ("bfloat16", "bf16"))
    },
    "optimum, ONNX Runtime float32": Contender(
        open=partial(_optimum, "onnxruntime", "float32"),
        precision="float32",
        settings="ORTStableDiffusionPipeline, the library's own session options",
    ),
}
# Measured in each round like the contenders: what the machine can do at that time.
PEAK = "the machine's peak"
MEASURED: Mapping[str, Contender] = {
    PEAK: Contender(open=_peak, precision="", settings=f"product of {PEAK_SIDE} x {PEAK_SIDE}"),
    **CONTENDERS,
}
