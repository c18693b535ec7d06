"""ControlNets and T2I-Adapters beside a model: read for its UNet, opened when first asked for."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from engine.backends.base import Engine
from engine.backends.memory_estimate import Needed
from engine.backends.settings import BUILT_BEFOREHAND, ON_GPU, graph_precision
from engine.checkpoints.component import Component
from engine.checkpoints.control_lora import ControlLora
from engine.checkpoints.control_net import is_pooled, open_control_net
from engine.checkpoints.formats.files import open_weights
from engine.checkpoints.t2i_adapter import is_t2i_adapter, open_t2i_adapter
from engine.configs.base import Config
from engine.configs.control_net import ControlNetConfig
from engine.configs.t2i_adapter import T2IAdapterConfig, feature_sum_of
from engine.engines import Engines
from engine.errors import BackendError, ModelError
from engine.graphs.graph import Graph, find_graph
from engine.graphs.t2i_adapter import feature_sum_graph, t2i_adapter_graph
from engine.shipped import find_control, shipped_controls

__all__ = ["ControlNets", "ControlPart"]

PREPROCESSOR = "preprocessor"  # in a file's metadata
ControlPart = Literal["control_hint", "control", "t2i_adapter", "feature_sum"]
NET_PARTS: tuple[ControlPart, ...] = ("control_hint", "control")
ADAPTER_PARTS: tuple[ControlPart, ...] = ("t2i_adapter", "feature_sum")


@dataclass(frozen=True, slots=True, eq=False)
class _ControlNet:
    """A ControlNet or a T2I-Adapter, and the engines of its parts that are open.

    pooled: whether its residuals count in the mean over all places of a map
    preprocessor: what makes its hints of any picture, where its file says so
    """

    path: Path
    config: ControlNetConfig | T2IAdapterConfig
    weights: Component | ControlLora
    preprocessor: str | None
    pooled: bool = False
    opened: dict[ControlPart, Engine] = field(default_factory=dict)
    described: dict[ControlPart, tuple[Graph, Config]] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class ControlNets:
    """The ControlNets and T2I-Adapters of a model's engines, by the names that requests call them.

    They run where the model runs; beside one that computes in int8, in bfloat16 or float32.
    """

    _engines: Engines
    _nets: Mapping[str, _ControlNet] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may name."""
        return tuple(self._nets)

    @property
    def adapters(self) -> Mapping[str, T2IAdapterConfig]:
        """The architectures of those that are T2I-Adapters, by their names."""
        nets = ((name, net.config) for name, net in self._nets.items())
        return {name: config for name, config in nets if isinstance(config, T2IAdapterConfig)}

    @property
    def control_types(self) -> Mapping[str, int]:
        """How many types of pictures those that are unions of ControlNets know, by their names."""
        counts = {name: net.config.control_types for name, net in self._nets.items()}
        return {name: count for name, count in counts.items() if count}

    @property
    def pooled(self) -> frozenset[str]:
        """Names of those whose residuals count in the mean over all places of a map."""
        return frozenset(name for name, net in self._nets.items() if net.pooled)

    def set(self, files: Mapping[str, Path]) -> None:
        """Read these nets in place of those that are there; the engines of some stay.

        files: by name, files or folders, or names of those that ship; a file that is here keeps its
            engines, whatever its names are, and is there once for all of them
        Raises ModelError when one is none or is of another family, BackendError for a backend
        whose engines are built beforehand; then all stay as they were.
        """
        if files and self._engines.settings.backend in BUILT_BEFOREHAND:
            raise BackendError(
                f"the backend {self._engines.settings.backend!r} runs no ControlNets yet; choose "
                "cuda, webgpu, cpu or openvino, or draw without them"
            )
        nets = dict[str, _ControlNet]()
        known = {net.path: net for net in self._nets.values()}
        for name, path in ((name, find_control(path)) for name, path in files.items()):
            if path not in known:
                if not path.exists():
                    ships = " or ".join(shipped_controls())
                    raise ModelError(
                        f"the ControlNet {path} does not exist; give a file or a folder, or the "
                        f"name of one that ships ({ships or 'none'})"
                    )
                known[path] = self._read(path)
            nets[name] = known[path]
        self._nets = nets

    def path(self, name: str) -> Path:
        """Return the file or folder of a ControlNet."""
        return self._nets[name].path

    @property
    def configs(self) -> list[ControlNetConfig | T2IAdapterConfig]:
        """The architectures, once for a net that has several names."""
        return [net.config for net in dict.fromkeys(self._nets.values())]

    def config(self, name: str) -> ControlNetConfig | T2IAdapterConfig:
        """Return the architecture of a net."""
        return self._nets[name].config

    def preprocessor(self, name: str) -> str | None:
        """Return the preprocessor that a net's file names, as "canny"; None where it names none."""
        return self._nets[name].preprocessor

    def engine(self, name: str, part: ControlPart) -> Engine:
        """Return a part's engine, opening it at the first call; raises GraphError, BackendError."""
        net = self._nets[name]
        if part not in net.opened:
            graph, _ = self._described(net, part)
            weights = net.weights if graph.weights else None
            net.opened[part] = self._engines.open_beside(graph, weights)
        return net.opened[part]

    def needed(self, names: Iterable[str]) -> dict[str, Needed]:
        """Return what nets take of a device's memory, by a name for each part; GraphError."""
        found = dict[str, Needed]()
        for name in dict.fromkeys(names):
            net = self._nets[name]
            is_adapter = isinstance(net.config, T2IAdapterConfig)
            for part in ADAPTER_PARTS if is_adapter else NET_PARTS:
                graph, config = self._described(net, part)
                found[f"{part} {name}"] = Needed(graph, config, net.opened.get(part))
        return found

    def _described(self, net: _ControlNet, part: ControlPart) -> tuple[Graph, Config]:
        """Return a part's graph and its architecture, which is read once; raises GraphError."""
        if part not in net.described:
            net.described[part] = self._find(net, part)
        return net.described[part]

    def _find(self, net: _ControlNet, part: ControlPart) -> tuple[Graph, Config]:
        precision = graph_precision(self._engines.settings, self._engines.precision_beside)
        if not isinstance(net.config, T2IAdapterConfig):
            folders = self._engines.folders
            return find_graph(part, net.config, precision, folders, net.path), net.config
        if part == "feature_sum":
            config = feature_sum_of(net.config)
            return feature_sum_graph(config), config
        return t2i_adapter_graph(net.config, precision), net.config

    def _read(self, path: Path) -> _ControlNet:
        """Read a file or a folder as what it is; raises ModelError."""
        model, weights = self._engines.model, open_weights(path)
        preprocessor = weights.metadata.get(PREPROCESSOR)
        if is_t2i_adapter(weights):
            return _ControlNet(path, *open_t2i_adapter(path, model.unet), preprocessor)
        pooled, backend = is_pooled(path), self._engines.settings.backend
        if pooled and backend in ON_GPU:
            raise BackendError(
                f"{path} is a ControlNet whose residuals count in the mean, which the backend "
                f"{backend!r} does not take yet; choose cpu or openvino, or draw without it"
            )
        opened = open_control_net(path, model.unet, model.weights("step"))
        return _ControlNet(path, *opened, preprocessor, pooled=pooled)

    def close(self) -> None:
        """Let go of all engines."""
        self._nets = {}
