"""A request becomes a plan: everything that is known before the first step.

What the request leaves open is filled in from its preset, then from what the model's authors
recommend, then from the defaults here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.graphs.graph import Part
from engine.graphs.variants import Variant
from engine.model import Model
from runtime.checks import check_number
from runtime.conditioning.encoder import Encoder, Texts
from runtime.conditioning.guidance import Guidance
from runtime.control import Control, StepControl
from runtime.editing import check_editing, edited_calls
from runtime.framing import frame_of
from runtime.image_prompt import ImagePrompt, attention_maps, with_image_prompts
from runtime.images.canvas import BLUR, latent_mask
from runtime.images.files import SourceType
from runtime.images.frame import Frame
from runtime.images.image_noise import ImageNoise
from runtime.picture_settings import picture_settings, unheard_notes
from runtime.presets import preset, variant_sampler
from runtime.regions import shares_of, with_regions
from runtime.request import Request
from runtime.samplers import CFG_PP_SCALE, DEFAULT_SAMPLER, Program, is_cfg_pp, program, resolve
from runtime.samplers.noise_schedule import NoiseSchedule
from runtime.step_inputs import STEP_PARTS, StepInputs, StepPart, rows_of_calls
from runtime.variants import fields_of_plan, with_kept_image

__all__ = ["Plan", "StepInputs", "make_plan"]

Array = NDArray[np.float32]

PER_STEP = ("matrices", "outside", "timestep", "input_scale")
STEPS, GUIDANCE_SCALE = 20, 5.0
A1111_STEPS = "a1111_align_your_steps"
STRENGTH, PAINTED_STRENGTH = 0.8, 1.0  # of image-to-image, and of what is painted anew


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """One run of the loop, and the run that follows it.

    conditioning: of each call of the UNet, as `runtime.conditioning.encoder` gives it
    cache_interval: at every so many calls at least, the UNet runs whole
    variation_seeds: whose noise is mixed into that of the seeds, by variation_strength
    noise: whose random numbers the seeds mean; height, width: in pixels
    frame: how the request's image lies in that size, and the way back
    image: RGB of that size, what the run starts from or is shown
    mask: white where it is painted anew; cells: (1, height // 8, width // 8), the mask of latents
    blends: whether every call puts the image's own latents back outside the mask
    image_noise: what the image gets first, each picture its own
    from_noise: whether the image leaves no trace in the start
    paste_back: whether the image's own pixels come back outside the mask
    settings: of each picture, what makes it again
    latents: (B, C, h, w) float32, noise to start from in place of what the seeds give
    surplus: pictures at the end that only fill the batch
    notes: what is asked for in vain, and what files hold that they do not use, a sentence each
    hires: the run over the enlarged latents
    upscaler: of such a run, how the latents before it are enlarged
    controls: what steers the run; control_calls: how much, at each of its calls
    is_controlled: whether by a ControlNet; prompts: groups that guidance moves to, the last
    image_prompts: pictures that are attended to; is_guided: whether calls move away from something
    seamless: the axes along which opposite edges join
    shrunk_calls: how many calls, the first, have lower levels of half the sides
    variants: what parts compute beside what they always do; tables: what that is told, (N, ...)
    """

    program: Program
    conditioning: Sequence[Mapping[str, Array]]
    guidance_rescale: float
    cache_interval: int
    seeds: list[int]
    noise: str
    height: int
    width: int
    frame: Frame | None = None
    image: Image.Image | None = None
    mask: Image.Image | None = None
    cells: Array | None = None
    mask_blur: float = BLUR
    blends: bool = False
    image_noise: ImageNoise | None = None
    from_noise: bool = True
    paste_back: bool = True
    variation_seeds: Sequence[int] = ()
    variation_strength: float = 0.0
    settings: Sequence[Mapping[str, Any]] = ()
    latents: Array | None = None
    surplus: int = 0
    notes: Sequence[str] = ()
    hires: "Plan | None" = None
    upscaler: str = ""
    controls: Sequence[Control] = ()
    control_calls: Sequence[Sequence[StepControl]] = ()
    is_controlled: bool = False
    prompts: int = 1
    image_prompts: Sequence[ImagePrompt] = ()
    is_guided: bool = False
    seamless: str | None = None
    shrunk_calls: int = 0
    variants: Mapping[Part, Variant] = field(default_factory=dict)
    tables: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    @property
    def step_parts(self) -> list[StepPart]:
        """The parts that make the run's calls of the UNet: the whole, and around deep features."""
        whole, shallow = STEP_PARTS[self.is_controlled, bool(self.image_prompts)]
        parts = [whole] if all(self.full_calls) else [whole, shallow]
        return ["step_shrunk", *parts] if self.shrunk_calls else parts

    def runs(self) -> Iterator["Plan"]:
        """Yield this run and what follows it."""
        yield self
        if self.hires is not None:
            yield self.hires

    @property
    def full_calls(self) -> list[bool]:
        """Say of each call whether the UNet runs whole, or around deep features of a call before.

        Those are of the same texts in the same rows: at the first call with others it runs whole.
        """
        if self.cache_interval == 1:
            return [True] * len(self.conditioning)
        full: list[bool] = []
        context, age = None, 0
        for conditioning in self.conditioning:
            age = age + 1 if conditioning["context"] is context else self.cache_interval
            context, age = conditioning["context"], age % self.cache_interval
            full.append(age == 0)
        return full

    def steps(self) -> list[StepInputs]:
        """Return what each call of the UNet in this run is given beside the latents."""
        program = self.program
        matrices, outside = program.matrices, np.zeros(program.matrices.shape[::2])
        tables = self.tables
        if self.blends:
            matrices, outside = program.blended()
            tables = with_kept_image(tables) if tables else tables
        rows = rows_of_calls(
            {
                "matrices": matrices,
                "outside": outside,
                "timestep": program.timesteps,
                "input_scale": program.input_scales,
                **tables,
            },
            len(self.seeds),
        )
        controls = self.control_calls or [()] * len(self.conditioning)
        scales = zip(program.signal_scales.tolist(), program.noise_scales.tolist(), strict=True)
        calls = zip(self.conditioning, rows, self.full_calls, controls, scales, strict=False)
        return [
            StepInputs(
                conditioning=conditioning,
                per_step=per_step,
                is_full=is_full,
                signal_scale=signal,
                noise_scale=noise,
                controls=steering,
                is_controlled=self.is_controlled,
                has_images=bool(self.image_prompts),
                is_shrunk=at < self.shrunk_calls,
                variants=self.variants,
            )
            for at, (conditioning, per_step, is_full, steering, (signal, noise)) in enumerate(calls)
        ]

    @property
    def is_sensitive(self) -> bool:
        """Whether a call has one group of guidance, whose bits depend on the batch everywhere."""
        return any(len(call["guidance"]) == 1 for run in self.runs() for call in run.conditioning)

    @property
    def source_type(self) -> SourceType:
        """What its images are, by IPTC's name: whole ones, or with a part of another."""
        painted = self.mask is not None
        return "compositeWithTrainedAlgorithmicMedia" if painted else "trainedAlgorithmicMedia"

    @property
    def calls(self) -> int:
        """How often the UNet is called, all runs together."""
        return sum(len(run.program.timesteps) for run in self.runs())


def make_plan(request: Request, model: Model, schedule: NoiseSchedule, encoder: Encoder) -> Plan:
    """Check a request against a model, compute its sampler and encode its texts.

    Raises RequestError for what the model cannot do.
    """
    wanted, multiple = _filled_in(request, model), model.vae.compression
    if model.is_editing or wanted.image_guidance_scale is not None:
        check_editing(request, model)
    own = model.sample_size * multiple
    frame = None if wanted.image is None else frame_of(wanted, own, multiple)
    height, width = wanted.size((own, own), multiple)
    if frame is not None:
        height, width = frame.height, frame.width

    def run(steps: int, strength: float | None, height: int, width: int) -> Plan:
        return _run(wanted, steps, strength, (height, width), schedule, encoder, frame)

    steps, strength = wanted.num_inference_steps, wanted.strength
    assert steps is not None
    check_number("cache_interval", wanted.cache_interval, Integral, 1, max(int(steps), 1))
    first = run(steps, strength, height, width)
    if frame is not None:
        mask = frame.drawn_mask()
        first = replace(
            first,
            frame=frame,
            image=frame.drawn_image(),
            mask=mask,
            cells=None if mask is None else latent_mask(mask, height, width, multiple),
            mask_blur=wanted.mask_blur,
            blends=mask is not None and not model.is_inpainting,
            image_noise=ImageNoise.read(wanted.image_noise) if wanted.image_noise else None,
            from_noise=model.is_editing or (mask is not None and strength == 1),
            paste_back=wanted.paste_back,
        )
    texts = [*wanted.prompts, *wanted.negative_prompts, *(r.prompt for r in wanted.regions)]
    settings = picture_settings(wanted, first.seeds, first.variation_seeds, (height, width))
    assert wanted.guidance_scale is not None
    unheard = unheard_notes(request, wanted.guidance_scale, is_guided=first.is_guided)
    first = replace(first, settings=settings, notes=[*encoder.unused_words(texts), *unheard])
    if wanted.hires is None:
        return first
    hires = wanted.hires
    larger = (multiple * round(side * hires.scale / multiple) for side in (height, width))
    second = run(hires.num_inference_steps or steps, hires.strength, *larger)
    second = replace(second, from_noise=False, upscaler=hires.upscaler, frame=first.frame)
    return replace(first, hires=second)


def _filled_in(request: Request, model: Model) -> Request:
    """Return a request that leaves nothing open but its size."""
    chosen = asdict(preset(request.preset, model)) if request.preset else {}
    painted = request.mask is not None or request.extend is not None
    if request.image is not None:
        chosen["size"] = None
    if request.sampler is not None:
        chosen["schedule"] = None  # it was meant for another

    def choose(name: str, *others: Any) -> Any:
        choices = (getattr(request, name), chosen.get(name), *others)
        return next((choice for choice in choices if choice is not None), None)

    sampler = choose("sampler", variant_sampler(model) if model.variant else None, DEFAULT_SAMPLER)
    usual = CFG_PP_SCALE if is_cfg_pp(sampler) else GUIDANCE_SCALE
    return replace(
        request,
        num_inference_steps=choose("num_inference_steps", model.steps, STEPS),
        guidance_scale=choose("guidance_scale", model.guidance_scale, usual),
        guidance_rescale=choose("guidance_rescale", 0.0),
        sampler=sampler,
        schedule=choose("schedule"),
        height=choose("height", chosen.get("size")),
        width=choose("width", chosen.get("size")),
        strength=None
        if request.image is None or model.is_editing
        else choose("strength", PAINTED_STRENGTH if painted else STRENGTH),
        seed=request.draw_seeds(),  # once for all runs
        variation_seed=request.draw_variation_seeds() or None,
    )


def _run(
    request: Request,
    steps: int,
    strength: float | None,
    size: tuple[int, int],
    schedule: NoiseSchedule,
    encoder: Encoder,
    frame: Frame | None,
) -> Plan:
    """Plan one run of the loop; strength is None where it starts from noise."""
    assert request.sampler is not None
    assert request.seeds is not None
    assert request.guidance_scale is not None
    assert request.guidance_rescale is not None
    sampler, curve = resolve(request.sampler, request.schedule)
    if curve == A1111_STEPS and "time_ids" in encoder.model.unet.extra_inputs:
        curve = f"{A1111_STEPS}_xl"  # Automatic1111 takes the table by the model
    matrices = program(
        sampler, schedule, int(steps), schedule=curve, strength=strength, eta=request.eta
    )
    guidance = Guidance.over(
        request.guidance_scale,
        len(matrices.timesteps),
        request.guidance_interval,
        request.negative_scale,
        always=matrices.unconditional is not None,
    )
    prompts, parts = request.composed(encoder.words)
    maps = None
    if request.regions:
        areas = request.written([region.prompt for region in request.regions], encoder.words)
        shares = shares_of(request.regions, frame, *size, encoder.model.vae.compression)
        prompts, parts, maps = with_regions((prompts, parts), areas, shares)
    negatives = [request.written(request.negative_prompts, encoder.words)]
    if request.negative_scale is not None:
        negatives.insert(0, [""] * len(negatives[0]))
    texts = Texts(
        negatives=negatives,
        prompts=prompts,
        parts=parts,
        maps=maps,
        repeats=request.num_images_per_prompt,
    )
    conditioning = encoder.condition(
        texts, guidance, *size, clip_skip=request.clip_skip, clean_prompt=request.clean_prompt
    )
    pictures = [each for each in request.image_prompts if each.over(len(conditioning)).any()]
    if pictures:
        places = attention_maps(pictures, encoder.model, frame, size)
        conditioning = with_image_prompts(conditioning, pictures, len(prompts), places)
    is_guided = any(len(call["context"]) > len(prompts) for call in conditioning)
    if encoder.model.is_editing:
        conditioning = edited_calls(conditioning, request.image_guidance_scale, len(prompts))
    fields: dict[str, Any] = {"program": matrices, "conditioning": conditioning}
    asked = (request.seamless, request.pag_scale, request.apg, request.deep_shrink)
    if any(asked) or matrices.unconditional is not None:
        model, count = encoder.model, len(prompts)
        fields |= fields_of_plan(request, model, schedule, guidance, matrices, conditioning, count)
    return Plan(
        controls=request.controls,
        prompts=len(prompts),
        image_prompts=pictures,
        is_guided=is_guided,
        guidance_rescale=request.guidance_rescale,
        cache_interval=request.cache_interval,
        seeds=list(request.seeds),
        variation_seeds=request.variation_seeds or (),
        variation_strength=request.variation_strength,
        noise=request.noise,
        height=size[0],
        width=size[1],
        **fields,
    )
