"""The samplers' oracles: diffusers' schedulers, and direct forms of what diffusers lacks.

Both are run in float64 on one smooth nonlinear model, and give the latents after every call.
"""

import importlib
import sys
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from runtime.noise import TorchNoise
from runtime.samplers import Program, program
from runtime.samplers.noise_schedule import NoiseSchedule


def gauss(function, low, high, **_):
    """Stand in for scipy's quad: exact for the polynomials of LMS."""
    at, weights = np.polynomial.legendre.leggauss(8)
    values = [function(float(t)) for t in low + (high - low) * (at + 1) / 2]
    return (float(weights @ np.array(values, np.float64)) * float(high - low) / 2,)


@cache
def beta_quantile(share, alpha, beta):
    """Stand in for scipy's beta.ppf at alpha = beta: bisection on the hypergeometric series."""
    assert alpha == beta

    def lower(x):  # the integral of t^(a - 1) (1 - t)^(a - 1) up to x, at most 1/2
        term, total = 1.0, 1 / alpha
        for k in range(1, 60):
            term *= (k - alpha) * x / k
            total += term / (alpha + k)
        return x**alpha * total

    if share > 0.5:
        return 1 - beta_quantile(1 - share, alpha, beta)
    low, high, whole = 0.0, 0.5, 2 * lower(0.5)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if lower(middle) < share * whole else (low, middle)
    return high if share > 0 else 0.0


@cache
def scheduler_module(name):
    """Import the file of a sampler's scheduler, whose other libraries may be missing."""
    scipy = SimpleNamespace(
        stats=SimpleNamespace(beta=SimpleNamespace(ppf=beta_quantile)),
        integrate=SimpleNamespace(quad=gauss),
    )
    absent = {"scipy": scipy, "torchsde": SimpleNamespace()}
    with mock.patch.dict(sys.modules, absent):
        module = importlib.import_module(f"diffusers.schedulers.scheduling_{FILES[name]}")
    module.is_scipy_available = lambda: True
    module.scipy, module.integrate = scipy, scipy.integrate
    return module


FILES = {
    "ddpm": "ddpm",
    "ddim": "ddim",
    "plms": "pndm",
    "lcm": "lcm",
    "tcd": "tcd",
    "euler": "euler_discrete",
    "euler_a": "euler_ancestral_discrete",
    "heun": "heun_discrete",
    "dpm2": "k_dpm_2_discrete",
    "dpm2_a": "k_dpm_2_ancestral_discrete",
    "lms": "lms_discrete",
    "dpmpp_sde": "dpmsolver_sde",
    "dpmpp_2m": "dpmsolver_multistep",
    "dpmpp_2m_sde": "dpmsolver_multistep",
    "dpmpp_2s": "dpmsolver_singlestep",
    "deis": "deis_multistep",
    "unipc": "unipc_multistep",
    "edm_euler": "edm_euler",
}
SCHEDULERS = {  # what the pipelines are compared on
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}
CLASSES = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "plms": "PNDMScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2_a": "KDPM2AncestralDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "dpmpp_sde": "DPMSolverSDEScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "dpmpp_2s": "DPMSolverSinglestepScheduler",
    "deis": "DEISMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "edm_euler": "EDMEulerScheduler",
}
OPTIONS = {
    "plms": {"skip_prk_steps": True},
    "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"},
    "dpmpp_2s": {"lower_order_final": True},
}
TRAINED_TIMESTEPS = ("ddpm", "ddim", "plms", "lcm", "tcd")
WHOLE = (
    *("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_2s", "deis", "unipc"),
    *("comfyui_uni_pc", "comfyui_uni_pc_bh2"),
)
TWO_CALLS = ("heun", "dpm2", "dpm2_a", "dpmpp_sde", "dpmpp_2s_a")
# diffusers raises for these: the model's x0 is handed to it as the eps that it means
KNOWS_NO_SAMPLE = ("euler_a", "dpm2", "dpm2_a", "dpmpp_sde")
CURVES = ("karras", "exponential", "beta")  # that diffusers' schedulers have

SHAPE = (1, 4, 5, 6)  # 120 numbers: not a multiple of torch's 16
SEED = 1234
LATENTS = np.random.default_rng(5).normal(size=SHAPE)
CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def model(x, timestep):
    """Stand in for the UNet: smooth, nonlinear, different at every timestep."""
    return np.tanh(0.9 * x + np.sin(timestep / 150)) + 0.3 * np.cos(2 * x)


def start(run: Program, noise, latents=None):
    """Return what the first call sees: noise, or latents with as much noise as it is told."""
    if latents is None:
        return run.initial_noise * noise
    return run.signal_scales[0] * latents + run.noise_scales[0] * noise


def replay(run: Program, predict=model, latents=None, shape=SHAPE):
    """Run a program in float64: x at the start and after every call."""
    noise = TorchNoise(SEED)
    registers = np.zeros((run.matrices.shape[1], *shape))
    registers[0] = start(run, noise.normal(shape), latents)
    trajectory = [registers[0]]
    for k, matrix in enumerate(run.matrices):
        out = predict(run.input_scales[k] * registers[0], run.timesteps[k])
        fresh = noise.normal(shape) if run.needs_noise[k] else np.zeros(shape)
        registers = np.einsum("ij,j...->i...", matrix, np.stack([*registers, out, fresh]))
        trajectory.append(registers[0])
    return trajectory


@contextmanager
def float64_steps(name):
    """Let diffusers step in float64 on the float32 noise that it draws in a real run."""

    def draw(shape, generator, device, dtype):
        return torch.randn(shape, generator=generator).to(dtype)

    with mock.patch.object(scheduler_module(name), "randn_tensor", draw, create=True):
        yield


class WithoutFloat32:
    """torch or numpy, but that what is asked for in float32 is made in float64."""

    def __init__(self, module):
        self.module, self.float32 = module, module.float64

    def __getattr__(self, name):
        return getattr(self.module, name)


@contextmanager
def float64_tables(name):
    """Let diffusers' scheduler keep its betas, sigmas and timesteps in float64."""
    modules = {"torch": WithoutFloat32(torch), "np": WithoutFloat32(np)}
    with mock.patch.multiple(scheduler_module(name), **modules, create=True):
        yield


def published_curve(schedule, steps):
    """Return the N sigmas of a schedule that diffusers lacks, as its authors write them."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    signal = np.cumprod(1 - betas)
    table = np.sqrt((1 - signal) / signal)
    if schedule == "simple":
        return np.array([table[-(1 + int(k * (1000 / steps)))] for k in range(steps)])
    if schedule in ("sgm_uniform", "normal"):
        timesteps = np.linspace(999, 0, steps + (schedule == "sgm_uniform"))[:steps]
        low = np.floor(timesteps).astype(int)
        high, share = np.ceil(timesteps).astype(int), timesteps - low
        return np.exp((1 - share) * np.log(table[low]) + share * np.log(table[high]))
    if schedule == "kl_optimal":
        share = np.arange(steps) / max(steps - 1, 1)
        return np.tan(share * np.arctan(table[0]) + (1 - share) * np.arctan(table[-1]))
    if schedule == "a1111_kl_optimal":
        share = np.arange(steps + 1) / steps
        return np.tan(share * np.arctan(table[0]) + (1 - share) * np.arctan(table[-1]))
    levels = {  # nodes_align_your_steps.py of ComfyUI, sd_schedulers.py of Automatic1111
        "align_your_steps": "14.6146412293 6.4745760956 3.8636745985 2.6946151520 1.8841921177 "
        "1.3943805092 0.9642583904 0.6523686016 0.3977456272 0.1515232662 0.0291671582",
        "align_your_steps_xl": "14.6146412293 6.3184485287 3.7681790315 2.1811480769 1.3405244945 "
        "0.8620721141 0.5550693289 0.3798540708 0.2332364134 0.1114188177 0.0291671582",
        "a1111_align_your_steps": "14.615 6.475 3.861 2.697 1.886 1.396 0.963 0.652 0.399 0.152 "
        "0.029",
        "a1111_align_your_steps_xl": "14.615 6.315 3.771 2.181 1.342 0.862 0.555 0.380 0.234 0.113 "
        "0.029",
    }[schedule]
    logs = np.log([float(level) for level in levels.split()])[::-1]
    points = steps if schedule.startswith("a1111") else steps + 1
    spread = np.interp(np.linspace(0, 1, points), np.linspace(0, 1, 11), logs)
    return np.exp(spread[::-1])[:steps]


def make_scheduler(name, config, schedule=None):
    """Make diffusers' scheduler; a schedule that it lacks takes the place of one that it has."""
    if name in KNOWS_NO_SAMPLE and config.get("prediction_type") == "sample":
        config = {**config, "prediction_type": "epsilon"}
    config = {**config, **OPTIONS.get(name, {})}
    if name == "edm_euler":
        kept = {key: config[key] for key in ("prediction_type",) if key in config}
        cls = scheduler_module(name).EDMEulerScheduler
        return cls(**kept, sigma_schedule=schedule or "karras")
    stand_in = schedule
    if schedule and schedule not in CURVES:  # the one whose timesteps are rounded, or are not
        stand_in = "karras" if name in WHOLE else "exponential"
    if schedule:
        config[f"use_{stand_in}_sigmas"] = True
    cls = getattr(scheduler_module(name), CLASSES[name])
    set_timesteps = cls.set_timesteps

    def set_few(self, _, *rest):  # the constructor sets them all, in half a second
        set_timesteps(self, 2, *rest)

    with mock.patch.object(cls, "set_timesteps", set_few):
        scheduler = cls.from_config(config)
    if stand_in != schedule:

        def convert(in_sigmas, num_inference_steps=None):
            return published_curve(schedule, num_inference_steps or scheduler.num_inference_steps)

        setattr(scheduler, f"_convert_to_{stand_in}", convert)
    return scheduler


def reference(name, scheduler, steps, *, strength=None, predicts_x0=False, shipped=None, **options):
    """Run diffusers' scheduler as its pipelines do: timesteps, input scales, and the trajectory.

    shipped: timesteps to tell the model, in place of the scheduler's
    """
    generator = torch.Generator().manual_seed(SEED)
    scheduler.set_timesteps(steps)
    if shipped is not None:
        scheduler.timesteps = shipped
    noise = torch.randn(SHAPE, generator=generator).double()
    if strength is None:
        timesteps, x = scheduler.timesteps, noise * scheduler.init_noise_sigma
    else:
        timesteps, _ = StableDiffusionImg2ImgPipeline.get_timesteps(
            SimpleNamespace(scheduler=scheduler), steps, strength, "cpu"
        )
        x = scheduler.add_noise(torch.from_numpy(LATENTS), noise, timesteps[:1])
    if name == "lms":  # it would weigh slopes that were never computed as if they were
        first = len(scheduler.timesteps) - len(timesteps)
        scheduler.sigmas = scheduler.sigmas[first:]
        scheduler.set_begin_index(0)
    if name == "dpmpp_sde":
        scheduler.noise_sampler = lambda *_: torch.randn(SHAPE, generator=generator).double()
    draws = name in ("ddpm", "ddim", "lcm", "tcd", "euler_a", "dpm2_a", "dpmpp_2m_sde")
    if draws:
        options["generator"] = generator
    one = torch.ones((), dtype=torch.float64)
    scales, trajectory = [], [x.numpy()]
    for timestep in timesteps:
        scale = scheduler.scale_model_input(one, timestep).item()
        scaled = scheduler.scale_model_input(x, timestep)
        out = torch.from_numpy(model(scaled.double().numpy(), timestep.item()))
        if predicts_x0:
            sigma = np.sqrt(1 / scale**2 - 1)
            if name == "euler_a":  # whose table tells it exactly
                sigma = scheduler.sigmas[scheduler.step_index]
            if name == "dpm2_a":
                k, first = scheduler.step_index, scheduler.state_in_first_order
                sigma = scheduler.sigmas[k] if first else scheduler.sigmas_interpol[k - 1]
            out = (x - out) / sigma
        x = scheduler.step(out, timestep, x, **options).prev_sample
        scales.append(scale)
        trajectory.append(x.numpy())
    return timesteps.double().numpy(), scales, trajectory


def blended_levels(name, steps, schedule=None, strength=1.0, config=CONFIG):
    """Return the signal and noise (N + 1, 2) that diffusers' inpainting blends with at each call.

    As its pipeline does: first before the run, then after every step with the next timestep, and
    with nothing but signal at the end.
    """
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    scheduler = make_scheduler(name, config, schedule)
    scheduler.set_timesteps(steps)
    timesteps, _ = StableDiffusionImg2ImgPipeline.get_timesteps(
        SimpleNamespace(scheduler=scheduler), steps, strength, "cpu"
    )
    scheduler.noise_sampler = lambda *_: one
    levels = []
    for timestep in timesteps:
        at = torch.tensor([timestep])
        signal = scheduler.add_noise(one, 0 * one, at)
        levels.append([signal.item(), scheduler.add_noise(0 * one, one, at).item()])
        scheduler.scale_model_input(one, timestep)
        scheduler.step(one, timestep, one)
    return np.array([*levels, [1.0, 0.0]])


def direct(name, run: Program, sigmas, prediction="epsilon", latents=None):
    """Run what diffusers lacks, step by step as published: x at the end of every step.

    sigmas: (N + 1,), the last 0. Which timestep a sigma has, and how the run starts, is the
    program's; DPM++ 3M SDE holds x / sqrt(1 + sigma^2), the others x.
    """
    noise, told = TorchNoise(SEED), iter(run.timesteps)
    x = start(run, noise.normal(SHAPE), latents)
    if name in WHOLE:
        x = x * np.hypot(1, sigmas[0])
    trajectory, slopes, values = [x], [], []

    def denoise(x, sigma):
        out = model(x / np.hypot(1, sigma), next(told))
        if prediction == "sample":
            return out
        v = x / (1 + sigma**2) - sigma / np.hypot(1, sigma) * out
        return x - sigma * out if prediction == "epsilon" else v

    if name.startswith("comfyui"):
        variant = np.expm1 if name.endswith("bh2") else lambda h: h
        ends = np.append(sigmas[:-1], 0.001)
        predicted = [x, *comfyui_unipc(x, ends, denoise, variant)]
        return [x / np.hypot(1, s) for x, s in zip(predicted, sigmas, strict=True)]
    for k, (sigma, reached) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        up = reached * np.sqrt(1 - (reached / sigma) ** 2)
        down = np.sqrt(reached**2 - up**2)
        slopes = [(x - x0) / sigma, *slopes[:3]]
        values = [x0, *values[:2]]
        if name == "ipndm":
            weights = {1: [1], 2: [3, -1], 3: [23, -16, 5], 4: [55, -59, 37, -9]}[len(slopes)]
            mean = sum(w * slope for w, slope in zip(weights, slopes, strict=True)) / sum(weights)
            x = x + (reached - sigma) * mean
        elif name == "euler_a":
            x = x + (down - sigma) * slopes[0] + up * noise.normal(SHAPE)
        elif reached == 0:
            if name == "dpmpp_3m_sde":
                noise.normal(SHAPE)
            x = x0
        elif name == "dpmpp_2s_a":
            t, t_next = -np.log(sigma), -np.log(down)
            s = (t + t_next) / 2
            inner = np.exp(t - s) * x - np.expm1(t - s) * x0
            x = np.exp(t - t_next) * x - np.expm1(t - t_next) * denoise(inner, np.exp(-s))
            x = x + up * noise.normal(SHAPE)
        else:
            x = third_order_sde(sigmas[max(k - 2, 0) : k + 2], x, values, noise.normal(SHAPE))
        trajectory.append(x)
    if name == "dpmpp_3m_sde":
        return [x / np.hypot(1, s) for x, s in zip(trajectory, sigmas, strict=True)]
    return trajectory


def comfyui_unipc(x, sigmas, denoise, b_of):
    """Run ComfyUI's comfy/extra_samplers/uni_pc.py on x = x0 + sigma eps; yield x as predicted.

    Its `sample` with `lower_order_final`, and `multistep_uni_pc_bh_update` with x0 predicted.
    """
    lambdas, steps = -np.log(sigmas), len(sigmas) - 1
    most = max(1, min(3, len(sigmas) - 2))
    known, times = [denoise(x, sigmas[0])], [lambdas[0]]
    for step in range(1, steps + 1):
        order = step if step < most else min(most, steps + 1 - step)
        hh = -(lambdas[step] - times[-1])
        ratios = [(times[-1 - i] - times[-1]) / -hh for i in range(1, order)]
        slopes = [(known[-2 - i] - known[-1]) / r for i, r in enumerate(ratios)]
        rows = np.array([[r ** (i - 1) for r in (*ratios, 1.0)] for i in range(1, order + 1)])
        b, phi, factorial = [], np.expm1(hh) / hh - 1, 1
        for i in range(1, order + 1):
            b.append(phi * factorial / b_of(hh))
            factorial *= i + 1
            phi = phi / hh - 1 / factorial
        predictor = [0.5] if order == 2 else np.linalg.solve(rows[:-1, :-1], b[:-1])
        corrector = [0.5] if order == 1 else np.linalg.solve(rows, b)
        base = np.exp(hh) * x - np.expm1(hh) * known[-1]
        ahead = base - b_of(hh) * sum(w * s for w, s in zip(predictor, slopes, strict=True))
        yield ahead
        if step < steps:
            reached = denoise(ahead, sigmas[step])
            bends = [*slopes, reached - known[-1]]
            x = base - b_of(hh) * sum(w * s for w, s in zip(corrector, bends, strict=True))
            known, times = [*known, reached], [*times, lambdas[step]]


def third_order_sde(sigmas, x, values, fresh):
    """Step as k-diffusion's `sample_dpmpp_3m_sde` with eta = 1, in lambda; sigmas end at the next.

    Its second difference weighs half of what the polynomial through three values would give it.
    """
    lambdas = -np.log(sigmas)
    h = lambdas[-1] - lambdas[-2]
    e = np.exp(-2 * h)
    first = h - (1 - e) / 2  # the integral of 2 e^(-2 (h - u)) u du
    second = h**2 / 2 - first / 2  # the same of u^2 / 2
    moved = e * x + (1 - e) * values[0] + sigmas[-1] * np.sqrt(1 - e) * fresh
    if len(values) == 1:
        return moved
    before = lambdas[-2] - lambdas[-3]
    slope = (values[0] - values[1]) / before
    if len(values) == 3:
        earlier = lambdas[-3] - lambdas[-4]
        bend = (slope - (values[1] - values[2]) / earlier) / (before + earlier)
        slope = slope + before * bend
        moved = moved + second * bend
    return moved + first * slope


def sigmas_of(name, schedule, steps, config):
    """Return (N + 1,) sigmas that a method without a scheduler of its own should visit."""
    oracle = make_scheduler(table_of(name), config, schedule)
    oracle.set_timesteps(steps)
    return oracle.sigmas.double().numpy()


def table_of(name):
    """Name the sampler whose scheduler has the sigmas of a method that diffusers lacks."""
    return "dpmpp_2m" if name in WHOLE else "euler"


def largest_error(
    name, steps, schedule=None, *, strength=None, eta=0.0, config=CONFIG, tables="float32"
):
    """Compare a program with its oracle: timesteps, input scales, and the worst step's error.

    Args:
        tables: "float32", as diffusers ships them, or "float64", where only the timesteps that
            diffusers rounds, to whole numbers or to float32, are still those that it ships

    Returns:
        the largest |difference| / largest |x| over the steps; the program; the oracle's timesteps
        and input scales, None for a direct form
    """
    noise = NoiseSchedule.from_config(config)
    options = {"eta": eta} if name in ("ddim", "tcd") else {}
    run = program(name, noise, steps, schedule=schedule, strength=strength, **options)
    prediction = config.get("prediction_type", "epsilon")
    latents = None if strength is None else LATENTS
    actual = replay(run, latents=latents)
    own = name in CLASSES and not (name == "euler_a" and schedule)
    oracle = name if own else table_of(name)
    shipped = None
    if tables == "float64" and (name in WHOLE or not (schedule or name in TWO_CALLS)):
        rounded = make_scheduler(oracle, config, schedule)
        rounded.set_timesteps(steps)
        shipped = rounded.timesteps
    with float64_tables(oracle) if tables == "float64" else nullcontext(), float64_steps(oracle):
        if own:
            timesteps, scales, expected = reference(
                name,
                make_scheduler(name, config, schedule),
                steps,
                strength=strength,
                predicts_x0=name in KNOWS_NO_SAMPLE and prediction == "sample",
                shipped=shipped,
                **options,
            )
        else:
            timesteps = scales = None
            first = 0 if strength is None else steps - int(steps * strength)
            sigmas = sigmas_of(name, schedule, steps, config)[first:]
            expected = direct(name, run, sigmas, prediction, latents)
            if name in TWO_CALLS:  # the direct form shows no state between two calls
                actual = [*actual[::2], actual[-1]]
    assert len(actual) == len(expected)
    errors = [
        np.abs(x - other).max() / np.abs(other).max()
        for x, other in zip(actual, expected, strict=True)
    ]
    return max(errors), run, timesteps, scales
