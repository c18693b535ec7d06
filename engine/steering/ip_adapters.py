"""The IP-Adapters beside a model, and CLIP's image encoders that they see pictures through."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import Engine
from engine.backends.memory_estimate import Needed
from engine.backends.settings import BUILT_BEFOREHAND, graph_precision
from engine.checkpoints.component import Component
from engine.checkpoints.image_encoder import IMAGE_ENCODER, open_image_encoder
from engine.checkpoints.ip_adapter import check_unet, open_ip_adapter
from engine.configs.base import Config
from engine.configs.image_encoder import ImageEncoderConfig
from engine.configs.ip_adapter import IPAdapterConfig
from engine.engines import Engines
from engine.errors import BackendError, ModelError
from engine.graphs.graph import Graph
from engine.graphs.image_encoder import image_encoder_graph
from engine.graphs.ip_adapter import ip_adapter_graph

__all__ = ["IPAdapters", "KeysAndValues"]

Array = NDArray[np.float32]
KeysAndValues = tuple[Array, Array]
"""Of a picture's t tokens, (1, t, W) each, for all cross-attentions of a UNet in a row."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Network:
    """Weights with their graph, opened when it first runs."""

    engines: Engines
    weights: Component
    graph: Graph
    opened: list[Engine] = field(default_factory=list)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Any]:
        if not self.opened:
            self.opened.append(self.engines.open_beside(self.graph, self.weights))
        return self.opened[0].run(inputs)

    def needed(self, config: Config) -> Needed:
        return Needed(self.graph, config, next(iter(self.opened), None))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _ImageEncoder:
    path: Path
    config: ImageEncoderConfig
    network: _Network


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _IPAdapter:
    path: Path
    config: IPAdapterConfig
    network: _Network
    encoder: _ImageEncoder


@dataclass(slots=True, eq=False)
class IPAdapters:
    """The IP-Adapters of a model's engines, by the names that requests call them.

    They run where the model runs; beside one that computes in int8, in bfloat16 or float32.
    """

    _engines: Engines
    _adapters: Mapping[str, _IPAdapter] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may name."""
        return tuple(self._adapters)

    def set(self, files: Mapping[str, Path], encoders: Mapping[str, Path | None]) -> None:
        """Read these IP-Adapters in place of those that are there; what stays keeps its engines.

        files, encoders: by name, files, and folders of image encoders; None for image_encoder/
            beside the file or in the model's folder
        Raises ModelError when one is none, or is of another family or another encoder,
        BackendError for a backend whose engines are built beforehand; then all stay as they were.
        """
        if files and self._engines.settings.backend in BUILT_BEFOREHAND:
            raise BackendError(
                f"the backend {self._engines.settings.backend!r} runs no IP-Adapters yet; choose "
                "cuda, webgpu, cpu or openvino, or draw without them"
            )
        opened = {each.encoder.path: each.encoder for each in self._adapters.values()}
        adapters = dict[str, _IPAdapter]()
        for name, path in files.items():
            folder = encoders.get(name) or self._encoder_beside(path)
            known = self._adapters.get(name)
            if known is not None and (known.path, known.encoder.path) == (path, folder):
                adapters[name] = known
                continue
            adapters[name] = self._opened(path, folder, opened)
        self._adapters = adapters

    @property
    def configs(self) -> list[Config]:
        """The architectures of the IP-Adapters, and of their image encoders once each."""
        encoders = {each.encoder.path: each.encoder.config for each in self._adapters.values()}
        return [*(each.config for each in self._adapters.values()), *encoders.values()]

    def needed(self, names: Iterable[str]) -> dict[str, Needed]:
        """Return what adapters take of a device's memory, by a name for each network."""
        found = dict[str, Needed]()
        for name in dict.fromkeys(names):
            each = self._adapters[name]
            found[f"ip_adapter {name}"] = each.network.needed(each.config)
            encoder = each.encoder
            found[f"image_encoder {encoder.path}"] = encoder.network.needed(encoder.config)
        return found

    def path(self, name: str) -> Path:
        """Return the file of an IP-Adapter."""
        return self._adapters[name].path

    def side(self, name: str) -> int:
        """Return the side of the square pictures that an IP-Adapter's image encoder sees."""
        return self._adapters[name].encoder.config.image_size

    def keys_and_values(self, name: str, pixel_values: Array | None) -> KeysAndValues:
        """Return what an IP-Adapter makes of a picture; opens its engines at the first call.

        pixel_values: (1, 3, S, S), as CLIP sees it; None for no picture, what guidance moves away
            from: a place of zeros, or what the encoder's tokens are of a gray picture
        Raises GraphError or BackendError.
        """
        adapter = self._adapters[name]
        config, side = adapter.config, adapter.encoder.config.image_size
        if pixel_values is None and not config.sees_tokens:
            features = np.zeros((1, 1, config.embed_dim), np.float32)
        else:
            if pixel_values is None:
                pixel_values = np.zeros((1, 3, side, side), np.float32)
            encoded = adapter.encoder.network.run({"pixel_values": pixel_values})
            place = encoded["image_embeds"][:, None]
            features = encoded["penultimate_hidden_state"] if config.sees_tokens else place
        made = adapter.network.run({"features": np.ascontiguousarray(features, np.float32)})
        return made["keys"], made["values"]

    def close(self) -> None:
        """Let go of all engines."""
        self._adapters = {}

    def _encoder_beside(self, path: Path) -> Path:
        model = self._engines.model.path
        for folder in (path.parent / IMAGE_ENCODER, model / IMAGE_ENCODER):
            if folder.is_dir():
                return folder
        raise ModelError(
            f"the IP-Adapter {path} sees pictures through an image encoder, which is not in "
            f"{IMAGE_ENCODER}/ beside it; give its folder with --image-encoder"
        )

    def _opened(self, path: Path, folder: Path, opened: dict[Path, _ImageEncoder]) -> _IPAdapter:
        if not path.is_file():
            raise ModelError(f"the IP-Adapter {path} does not exist; give its file")
        config, weights = open_ip_adapter(path)
        check_unet(path, config, self._engines.model.unet)
        engines = self._engines
        precision = graph_precision(engines.settings, engines.precision_beside)
        if folder not in opened:
            seeing, its_weights = open_image_encoder(folder)
            graph = image_encoder_graph(seeing, precision)
            network = _Network(engines=engines, weights=its_weights, graph=graph)
            opened[folder] = _ImageEncoder(path=folder, config=seeing, network=network)
        encoder = opened[folder]
        _check_encoder(path, config, encoder)
        graph = ip_adapter_graph(config, precision)
        network = _Network(engines=engines, weights=weights, graph=graph)
        return _IPAdapter(path=path, config=config, network=network, encoder=encoder)


def _check_encoder(path: Path, config: IPAdapterConfig, encoder: _ImageEncoder) -> None:
    """Raise ModelError when an encoder gives another width than an IP-Adapter reads."""
    own = encoder.config
    given = own.hidden_size if config.sees_tokens else own.projection_dim
    if not config.reads(own):
        what = "tokens" if config.sees_tokens else "an embedding"
        raise ModelError(
            f"the IP-Adapter {path} reads {what} of the width {config.embed_dim}, and the image "
            f"encoder {encoder.path} gives {given}; give the encoder that it was trained with "
            "(ViT-H, or ViT-bigG for ip-adapter_sdxl) with --image-encoder"
        )
