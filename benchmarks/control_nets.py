"""ControlNets of random numbers beside a model that is measured, and the steps that they steer.

There are two of the model's own size, folders in diffusers' layout that are written once, and a
picture that both see. Diffusers encodes the picture in every step, the project once a picture, so
its time stands alone.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.diffusers_folder import write_control_net
from benchmarks.random_models import random_tensors
from benchmarks.scenarios import SEED, Parts, Scenario, engine_inputs
from engine.configs.control_net import control_net_of
from engine.model import Model
from engine.store.cache import cache_folder

if TYPE_CHECKING:
    from runtime import Pipeline
    from runtime.denoising.controls import CallControl

NETS = ("control-a", "control-b")
ONE, TWO, HINT = "one ControlNet", "two ControlNets", "hint"
COUNTS: Mapping[str, int] = {TWO: 2, ONE: 1}  # of the nets that steer a step
POOL = 2**24  # random numbers, of which each tensor takes some


def write_control_nets(scenario: Scenario) -> dict[str, Path]:
    """Write the nets for a scenario's model, unless they are there; returns their folders."""
    config = control_net_of(Model.open(scenario.model()).unet)
    place = cache_folder() / "benchmarks"
    folders = {name: place / f"{scenario.name}-{name}" for name in NETS}
    for seed, folder in enumerate(folders.values(), 1):
        if not (folder / "config.json").is_file():
            pool = np.random.default_rng(seed).standard_normal(POOL).astype(np.float32)
            write_control_net(config, random_tensors(config, pool), folder)
    return folders


def hint_picture(scenario: Scenario) -> NDArray[np.float32]:
    """Return the picture that the nets see, (1, 3, H, W) from 0 to 1."""
    return np.random.default_rng(SEED).random((1, 3, scenario.size, scenario.size), np.float32)


def own_parts(pipeline: "Pipeline", scenario: Scenario) -> Parts:
    """Return the steered steps of the project's own pipeline, and what a net makes of a picture.

    The nets are opened when a part first runs.
    """
    from runtime.denoising.controls import CallControl, ControlledSteps
    from runtime.step_inputs import StepInputs

    unet, step = pipeline.model.unet, engine_inputs(scenario, pipeline.model)["step"]
    call = StepInputs(
        conditioning={},
        per_step={},
        is_full=True,
        signal_scale=1.0,
        noise_scale=0.0,
        is_controlled=True,
    )

    @cache
    def steps() -> ControlledSteps:
        pipeline.set_controls(write_control_nets(scenario))
        return ControlledSteps(unet=unet, nets=pipeline.control_nets)

    def hint(net: str) -> NDArray[np.float32]:
        given = {"picture": hint_picture(scenario)}
        found: NDArray[np.float32] = steps().nets.engine(net, "control_hint").run(given)["hint"]
        return found

    @cache
    def controls() -> "list[CallControl]":
        residuals = sum(map(len, unet.residual_widths()))
        weights = np.ones((residuals, len(step["guidance"]), 1), np.float32)
        return [CallControl(net=net, hint=[hint(net)], weights=weights) for net in NETS]

    def steered(count: int) -> NDArray[Any]:
        added = steps().added(call, step, [controls()[:count]] * scenario.batch)
        return pipeline.engine("step_controlled").run({**step, **added})["next_registers"][:, 0]

    return {
        **{name: partial(steered, count) for name, count in COUNTS.items()},
        HINT: partial(hint, NETS[0]),
    }


def diffusers_residuals(
    scenario: Scenario, dtype: Any, device: str
) -> Callable[..., dict[str, Any]]:
    """Return what gives diffusers' UNet the residuals of its own ControlNets, by arguments.

    It takes how many nets steer, the rows of latents, the timestep, the texts, and other
    conditions by name. The nets are opened at the first call.
    """

    @cache
    def opened() -> tuple[list[Any], Any]:
        import diffusers
        import torch

        library: Any = diffusers  # it has no types
        read = library.ControlNetModel.from_pretrained
        nets = [read(path, torch_dtype=dtype) for path in write_control_nets(scenario).values()]
        nets = [net.to(device, memory_format=torch.channels_last) for net in nets]
        return nets, torch.from_numpy(hint_picture(scenario)).to(device, dtype)

    def residuals(
        count: int, rows: Any, timestep: Any, context: Any, **conditions: Any
    ) -> dict[str, Any]:
        import diffusers

        library: Any = diffusers
        nets, picture = opened()
        pictures, scales = [picture.repeat(len(rows), 1, 1, 1)] * count, [1.0] * count
        several = library.MultiControlNetModel(nets[:count])
        given = rows, timestep, context, pictures, scales
        down, middle = several(*given, return_dict=False, **conditions)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    return residuals
