"""What a run asks of its parts beside what they always do: edges that join, other guidance.

Legend
    cond, uncond   the model's output with the text, and without it
    s, p           the scales of guidance and of perturbed attention
    w              what each group of the conditioning counts in the output, [uncond, cond]

Perturbed attention adds p (cond - perturbed) for groups of the same texts (arXiv:2403.17377,
equation 16), which stand before the texts' own. Projected guidance (arXiv:2410.02416) is given
cond's weights and those of cond - uncond apart; `engine.graphs.guidance` has its equations.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import RequestError
from engine.graphs.graph import Part
from engine.graphs.guidance import has_attention_to_perturb
from engine.graphs.steering import IP_BY_GROUPS
from engine.graphs.variants import Variant
from engine.model import Model
from runtime.conditioning.guidance import Guidance
from runtime.request import Request
from runtime.samplers import Program, is_cfg_pp
from runtime.samplers.noise_schedule import NoiseSchedule
from runtime.samplers.program import predict
from runtime.step_inputs import STEP_PARTS

__all__ = ["check_built", "fields_of_plan", "with_features", "with_kept_image"]

Array = NDArray[np.float32]
Conditioning = Mapping[str, Array]
WHOLE, SHALLOW = zip(*STEP_PARTS.values(), strict=True)
AUTOENCODERS: tuple[Part, ...] = ("vae_decoder", "vae_encoder")
# What perturbed groups have of the prompts.
BY_TEXT = ("context", "text_embeds", "time_ids", "shown", *IP_BY_GROUPS)
NO_THRESHOLD = float(np.finfo(np.float32).max)


def fields_of_plan(
    request: Request,
    model: Model,
    schedule: NoiseSchedule,
    guidance: Guidance,
    program: Program,
    conditioning: Sequence[Conditioning],
    prompts: int,
) -> dict[str, Any]:
    """Return the fields of a run's plan that differ from a plain one's.

    prompts: groups of the conditioning that guidance moves to, the last of each call
    Raises RequestError for what cannot be drawn together, or not with this model.
    """
    _check(request, model, program)
    _check_acts(request, guidance)
    tables: dict[str, NDArray[np.float64]] = {}
    is_guided = bool(request.apg) or program.unconditional is not None
    if request.apg:
        program, tables = _with_memory(program, request.apg, guidance, schedule)
        conditioning = _parted(conditioning, guidance, prompts)
    elif is_guided:
        tables = _no_projection(program)
        conditioning = _parted(conditioning, None, prompts)
    if program.unconditional is not None:
        registers = program.unconditional.shape[1]
        tables["directions"][:, :registers, 0] = program.unconditional
    if request.pag_scale:
        conditioning = _perturbed(conditioning, request, prompts)
    shallow = Variant(seamless=request.seamless or "", guided=is_guided)
    whole = replace(shallow, perturbed=bool(request.pag_scale))
    joined = Variant(seamless=request.seamless or "")
    variants = {
        **dict.fromkeys((*WHOLE, "step_shrunk"), whole),
        **dict.fromkeys(SHALLOW, shallow),
        **dict.fromkeys(AUTOENCODERS, joined),
    }
    return {
        "program": program,
        "conditioning": conditioning,
        "seamless": request.seamless,
        "shrunk_calls": int((request.deep_shrink or 0) * len(conditioning)),
        "tables": tables,
        "variants": {part: v for part, v in variants.items() if v != Variant()},
    }


def with_kept_image(tables: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """Return tables for runs that keep an image outside a mask, in two more registers.

    tables: of a run's calls, (N, ...) float64; what of them has r registers then has r + 2
    """
    more = {"recalled": ((0, 0), (0, 2)), "directions": ((0, 0), (0, 2), (0, 0))}
    return {
        name: np.pad(table, more[name]) if name in more else table for name, table in tables.items()
    }


def with_features(variants: Mapping[Part, Variant]) -> dict[Part, Variant]:
    """Return variants whose whole steps take the features of T2I-Adapters too."""
    more = {part: replace(variants.get(part, Variant()), adapted=True) for part in WHOLE}
    return {**variants, **more}


def check_built(request: Request, model: Model, backend: str) -> None:
    """Refuse what a backend, whose engines are built beforehand of plain graphs, does not draw.

    Raises RequestError.
    """
    if model.is_editing:
        raise RequestError(
            f"the backend {backend} runs no models that edit pictures yet; choose cuda, webgpu, "
            "cpu or openvino"
        )
    if request.regions:
        raise RequestError(
            f"the backend {backend} takes no regions yet: its engines are built for one weight a "
            "picture; leave them out, or draw with the backend cuda"
        )
    names = ("seamless", "pag_scale", "apg", "deep_shrink")
    asked = [name for name in names if getattr(request, name)]
    if request.sampler is not None and is_cfg_pp(request.sampler):
        asked.append(f"sampler {request.sampler}")
    if asked:
        raise RequestError(
            f"{asked[0]} came, and the backend {backend} draws with plain graphs alone; choose "
            "cuda, webgpu, cpu or openvino, or leave it out"
        )


def _check(request: Request, model: Model, program: Program) -> None:
    if request.seamless and request.controls:
        raise RequestError(
            "seamless and controls came together, and ControlNets see no edges joined; leave one "
            "of them out"
        )
    for name in ("controls", "image_prompts", "seamless", "hires"):
        if request.deep_shrink and getattr(request, name):
            raise RequestError(f"deep_shrink and {name} came together; leave one of them out")
    if request.deep_shrink and len(model.unet.block_out_channels) == 1:
        raise RequestError(
            f"the UNet of {model.path} has one level, and deep_shrink shrinks those below the "
            "first; leave it out"
        )
    if request.pag_scale and not has_attention_to_perturb(model.unet.tensor_shapes()):
        raise RequestError(
            f"pag_scale perturbs the attention of the UNet's middle, and that of {model.path} has "
            "none; leave it out"
        )
    if model.is_editing and program.unconditional is not None:
        raise RequestError(
            f"{model.path} edits, with three outputs to guide by, and CFG++ knows two; choose "
            "another sampler"
        )
    others = "apg" if request.apg else "CFG++"
    if model.unet.time_cond_proj_dim and (request.apg or program.unconditional is not None):
        raise RequestError(
            f"{model.path} is told its guidance and draws without an unconditional output, which "
            f"{others} needs; leave it out"
        )


def _check_acts(request: Request, guidance: Guidance) -> None:
    """Refuse what would change nothing in a run. Raises RequestError."""
    calls = len(guidance.scales)
    if request.apg and not any(map(guidance.negatives, range(calls))):
        raise RequestError(
            "apg projects what guides, and at this guidance scale nothing does; give "
            "guidance_scale above 1, or leave apg out"
        )
    if request.deep_shrink and int(request.deep_shrink * calls) < 1:
        raise RequestError(
            f"deep_shrink {request.deep_shrink} of {calls} calls shrinks none; "
            f"{math.ceil(1000 / calls) / 1000} is the least that shrinks one"
        )


def _with_memory(
    program: Program,
    apg: tuple[float, float, float],
    guidance: Guidance,
    schedule: NoiseSchedule,
) -> tuple[Program, dict[str, NDArray[np.float64]]]:
    """Add the register that remembers what guided the calls before, and say what calls are told."""
    eta, threshold, momentum = apg
    calls, registers, columns = program.matrices.shape
    matrices = np.zeros((calls, registers + 1, columns + 1))
    matrices[:, :-1, :registers] = program.matrices[:, :, :registers]
    matrices[:, :-1, -2:] = program.matrices[:, :, registers:]
    tables = _no_projection(replace(program, matrices=matrices))
    for call, scale in enumerate(guidance.scales):
        if not guidance.negatives(call):
            matrices[call, -1, registers] = 1  # nothing guides here
            continue
        sigma, alpha = program.noise_scales[call], program.signal_scales[call]
        x, out = np.eye(2)
        (of_x, of_out), _ = predict(schedule, sigma, x, out, alpha)
        strength = (scale - 1) / of_out
        tables["projection"][call] = of_x, of_out, eta, threshold or NO_THRESHOLD, strength
        tables["recalled"][call, registers] = momentum
        tables["directions"][call, registers, 1] = 1
    unconditional = program.unconditional
    if unconditional is not None:
        unconditional = np.pad(unconditional, ((0, 0), (0, 1)))
    return replace(program, matrices=matrices, unconditional=unconditional), tables


def _no_projection(program: Program) -> dict[str, NDArray[np.float64]]:
    """Return what calls are told where nothing is projected or added."""
    calls, registers, _ = program.matrices.shape
    projection = np.tile([0.0, 1.0, 1.0, NO_THRESHOLD, 0.0], (calls, 1))
    return {
        "projection": projection,
        "recalled": np.zeros((calls, registers)),
        "directions": np.zeros((calls, registers + 1, 2)),
    }


def _parted(
    conditioning: Sequence[Conditioning], guidance: Guidance | None, prompts: int
) -> list[Conditioning]:
    """Part the weights of each call: cond's, and those of what guides, which are 0 without any."""
    parted = list[Conditioning]()
    for number, call in enumerate(conditioning):
        weights, update = call["guidance"], np.zeros_like(call["guidance"])
        if guidance is not None and guidance.negatives(number):
            own = np.zeros_like(weights)
            own[-prompts:] = _shares(weights[-prompts:])
            scale = np.float32(guidance.scales[number] - 1)
            if scale:
                update = (weights - own) / scale
            weights = own
        parted.append({**call, "guidance": weights, "update": update})
    return parted


def _perturbed(
    conditioning: Sequence[Conditioning], request: Request, prompts: int
) -> list[Conditioning]:
    """Add groups of the prompts whose attention is perturbed, in the part that is guided."""
    start, stop = (int(end * len(conditioning)) for end in request.guidance_interval)
    scale, made = np.float32(request.pag_scale or 0), dict[int, Array]()

    def repeated(array: Array) -> Array:
        """Lay the prompts' groups before themselves; what is one array in several calls stays."""
        if id(array) not in made:
            negatives = len(array) - prompts
            made[id(array)] = np.concatenate([array, array[negatives:]])
        return made[id(array)]

    calls = list[Conditioning]()
    for number, call in enumerate(conditioning):
        groups, pictures = call["guidance"].shape[:2]
        if not start <= number < stop:
            calls.append({**call, "perturbed": np.zeros((groups, pictures), np.float32)})
            continue
        chosen = np.zeros((groups + prompts, pictures), np.float32)
        chosen[groups - prompts : groups] = 1
        given = {**call, "perturbed": chosen}
        given |= {name: repeated(call[name]) for name in BY_TEXT if name in call}
        weights, own = call["guidance"], call["guidance"][-prompts:]
        added = scale * _shares(own)
        given["guidance"] = np.concatenate([weights[:-prompts], -added, own + added])
        if "update" in call:
            update = call["update"]
            nothing = np.zeros_like(update[-prompts:])
            given["update"] = np.concatenate([update[:-prompts], nothing, update[-prompts:]])
        calls.append(given)
    return calls


def _shares(weights: Array) -> Array:
    """Return how much each prompt counts beside the others, 1 in all."""
    whole = weights.sum(0)
    return (weights / np.where(whole == 0, 1, whole)).astype(np.float32)
