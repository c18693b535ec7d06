"""A model: a folder in diffusers' layout, its three architectures and where its weights are."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from numpy.typing import NDArray

from engine.config import AutoencoderConfig, Config, TextEncoderConfig, UNetConfig, read_json
from engine.errors import ModelError
from engine.signature import Part
from engine.weights import open_weights

# The folder of a model that holds a part's configuration and weights.
FOLDERS: Mapping[Part, str] = {
    "text_encoder": "text_encoder",
    "step": "unet",
    "vae_decoder": "vae",
    "vae_encoder": "vae",
}
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What a model's folder says; no weights are read yet.

    sample_size: side of the latents that the UNet was trained on.
    """

    path: Path
    text_encoder: TextEncoderConfig
    unet: UNetConfig
    vae: AutoencoderConfig
    scheduler: Mapping[str, Any]
    sample_size: int

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read a model's folder; raises ModelError when it is not one that can be run."""
        if not path.is_dir():
            raise ModelError(
                f"the model {path} is not a folder; give a folder in diffusers' layout "
                "(model_index.json, text_encoder/, tokenizer/, unet/, vae/, scheduler/)"
            )
        kind = read_json(path / "model_index.json").get("_class_name")
        if kind not in PIPELINES:
            raise ModelError(
                f"{path / 'model_index.json'} names the pipeline {kind!r}; supported are "
                f"{' and '.join(PIPELINES)}"
            )
        unet = read_json(path / "unet" / "config.json")
        sample_size = unet.get("sample_size", 64)
        if type(sample_size) is not int or sample_size < 1:
            raise ModelError(
                f"{path / 'unet' / 'config.json'} has sample_size {sample_size!r}; "
                "a whole number of latents along one side is expected"
            )
        model = cls(
            path=path,
            text_encoder=TextEncoderConfig.load(path / "text_encoder"),
            unet=UNetConfig.from_dict(unet),
            vae=AutoencoderConfig.load(path / "vae"),
            scheduler=read_json(path / "scheduler" / "scheduler_config.json"),
            sample_size=sample_size,
        )
        model._check_widths()
        return model

    def config(self, part: Part) -> Config:
        """Return the architecture of a part."""
        if part == "text_encoder":
            return self.text_encoder
        return self.unet if part == "step" else self.vae

    def weights(self, part: Part) -> Mapping[str, NDArray[Any]]:
        """Open the weights of a part, memory-mapped; raises ModelError."""
        weights = open_weights(self.path / FOLDERS[part])
        return _WithPrefix(weights) if part == "text_encoder" else weights

    def _check_widths(self) -> None:
        if self.unet.in_channels != self.vae.latent_channels:
            raise ModelError(
                f"the UNet of {self.path} takes {self.unet.in_channels} channels and its "
                f"autoencoder makes {self.vae.latent_channels}; only text-to-image models are "
                "supported, whose numbers are equal"
            )
        if self.unet.out_channels != self.unet.in_channels:
            raise ModelError(
                f"the UNet of {self.path} takes {self.unet.in_channels} channels and gives "
                f"{self.unet.out_channels}; only models whose numbers are equal are supported"
            )
        if self.unet.cross_attention_dim != self.text_encoder.hidden_size:
            raise ModelError(
                f"the UNet of {self.path} attends to {self.unet.cross_attention_dim} values and "
                f"its text encoder makes {self.text_encoder.hidden_size}; use parts of one model"
            )


class _WithPrefix(Mapping[str, NDArray[Any]]):
    """A text encoder's weights under `text_model.`, which transformers 5 no longer writes."""

    PREFIX = "text_model."

    def __init__(self, weights: Mapping[str, NDArray[Any]]) -> None:
        self._weights = weights
        self._names = {
            name if name.startswith((self.PREFIX, "text_projection.")) else self.PREFIX + name: name
            for name in weights
        }

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._weights[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
