"""How others run a model: each function opens a library's pipeline and gives its parts.

They take a scenario and a number of threads last, and raise whatever their library raises.
"""

import subprocess
import sys
from collections.abc import Callable
from functools import partial, partialmethod, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.control_nets import COUNTS, diffusers_residuals
from benchmarks.scenarios import (
    LONGER,
    LONGER_STEPS,
    QUEUED,
    SEED,
    STEPS,
    TIMESTEP,
    WHOLE,
    Parts,
    Scenario,
    arrays,
)
from engine.model import Model

# What diffusers' pipelines add to pictures, or look at in them, by `Family.pipelines`.
UNUSED: dict[str, dict[str, Any]] = {
    "StableDiffusion": {"safety_checker": None},
    "StableDiffusionXL": {"add_watermarker": False},
}


def diffusers_parts(precision: str, compiled: bool, scenario: Scenario, threads: int) -> Parts:
    """Open diffusers' own pipeline, eager or compiled."""
    import torch

    torch.set_num_threads(threads)
    dtype = getattr(torch, precision)
    pipe = open_pipeline(scenario, dtype)
    if compiled:
        import torch._inductor.config as inductor

        inductor.freezing = True
        pipe.unet = torch.compile(pipe.unet, fullgraph=True)
        pipe.vae.decode = torch.compile(pipe.vae.decode, fullgraph=True)
    return pipeline_parts(pipe, dtype, scenario)


def open_pipeline(scenario: Scenario, dtype: Any) -> Any:
    """Open diffusers' own pipeline of a scenario's model, channels last."""
    import diffusers
    import torch

    library: Any = diffusers  # it has no types
    name = Model.open(scenario.model()).family.pipelines[0]
    kind = getattr(library, f"{name}Pipeline")
    unused = UNUSED[name]
    pipe = kind.from_pretrained(scenario.folder(), torch_dtype=dtype, **unused).to(dtype)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    return pipe


def optimum_parts(kind: str, precision: str, scenario: Scenario, threads: int) -> Parts:
    """Open optimum's pipeline on OpenVINO or on ONNX Runtime."""
    import torch

    pipe: Any
    folder = _exported(kind, precision, scenario)
    if kind == "openvino":
        from optimum.intel import OVStableDiffusionPipeline

        config = {
            "INFERENCE_PRECISION_HINT": "f32" if precision == "float32" else "bf16",
            "INFERENCE_NUM_THREADS": str(threads),
            "PERFORMANCE_HINT": "LATENCY",
        }
        pipe = OVStableDiffusionPipeline.from_pretrained(folder, compile=False, ov_config=config)
        pipe.reshape(
            batch_size=1, height=scenario.size, width=scenario.size, num_images_per_prompt=1
        )
        if not scenario.is_guided:  # for which it reshapes the UNet whatever is asked for
            shapes = {given: given.get_partial_shape() for given in pipe.unet.model.inputs}
            for shape in (shape for shape in shapes.values() if len(shape) > 1):
                shape[0] = 1
            pipe.unet.model.reshape(shapes)
        pipe.compile()
    else:
        import onnxruntime
        from optimum.onnxruntime import ORTStableDiffusionPipeline

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        pipe = ORTStableDiffusionPipeline.from_pretrained(folder, session_options=options)
    return pipeline_parts(pipe, torch.float32, scenario)


def _exported(kind: str, precision: str, scenario: Scenario) -> Path:
    """Return the model as optimum saves it, converted once, in a process of its own.

    int8 is its hybrid quantization: weights of all layers, inputs of the UNet's convolutions.
    """
    source = scenario.folder()
    stored = "int8" if precision == "int8" else "float32"
    folder = source.with_name(f"{source.name}-{kind}-{stored}")
    if not folder.is_dir():
        temporary = folder.with_suffix(".part")
        code = (
            "import sys; from benchmarks.peers import export_by_optimum; "
            "export_by_optimum(*sys.argv[1:])"
        )
        command = [sys.executable, "-c", code, kind, stored, scenario.prompt]
        subprocess.run([*command, str(source), str(temporary)], check=True, stdout=sys.stderr)
        temporary.rename(folder)
    return folder


def export_by_optimum(kind: str, stored: str, prompt: str, source: str, target: str) -> None:
    """Convert a folder in diffusers' layout, as optimum's documentation says."""
    pipe: Any
    if kind == "openvino":
        from optimum.intel import OVStableDiffusionPipeline, OVWeightQuantizationConfig

        quantization = None
        if stored == "int8":  # it draws the prompt first, in no fewer steps than by default
            draw: Any = OVStableDiffusionPipeline.__call__
            OVStableDiffusionPipeline.__call__ = partialmethod(draw, num_inference_steps=4)
            quantization = OVWeightQuantizationConfig(
                bits=8, quant_method="hybrid", dataset=[prompt], num_samples=4
            )
        _describe_tiny_autoencoders()
        pipe = OVStableDiffusionPipeline.from_pretrained(
            source,
            export=True,
            compile=False,
            load_in_8bit=False,
            quantization_config=quantization,
        )
    else:
        from optimum.onnxruntime import ORTStableDiffusionPipeline

        pipe = ORTStableDiffusionPipeline.from_pretrained(source, export=True)
    pipe.save_pretrained(target)


def _describe_tiny_autoencoders() -> None:
    """Let tiny autoencoders answer as optimum's exporter asks every one.

    That is with a distribution of what they encode, latents called z, and levels by the names of
    their blocks.
    """
    from diffusers import AutoencoderTiny

    library: Any = AutoencoderTiny
    encode, decode, init = library.encode, library.decode, library.__init__

    def as_distribution(self: Any, x: Any) -> dict[str, Any]:
        return {"latent_dist": SimpleNamespace(parameters=encode(self, x).latents)}

    def decoded(self: Any, z: Any, **options: Any) -> Any:
        return decode(self, z, **options)

    @wraps(init)  # whose arguments are those of a configuration
    def with_levels(self: Any, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        levels = len(self.config.decoder_block_out_channels)
        self.register_to_config(
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
        )

    library.encode, library.decode, library.__init__ = as_distribution, decoded, with_levels


def cpp_parts(scenario: Scenario, threads: int) -> Parts:
    """Open stable-diffusion.cpp, which draws whole requests and shows no part of one."""
    from stable_diffusion_cpp import StableDiffusion

    library = StableDiffusion(
        model_path=str(scenario.model()),
        n_threads=threads,
        wtype="f32",
        rng_type="cpu",
        diffusion_flash_attn=True,
        vae_decode_only=True,
        verbose=False,
    )

    def whole() -> NDArray[Any]:
        drawn = library.generate_image(
            prompt=scenario.prompt,
            width=scenario.size,
            height=scenario.size,
            cfg_scale=scenario.guidance_scale,
            sample_method="ddim_trailing",
            sample_steps=scenario.steps,
            seed=SEED,
        )
        return np.asarray(drawn[0].convert("RGB"))

    return {WHOLE: whole}


def pipeline_parts(pipe: Any, dtype: Any, scenario: Scenario, device: str = "cpu") -> Parts:
    """Return the parts of a pipeline of diffusers, or of one that looks like it.

    They hand out arrays of the processor, so a device has done its work then.
    """
    import torch

    pipe.set_progress_bar_config(disable=True)
    model = Model.open(scenario.model())
    given: dict[str, Any] = {
        name: torch.from_numpy(array).to(device) for name, array in arrays(scenario, model).items()
    }

    def groups(name: str) -> Any:
        return given[name].to(dtype).repeat_interleave(scenario.batch, 0)

    x, context, conditions = given["latents"].to(dtype), groups("context"), {}
    if model.unet.extra_inputs:
        added = {name: groups(name) for name in model.unet.extra_inputs}
        conditions = {"added_cond_kwargs": added}
    timestep, scale = torch.tensor(TIMESTEP, device=device), scenario.guidance_scale
    rows = torch.cat([x, x]) if scenario.is_guided else x
    residuals = diffusers_residuals(scenario, dtype, device)

    def text() -> NDArray[Any]:
        context = model.family.context
        states = [_states(pipe, name, given, context) for name in model.text_encoders]
        return _numpy(torch.cat(states, -1))

    def guided(**added: Any) -> Any:
        texts = {"encoder_hidden_states": context, **conditions}
        out = pipe.unet(rows, timestep, return_dict=False, **texts, **added)[0]
        if not scenario.is_guided:
            return out
        uncond, cond = out.chunk(2)
        return uncond + scale * (cond - uncond)

    def steered(count: int) -> NDArray[Any]:
        return _numpy(guided(**residuals(count, rows, timestep, context, **conditions)))

    def steps() -> NDArray[Any]:
        for _ in range(QUEUED):
            out = guided()
        return _numpy(out)

    def decode() -> NDArray[Any]:
        image = pipe.vae.decode(x / pipe.vae.config.scaling_factor, return_dict=False)[0]
        images = pipe.image_processor.postprocess(image, output_type="pil")
        return np.stack([np.asarray(image) for image in images])

    def whole(**options: Any) -> NDArray[Any]:
        noise = [torch.Generator().manual_seed(SEED + i) for i in range(scenario.batch)]
        options = {**scenario.options(), **options}
        drawn = pipe(scenario.prompt, generator=noise if noise[1:] else noise[0], **options)
        return np.stack([np.asarray(image) for image in drawn.images])

    parts: dict[str, Callable[[], NDArray[Any]]] = {
        "text": text,
        "step": lambda: _numpy(guided()),
        "decode": decode,
        **{
            name: partial(whole, num_inference_steps=steps)
            for name, steps in scenario.wholes.items()
        },
        **{name: partial(steered, count) for name, count in COUNTS.items()},
        STEPS: steps,
        LONGER: lambda: whole(num_inference_steps=LONGER_STEPS),
    }
    return {name: torch.inference_mode()(function) for name, function in parts.items()}


def _states(pipe: Any, name: str, given: dict[str, Any], context: str) -> Any:
    """Encode row by row, as diffusers does: what the UNet is told, (2, n, D)."""
    import torch

    encoder = getattr(pipe, name)
    rows = given[name.replace("text_encoder", "input_ids")].split(1)
    if context == "penultimate_hidden_state":
        return torch.cat(
            [encoder(row, output_hidden_states=True).hidden_states[-2] for row in rows]
        )
    return torch.cat([encoder(row)[0] for row in rows])


def _numpy(tensor: Any) -> NDArray[Any]:
    array: NDArray[Any] = tensor.float().cpu().numpy()
    return array
