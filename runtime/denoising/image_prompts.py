"""What IP-Adapters make of image prompts: keys and values that all calls of a run are given."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from engine.backends.memory_estimate import Needed
from engine.errors import RequestError
from engine.steering.ip_adapters import IPAdapters, KeysAndValues
from runtime.image_prompt import ImagePrompt
from runtime.images.clip_pixels import clip_pixels
from runtime.plan import Plan

__all__ = ["AttendedImages"]

Array = NDArray[np.float32]


@dataclass(slots=True, kw_only=True, eq=False)
class AttendedImages:
    """The IP-Adapters of a pipeline beside its UNet, and what they made of pictures.

    A picture is encoded once as long as its prompt lives, whatever it counts.
    """

    adapters: IPAdapters
    _made: WeakKeyDictionary[ImagePrompt, KeysAndValues] = field(default_factory=WeakKeyDictionary)
    _without: dict[str, KeysAndValues] = field(default_factory=dict)

    def forget(self) -> None:
        """Let go of what was made, as when names mean other adapters."""
        self._made = WeakKeyDictionary()
        self._without = {}

    def check(self, prompts: Sequence[ImagePrompt]) -> None:
        """Raise RequestError for an adapter that there is not, or is not named among several."""
        for prompt in prompts:
            self._name(prompt)

    def needed(self, plan: Plan) -> dict[str, Needed]:
        """Return what a plan's adapters take of a device's memory, with their encoders."""
        return self.adapters.needed(self._name(prompt) for prompt in plan.image_prompts)

    def open(self, plan: Plan) -> None:
        """Encode a run's pictures; raises GraphError or BackendError."""
        for prompt in plan.image_prompts:
            self._encoded(prompt)
            if plan.is_guided:
                self._nothing(self._name(prompt))

    def constants(self, plan: Plan) -> dict[str, Array]:
        """Return a run's inputs of all calls: ip_keys, ip_values (B, k, t, W), ip_bias (B, k, t).

        First the prompts, then, where the run is guided, what stands for no picture of each.
        Raises GraphError or BackendError.
        """
        made = [self._encoded(prompt) for prompt in plan.image_prompts]
        if plan.is_guided:
            made += [self._nothing(self._name(prompt)) for prompt in plan.image_prompts]
        most, batch = max(keys.shape[1] for keys, _ in made), len(plan.seeds)
        shape = 1, len(made), most
        bias = np.full(shape, -np.inf, np.float32)
        keys, values = (np.zeros((*shape, made[0][0].shape[2]), np.float32) for _ in range(2))
        for k, pair in enumerate(made):
            tokens = pair[0].shape[1]
            keys[:, k, :tokens], values[:, k, :tokens] = pair
            bias[:, k, :tokens] = 0
        arrays = {"ip_keys": keys, "ip_values": values, "ip_bias": bias}
        return {name: np.repeat(array, batch, axis=0) for name, array in arrays.items()}

    def _encoded(self, prompt: ImagePrompt) -> KeysAndValues:
        if prompt not in self._made:
            name = self._name(prompt)
            side = self.adapters.side(name)
            each = [
                self.adapters.keys_and_values(name, clip_pixels(image, side))
                for image in prompt.images
            ]
            keys, values = zip(*each, strict=True)
            self._made[prompt] = np.concatenate(keys, axis=1), np.concatenate(values, axis=1)
        return self._made[prompt]

    def _nothing(self, name: str) -> KeysAndValues:
        if name not in self._without:
            self._without[name] = self.adapters.keys_and_values(name, None)
        return self._without[name]

    def _name(self, prompt: ImagePrompt) -> str:
        names = self.adapters.names
        if prompt.adapter is None and len(names) == 1:
            return names[0]
        if prompt.adapter not in names:
            known = ", ".join(map(repr, names)) or "none"
            wanted = "one of several" if prompt.adapter is None else repr(prompt.adapter)
            raise RequestError(
                f"the IP-Adapter of an image prompt is {wanted}, and loaded are {known}; name one "
                "that set_ip_adapters loaded"
            )
        return prompt.adapter
