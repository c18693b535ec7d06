"""A model's parts on TensorRT or TensorRT-RTX: engines found in the cache by what a run needs.

Engines that serve one size each are faster than one that serves many, so a part may have several:
a run takes the one that fits it most closely.
"""

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from engine.adapters.adapter import Adapted
from engine.backends.base import Arrays, DeviceEngine, EngineSpec
from engine.backends.settings import BackendSettings
from engine.backends.tensorrt.build import build
from engine.backends.tensorrt.build_request import BuildSettings
from engine.backends.tensorrt.engine import TensorRTEngine
from engine.backends.tensorrt.engine_store import EngineFacts, EngineStore, weights_hash
from engine.backends.tensorrt.facts import build_request, engine_facts, require_to_build
from engine.backends.tensorrt.library import LIBRARIES, library
from engine.backends.tensorrt.profiles import GROUPS, Profile, Range, input_shapes, relevant
from engine.devices.cuda import CudaDevice, find_device
from engine.devices.device import DeviceArray, HostOrDeviceArray, Shape
from engine.errors import BackendError
from engine.graphs.graph import Graph, Part, signature
from engine.model import Model
from engine.store.cache import Cache

Shapes = Mapping[str, Shape]
SAME = ("library", "version", "graph", "precision", "sm", "device", "driver")


def open_engine(spec: EngineSpec) -> DeviceEngine:
    """Open a part on the GPU; raises BackendError when that is missing, or has no engine.

    Of the engines in the cache those of this graph, these weights (or any, where an engine takes
    them by a refit), this library, GPU and driver are used.
    """
    name, model = spec.settings.backend, spec.model
    assert name is not None
    if model is None:
        raise BackendError(
            f"the backend {name!r} opens the parts of a model, and {spec.graph.path.name} came "
            "alone; open the model with `runtime.Pipeline.load`"
        )
    engines = EngineSet(
        name=name,
        model=model,
        part=spec.graph.part,
        graph=spec.graph,
        settings=spec.settings,
        device=find_device(),
    )
    engines.take(spec.weights)
    return engines


@dataclass(slots=True, kw_only=True, eq=False)
class EngineSet:
    """The engines of one part, each for other sizes; a `DeviceEngine` of whichever fits a run."""

    name: str
    model: Model
    part: Part
    graph: Graph
    settings: BackendSettings
    device: CudaDevice
    records: bool = True
    held: int = 0
    store: EngineStore = field(default_factory=EngineStore)
    _weights: Arrays = field(default_factory=dict)
    _hash: str | None = None
    _engines: dict[str, TensorRTEngine] = field(default_factory=dict)  # by the key of their facts
    _chosen: dict[tuple[tuple[str, Shape], ...], TensorRTEngine] = field(default_factory=dict)

    def run(self, inputs: Mapping[str, HostOrDeviceArray]) -> dict[str, NDArray[Any]]:
        """Run once, with arrays of the signature; see `DeviceEngine`."""
        return self._engine_for({name: a.shape for name, a in inputs.items()}).run(inputs)

    def prepare(self, inputs: Shapes) -> Mapping[str, DeviceArray]:
        """Get ready for inputs of these shapes; see `DeviceEngine`."""
        return self._engine_for(inputs).prepare(inputs)

    def enqueue(
        self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]
    ) -> None:
        """Queue a run; see `DeviceEngine`."""
        self._engine_for({name: a.shape for name, a in inputs.items()}).enqueue(inputs, outputs)

    def rebind(self, weights: Arrays, names: Collection[str]) -> None:
        """Refit the open engines that can be, and leave those that cannot for others."""
        if not any(name in self.graph.weights for name in names):
            return
        self.device.wait()  # work that is queued may still read what goes
        for key, engine in list(self._engines.items()):
            if engine.refittable:
                engine.rebind(weights, names)
            else:
                del self._engines[key]
        self.take(weights)

    def take(self, weights: Arrays) -> None:
        """Use these weights; raises BackendError when no engine has or takes them."""
        self._weights, self._hash = weights, None
        self._chosen.clear()
        if not self.settings.build_missing and not self._found():
            raise BackendError(
                f"no engine of {self.name} in the cache has the {self.part} of {self.model.path} "
                f"with these weights for this GPU; build it with `{self._command()}`, and with "
                "--refit if adapters are to change it"
            )

    def _found(self) -> list[EngineFacts]:
        """List the engines of this graph that have these weights or take any."""
        refitted = BuildSettings(profiles=(self._profile({}),), refit=True)
        wanted = engine_facts(self.name, self.graph, refitted, self._weights_hash, self.device)
        found = self.store.find(**{fact: getattr(wanted, fact) for fact in SAME})
        return [facts for facts, _ in found if facts.refit or facts.weights == self._weights_hash()]

    def _weights_hash(self) -> str:
        if self._hash is None:
            self._hash = weights_hash({name: self._weights[name] for name in self.graph.weights})
        return self._hash

    def _engine_for(self, shapes: Shapes) -> TensorRTEngine:
        """Return the engine for these shapes, opening it, and building it where that is wanted."""
        key = tuple(sorted(shapes.items()))
        with self.device.lock:  # two threads open it once
            if key not in self._chosen:
                volumes = [(self._profile_volume(facts, shapes), facts) for facts in self._found()]
                fits = [(volume, facts) for volume, facts in volumes if volume is not None]
                _, facts = min(fits, key=lambda found: found[0], default=(0, None))
                self._chosen[key] = self._open(facts or self._built(shapes))
            return self._chosen[key]

    def _profile_volume(self, facts: EngineFacts, shapes: Shapes) -> int | None:
        """Return how many numbers the inputs of the closest profile may have; None if none fits."""
        volumes = []
        for profile in map(Profile.from_dict, facts.profiles):
            allowed = self._shapes(profile)
            if allowed.keys() == shapes.keys() and all(
                len(shape) == len(low)
                and all(a <= n <= z for a, n, z in zip(low, shape, high, strict=True))
                for (low, _, high), shape in ((allowed[n], shapes[n]) for n in shapes)
            ):
                volumes.append(sum(prod(high) for _, _, high in allowed.values()))
        return min(volumes, default=None)

    def _open(self, facts: EngineFacts) -> TensorRTEngine:
        key = facts.key()
        if key not in self._engines:
            path = self.store.get(facts)
            if path is None:  # damaged, or gone since it was listed
                raise BackendError(
                    f"the engine of the {self.part} was damaged and is removed; build it anew with "
                    f"`{self._command()}`"
                )
            engine = TensorRTEngine(
                library(self.name), path, self.graph, self.device, self._kernels(key)
            )
            if facts.refit:
                engine.rebind(self._weights, self.graph.weights)
            self._engines[key] = engine
        return self._engines[key]

    def _kernels(self, key: str) -> Path | None:
        """Name the file of what TensorRT-RTX compiles on this GPU of an engine."""
        if not LIBRARIES[self.name].targets:
            return None
        folder = self.store.folder.parent / "kernels"
        with suppress(OSError):  # without the file they are compiled in every process
            folder.mkdir(parents=True, exist_ok=True)
        facts = self.device.facts
        return folder / f"{Cache.key(engine=key, device=facts.name, driver=facts.driver)}.bin"

    def _built(self, shapes: Shapes) -> EngineFacts:
        profile = self._profile(self._sizes(shapes))
        if not self.settings.build_missing:
            offered = [
                Profile.from_dict(each).describe() for f in self._found() for each in f.profiles
            ]
            raise BackendError(
                f"no engine of {self.name} takes this request to the {self.part} of "
                f"{self.model.path}, {profile.describe()}; those in the cache take "
                f"{'; '.join(offered)}; ask for one of these, build one with "
                f"`{self._command(profile)}`, or have it built with --build-missing"
            )
        # The builder knows the model's files, not what adapters made of them here.
        chosen = BuildSettings(profiles=(profile,), refit=isinstance(self._weights, Adapted))
        facts = engine_facts(self.name, self.graph, chosen, self._weights_hash, self.device)
        request = build_request(self.name, self.model, self.part, self.graph, chosen)
        require_to_build(self.device, self.graph, self.model.config(self.part), chosen)
        self.store.get_or_build(facts, lambda path: build(request, path))
        return facts

    def _shapes(self, profile: Profile) -> Mapping[str, tuple[Shape, Shape, Shape]]:
        config, compression = self.model.config(self.part), self.model.vae.compression
        return input_shapes(self.part, config, profile, compression=compression)

    def _sizes(self, shapes: Shapes) -> dict[str, int]:
        """Return the number behind each symbol of the part's inputs."""
        described = signature(self.part, self.model.config(self.part)).inputs
        return {
            symbol: number
            for name, shape in shapes.items()
            if name in described
            for symbol, number in zip(described[name].shape, shape, strict=True)
            if isinstance(symbol, str)
        }

    def _profile(self, sizes: Mapping[str, int]) -> Profile:
        """Return the profile of just these sizes; the model's own where they are not known."""
        compression = self.model.vae.compression
        side = self.model.sample_size
        chosen = {
            "height": sizes.get("h", side) * compression,
            "width": sizes.get("w", side) * compression,
        }
        symbols = {"batch": "B", "tokens": "n"}
        chosen |= {name: sizes[symbol] for name, symbol in symbols.items() if symbol in sizes}
        ranges = {name: Range(size, size, size) for name, size in chosen.items()}
        if sizes.get("g", 0) > GROUPS.max:
            ranges["groups"] = Range(1, 2, sizes["g"])
        return relevant(self.part, Profile(**ranges))

    def _command(self, profile: Profile | None = None) -> str:
        command = f"python -m export {self.model.path} --backend {self.name}"
        if profile is None:
            return command
        sizes = f"--height {profile.height.max} --width {profile.width.max}"
        sizes += f" --batch {profile.batch.max} --tokens {profile.tokens.max}"
        return f"{command} {sizes} --groups {profile.groups.max}"
