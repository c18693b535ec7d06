"""The ControlNets beside a model: read for its UNet, opened when they are first asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from engine.backends.base import Engine
from engine.backends.settings import ON_GPU, graph_precision
from engine.checkpoints.component import Component
from engine.checkpoints.control_lora import ControlLora
from engine.checkpoints.control_net import open_control_net
from engine.configs.control_net import ControlNetConfig
from engine.engines import Engines, open_engine
from engine.errors import BackendError, ModelError
from engine.graphs.graph import find_graph

__all__ = ["ControlNets", "ControlPart"]

ControlPart = Literal["control_hint", "control"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _ControlNet:
    """A ControlNet and the engines of its parts that are open."""

    path: Path
    config: ControlNetConfig
    weights: Component | ControlLora
    opened: dict[ControlPart, Engine] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class ControlNets:
    """The ControlNets of a model's engines, by the names that requests call them.

    They run where the model runs; beside one that computes in int8, in bfloat16 or float32.
    """

    _engines: Engines
    _nets: Mapping[str, _ControlNet] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may name."""
        return tuple(self._nets)

    def set(self, files: Mapping[str, Path]) -> None:
        """Read these ControlNets in place of those that are there; the engines of some stay.

        files: by name, files or folders; a name whose file is what it was keeps its engines
        Raises ModelError when one is none or is of another family, BackendError where the model
        runs on a GPU; then all stay as they were.
        """
        if files and self._engines.settings.backend in ON_GPU:
            raise BackendError(
                f"the backend {self._engines.settings.backend!r} runs no ControlNets yet; choose "
                "cpu or openvino, or draw without them"
            )
        model, nets = self._engines.model, dict[str, _ControlNet]()
        for name, path in files.items():
            known = self._nets.get(name)
            if known is not None and known.path == path:
                nets[name] = known
                continue
            if not path.exists():
                raise ModelError(f"the ControlNet {path} does not exist; give a file or a folder")
            config, weights = open_control_net(path, model.unet, model.weights("step"))
            nets[name] = _ControlNet(path=path, config=config, weights=weights)
        self._nets = nets

    def path(self, name: str) -> Path:
        """Return the file or folder of a ControlNet."""
        return self._nets[name].path

    def config(self, name: str) -> ControlNetConfig:
        """Return the architecture of a ControlNet."""
        return self._nets[name].config

    def engine(self, name: str, part: ControlPart) -> Engine:
        """Return a part's engine, opening it at the first call; raises GraphError, BackendError."""
        net = self._nets[name]
        if part not in net.opened:
            settings, precision = self._engines.settings, self._engines.precision_beside
            graph = find_graph(
                part,
                net.config,
                graph_precision(settings, precision),
                self._engines.folders,
                net.path,
            )
            net.opened[part] = open_engine(graph, net.weights, settings, precision)
            net.weights.release()
        return net.opened[part]

    def close(self) -> None:
        """Let go of all engines."""
        self._nets = {}
