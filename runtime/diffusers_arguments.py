"""diffusers' arguments of a call, taken where they can mean the same (docs/from-diffusers.md).

Those are the names that are no fields of `Request`: what is done between the steps and with the
result, arrays in place of texts or of noise, and torch's generators. Torch is not imported: an
array of its is told by its methods.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, get_args

import numpy as np
from numpy.typing import NDArray

from engine.errors import RequestError
from runtime.checks import check_choice
from runtime.plan import Array, Plan
from runtime.request import Request
from runtime.request_options import OutputType

__all__ = ["CallArguments", "OnStepEnd"]

OnStepEnd = Callable[..., Mapping[str, Any] | None]
"""As diffusers calls it: (pipeline, step from 0, timestep, {"latents": (B, C, h, w)})."""

EMBEDS = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)
# Taken while they are None, which is their default in diffusers.
UNUSED = {
    *("cross_attention_kwargs", "ip_adapter_image", "ip_adapter_image_embeds", "timesteps"),
    *("sigmas", "denoising_start", "denoising_end", "original_size", "target_size", "prompt_2"),
    *("negative_prompt_2", "crops_coords_top_left", "callback", "callback_steps"),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CallArguments:
    """A call: the request, and what diffusers' arguments say beside it.

    output_type: "pil", "np" or "latent"; on_step_end: called after every call of the UNet
    latents: (B, C, h, w) float32, the noise to start from
    embeds: by diffusers' names, (prompts, n, D) and pooled (prompts, P), float32
    """

    request: Request
    output_type: OutputType
    on_step_end: OnStepEnd | None
    latents: Array | None
    embeds: Mapping[str, Array]

    @classmethod
    def read(cls, prompt: str | Sequence[str] | None, options: Mapping[str, Any]) -> Self:
        """Part a call's options into a request and the rest. Raises RequestError."""
        given = {
            name: value
            for name, value in options.items()
            if not (name in UNUSED and value is None)
            and not (name == "return_dict" and value in (None, True))
        }
        if "return_dict" in given:
            raise RequestError(
                f"return_dict is {given['return_dict']!r}; a result is an object with images"
            )
        output_type: Any = given.pop("output_type", None) or "pil"
        check_choice("output_type", output_type, get_args(OutputType))
        on_step_end = given.pop("callback_on_step_end", None)
        if on_step_end is not None and not callable(on_step_end):
            raise RequestError("callback_on_step_end cannot be called; give a function")
        inputs = given.pop("callback_on_step_end_tensor_inputs", None) or ["latents"]
        if list(inputs) != ["latents"]:
            raise RequestError(
                f"callback_on_step_end_tensor_inputs is {inputs!r}; only the latents can be seen "
                "and changed between steps"
            )
        latents = _array("latents", given.pop("latents", None), 4)
        embeds = {}
        for name in EMBEDS:
            array = _array(name, given.pop(name, None), 2 if "pooled" in name else 3)
            if array is not None:
                embeds[name] = array
        if "prompt_embeds" in embeds:
            if prompt is not None:
                raise RequestError("prompt and prompt_embeds came together; give one of them")
            prompt = [""] * len(embeds["prompt_embeds"])
        elif embeds:
            raise RequestError(f"{next(iter(embeds))} came without prompt_embeds; give both")
        if embeds and given.get("regions"):
            raise RequestError("prompt_embeds and regions came together; give texts")
        if "negative_prompt_embeds" in embeds and given.get("negative_prompt"):
            raise RequestError(
                "negative_prompt and negative_prompt_embeds came together; give one of them"
            )
        if latents is not None and given.get("image") is not None:
            raise RequestError("latents and image came together; a run starts from one of them")
        if latents is not None and given.get("variation_strength"):
            raise RequestError(
                "latents and variation_strength came together, and the latents are the noise that "
                "would vary; give one of them"
            )
        _add_generator(given)
        return cls(
            request=Request(prompt=prompt, **given),  # type: ignore[arg-type]
            output_type=output_type,
            on_step_end=on_step_end,
            latents=latents,
            embeds=embeds,
        )

    def applied(self, plan: Plan, latent_shape: tuple[int, int, int]) -> Plan:
        """Put the arrays into a plan; latent_shape: of one picture's latents.

        Raises RequestError for arrays of other shapes than the plan's.
        """
        if self.latents is not None:
            wanted = (len(plan.seeds), *latent_shape)
            if self.latents.shape != wanted:
                raise RequestError(f"latents are {self.latents.shape}; give {wanted}")
            plan = replace(plan, latents=self.latents)
        return self._embedded(plan) if self.embeds else plan

    def _embedded(self, plan: Plan) -> Plan:
        """Put embeddings in the place of encoded texts; equal calls keep sharing their arrays."""
        made: dict[int, dict[str, Array]] = {}
        repeats = self.request.num_images_per_prompt

        def embedded(call: Mapping[str, Array]) -> Mapping[str, Array]:
            key = id(call["context"])
            if key not in made:
                names = ["prompt_embeds", "negative_prompt_embeds"]
                made[key] = {"context": self._groups(call["context"], names, repeats)}
                if "text_embeds" in call:
                    names = ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
                    made[key]["text_embeds"] = self._groups(call["text_embeds"], names, repeats)
            return {**call, **made[key]}

        hires = None if plan.hires is None else self._embedded(plan.hires)
        calls = [embedded(call) for call in plan.conditioning]
        pooled = [name for name in self.embeds if "pooled" in name]
        if pooled and not any("text_embeds" in call for call in plan.conditioning):
            raise RequestError(f"{pooled[0]} came, and this model takes none; leave it out")
        notes = list(plan.notes)
        if "negative_prompt_embeds" in self.embeds and not plan.is_guided:
            notes.append("negative_prompt_embeds changes nothing: nothing is guided")
        return replace(plan, conditioning=calls, hires=hires, notes=notes)

    def _groups(self, encoded: Array, names: Sequence[str], repeats: int) -> Array:
        """Lay the groups (g, B, ...) of a call: [negative, prompt], or the prompt alone."""
        if len(encoded) > 2:
            raise RequestError(
                "prompt_embeds with negative_scale, pag_scale or AND; give texts for these"
            )
        groups = []
        for name in names[: len(encoded)]:
            found = self.embeds.get(name)
            if found is None and name == "negative_prompt_embeds":
                found = encoded[0, ::repeats]  # the negative prompt's, which was encoded
            if found is None:
                raise RequestError(f"this model needs {name} beside prompt_embeds; give it")
            groups.append(np.repeat(found, repeats, axis=0))
        wanted = (encoded.shape[1], *groups[0].shape[1:-1], encoded.shape[-1])
        for name, group in zip(names, groups, strict=False):
            if group.shape != wanted:
                raise RequestError(f"{name} are {group.shape}, all pictures; {wanted} are needed")
        return np.ascontiguousarray(np.stack(groups[::-1]))


def _array(name: str, value: object, axes: int) -> Array | None:
    """Return an array of numpy's or torch's as float32. Raises RequestError."""
    if value is None:
        return None
    tensor: Any = value
    if callable(getattr(tensor, "detach", None)):
        tensor = tensor.detach().cpu().float().numpy()
    try:
        array: NDArray[np.float32] = np.ascontiguousarray(tensor, np.float32)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{name} came as {type(value).__name__}; give an array") from error
    if array.ndim != axes or not array.size or not np.isfinite(array).all():
        raise RequestError(
            f"{name} has the shape {array.shape}, or holds numbers that are none; give finite ones "
            f"with {axes} axes"
        )
    return array


def _add_generator(given: dict[str, Any]) -> None:
    """Take the seed of torch's generators, and whose random numbers it means."""
    generator = given.pop("generator", None)
    if generator is None:
        return
    several = isinstance(generator, list | tuple)
    seeds, kinds = [], set()
    for each in generator if several else [generator]:
        seed = getattr(each, "initial_seed", None)
        if not callable(seed):
            raise RequestError(
                f"generator came as {type(each).__name__}; give seed=7, or a torch generator that "
                "was seeded"
            )
        seeds.append(seed())
        kinds.add("cuda" if getattr(getattr(each, "device", None), "type", "") == "cuda" else "cpu")
    if given.get("seed") is not None:
        raise RequestError("seed and generator came together; give one of them")
    if len(kinds) != 1:
        raise RequestError("generator is an empty list, or of several devices; give seeds")
    given["seed"] = seeds if several else seeds[0]
    if given.get("noise") is None:
        given["noise"] = kinds.pop()
