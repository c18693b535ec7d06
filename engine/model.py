"""A model: its architectures, its noise schedule and where its weights are.

It is a folder in diffusers' layout or one file in that of the original training code. Neither is
converted: the parts' weights are found under their graphs' names on access.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, TypeVar, get_args

from engine.checkpoints.component import Component, ComponentName, diffusers_component
from engine.checkpoints.families import FAMILIES, Family, family_of
from engine.checkpoints.families.base import Variant
from engine.checkpoints.families.variants import EMBEDDED_GUIDANCE
from engine.checkpoints.formats.files import open_weights
from engine.checkpoints.pipeline_index import check_index, latent_side, with_pooled_text
from engine.configs.diffusion import (
    AUTOENCODERS,
    AnyAutoencoder,
    AutoencoderConfig,
    Config,
    TextEncoderConfig,
    TinyDecoderConfig,
    UNetConfig,
    read_json,
)
from engine.errors import ModelError, nearest
from engine.graphs.graph import Part, TextPart
from engine.shipped import MODELS

_STEPS: list[Part] = [part for part in get_args(Part) if part.startswith("step")]
# The component of a model that holds a part's architecture and weights.
COMPONENTS: Mapping[Part, ComponentName] = MappingProxyType(
    {
        **{"text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"},
        **dict.fromkeys(_STEPS, "unet"),
        "vae_decoder": "vae",
        "vae_encoder": "vae",
        "preview_decoder": "preview_decoder",
    }
)
TEXT_ENCODERS: tuple[TextPart, ...] = ("text_encoder", "text_encoder_2")
PIPELINES = tuple(
    dict.fromkeys(
        f"{name}{task}Pipeline"
        for family in FAMILIES.values()
        for name in family.pipelines
        for task in ("", "Img2Img", "Inpaint")
    )
)
ADVICE: Mapping[ComponentName, str] = MappingProxyType(
    {"vae": "give one with --vae", "preview_decoder": "give one with --preview-decoder FILE"}
)
WHOLE = "use a file of the whole model"
C = TypeVar("C", bound=Config)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """What a model says of itself; no weights are read yet.

    family: told by a file's tensors, or by a folder's UNet
    configs: the architectures of the components that it has
    find: opens a component's weights, memory-mapped, under their graph's names
    scheduler: a `scheduler_config.json`
    sample_size: side of the latents that the UNet was trained on
    zeros_for_empty_prompt: whether an empty negative prompt stands for a text of zeros, as in XL
    steps, guidance_scale: what the authors of a distilled model recommend
    notes: what was concluded of a file from more than its weights, a sentence each
    variant: of a model distilled to few steps whose file says so
    given: what `open` was given beside the path, from which another process opens the same
    """

    path: Path
    family: Family
    configs: Mapping[ComponentName, Config]
    find: Callable[[ComponentName], Component]
    scheduler: Mapping[str, Any]
    sample_size: int
    zeros_for_empty_prompt: bool = False
    steps: int | None = None
    guidance_scale: float | None = None
    notes: tuple[str, ...] = ()
    variant: Variant | None = None
    given: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        prediction_type: str | None = None,
        vae: Path | None = None,
        preview_decoder: Path | None = None,
        unet: Path | None = None,
        text_encoder: Path | None = None,
        text_encoder_2: Path | None = None,
    ) -> Self:
        """Read a whole model; raises ModelError when it is not one that can be run.

        path: a folder or a file
        prediction_type: instead of what the model says or is taken to be
        vae: a file or folder of another autoencoder, instead of the model's own
        preview_decoder: one of a tiny decoder such as TAESD's, instead of the model's own if any
        unet, text_encoder, text_encoder_2: files or folders of these, instead of the model's own;
            with the UNet's own path as the model's, there is no other model
        """
        parts: dict[ComponentName, Path | None] = {
            "text_encoder": text_encoder,
            "text_encoder_2": text_encoder_2,
            "unet": unet,
        }
        pieces = {name: piece for name, piece in parts.items() if piece is not None}
        if path == unet:
            from engine.checkpoints.pieces import read_pieces

            model = cls(path=path, **read_pieces(pieces, prediction_type))
        else:
            model = cls.read(path, prediction_type, needs_vae=vae is None)
            if pieces:
                from engine.checkpoints.pieces import replaced_pieces

                model = replace(model, **replaced_pieces(model, pieces))
        if vae is not None:
            from engine.checkpoints.pieces import replaced_vae

            model = replace(model, **replaced_vae(model, vae))
        if preview_decoder is not None:
            from engine.checkpoints.pieces import added_preview_decoder

            model = replace(model, **added_preview_decoder(model, preview_decoder))
        model._check_whole()
        given = {
            "unet": unet,
            "text_encoder": text_encoder,
            "text_encoder_2": text_encoder_2,
            "prediction_type": prediction_type,
            "vae": vae,
            "preview_decoder": preview_decoder,
        }
        return replace(model, given=MappingProxyType(given))

    @classmethod
    def read(
        cls, path: Path, prediction_type: str | None = None, *, needs_vae: bool = False
    ) -> Self:
        """Read what is there of a model, which may lack its autoencoder or text encoders.

        Raises ModelError when it is none, or its parts do not belong together.
        """
        if path.is_dir():
            model = cls._from_folder(path, needs_vae=needs_vae)
            if prediction_type is not None:
                scheduler = {**model.scheduler, "prediction_type": prediction_type}
                model = replace(model, scheduler=scheduler)
        else:
            from engine.checkpoints.single_file import read_file

            model = cls(path=path, **read_file(path, prediction_type))
        model._check_widths()
        return model

    @classmethod
    def _from_folder(cls, path: Path, *, needs_vae: bool) -> Self:
        index = read_json(path / "model_index.json")
        known = index.get("_class_name") in PIPELINES
        notes = [] if known else check_index(path / "model_index.json", index)
        unet = read_json(path / "unet" / "config.json")
        sample_size = unet.get("sample_size", 64)
        if type(sample_size) is not int or sample_size < 1:
            sample_size = latent_side(path / "unet" / "config.json", sample_size)
        config = UNetConfig.from_dict(unet)
        configs: dict[ComponentName, Config] = {"unet": config}
        alone = not (path / TEXT_ENCODERS[1]).is_dir()  # XL's refiner has the second and no first
        for name in TEXT_ENCODERS:
            if (name == TEXT_ENCODERS[0] and alone) or (path / name).is_dir():
                configs[name] = _text_encoder(path / name)
        if "text_embeds" in config.extra_inputs:
            *_, pooling = configs.values()  # the last text encoder
            configs["unet"] = config = with_pooled_text(config, pooling.symbols()["P"])
        if needs_vae or (path / "vae").is_dir():
            kind = str(read_json(path / "vae" / "config.json").get("_class_name"))
            configs["vae"] = AUTOENCODERS.get(kind, AutoencoderConfig).load(path / "vae")
        if (path / "preview_decoder").is_dir():
            configs["preview_decoder"] = TinyDecoderConfig.load(path / "preview_decoder")

        def find(name: ComponentName) -> Component:
            if name == "preview_decoder":
                from engine.checkpoints.tiny_autoencoder import open_tiny_decoder

                return open_tiny_decoder(path / name)[1]
            return diffusers_component(path / name, open_weights(path / name), configs[name])

        return cls(
            path=path,
            family=family_of(config, configs),
            configs=MappingProxyType(configs),
            find=find,
            scheduler=read_json(path / "scheduler" / "scheduler_config.json"),
            sample_size=sample_size,
            zeros_for_empty_prompt=bool(
                index.get("force_zeros_for_empty_prompt", TEXT_ENCODERS[1] in configs)
            ),
            guidance_scale=EMBEDDED_GUIDANCE if config.time_cond_proj_dim else None,
            notes=tuple(notes),
        )

    @property
    def unet(self) -> UNetConfig:
        """The UNet's architecture."""
        return self._config("unet", UNetConfig)

    @property
    def vae(self) -> AnyAutoencoder:
        """The autoencoder's architecture; raises ModelError when the model has none."""
        config = self._config("vae", Config)
        assert isinstance(config, AnyAutoencoder)
        return config

    @property
    def text_encoders(self) -> dict[TextPart, TextEncoderConfig]:
        """The text encoders' architectures: one, or XL's two."""
        present = (name for name in TEXT_ENCODERS if name in self.configs)
        return {name: self._config(name, TextEncoderConfig) for name in present}

    @property
    def is_inpainting(self) -> bool:
        """Whether the UNet also sees a mask and the masked picture's latents."""
        return "image_conditioning" in self.unet.extra_inputs

    @property
    def is_editing(self) -> bool:
        """Whether the UNet also sees the latents of a picture, which a text says how to change."""
        return "edited_image" in self.unet.extra_inputs

    def config(self, part: Part) -> Config:
        """Return the architecture of a part."""
        return self._config(COMPONENTS[part], Config)

    def weights(self, part: Part) -> Component:
        """Open the weights of a part, memory-mapped; raises ModelError, also if it has none."""
        component = self.component(COMPONENTS[part])
        if part == "vae_encoder" and component and all(n.startswith("decoder.") for n in component):
            raise ModelError(
                f"{self.path} has the decoder of a tiny autoencoder alone, and no picture can be "
                "encoded; put its encoder's file beside it (taesd_encoder beside taesd_decoder), "
                "or give another with --vae"
            )
        return component

    def component(self, name: ComponentName) -> Component:
        """Open a component's weights, memory-mapped; raises ModelError, also if it has none."""
        self._config(name, Config)
        return self.find(name)

    def _config(self, name: ComponentName, kind: type[C]) -> C:
        if name not in self.configs:
            raise ModelError(f"{self.path} holds no {name}; {ADVICE.get(name, WHOLE)}")
        config = self.configs[name]
        assert isinstance(config, kind)
        return config

    def _check_widths(self) -> None:
        """Raise ModelError unless the parts that are there fit together."""
        unet, latent = self.unet, self.unet.out_channels
        if "vae" in self.configs:
            latent = self.vae.latent_channels
        if unet.out_channels != latent:
            raise ModelError(
                f"{self.path} has a UNet that makes {unet.out_channels} channels and an "
                f"autoencoder that takes {latent}; use parts of one model"
            )
        if unet.in_channels not in (latent, 2 * latent, 2 * latent + 1):
            from engine.checkpoints.unsupported import foreign_channels

            raise foreign_channels(self.path, unet.in_channels, latent)
        if all(name in self.configs for name in TEXT_ENCODERS if name in self.family.parts):
            self._check_texts()

    def _check_whole(self) -> None:
        """Raise ModelError unless all parts are there."""
        self._check_widths()  # once more, with the autoencoder that was given
        self._config("vae", Config)
        self._check_texts()

    def _check_texts(self) -> None:
        widths = [config.hidden_size for config in self.text_encoders.values()]
        if self.unet.cross_attention_dim != sum(widths):
            raise ModelError(
                f"{self.path} has a UNet that attends to {self.unet.cross_attention_dim} values "
                f"and text encoders that make {' and '.join(map(str, widths)) or 'none'}; use "
                "parts of one model, all of them"
            )


def _text_encoder(folder: Path) -> TextEncoderConfig:
    kind = read_json(folder / "config.json").get("model_type")
    if not isinstance(kind, str) or "clip" in kind:
        return TextEncoderConfig.load(folder)
    from engine.configs.text_encoders import OTHER_TEXT_ENCODERS  # most models have CLIP

    return OTHER_TEXT_ENCODERS.get(kind, (TextEncoderConfig,))[0].load(folder)


def shipped_models() -> list[str]:
    """Return the names of the models that ship."""
    return sorted(path.parent.name for path in MODELS.glob("*/model_index.json"))


def find_model(model: str | Path) -> Path:
    """Return a model's folder or file, given its name or the path itself; raises ModelError."""
    path = Path(model)
    try:
        if path.is_dir() or path.is_file():
            return path
    except PermissionError as error:
        raise ModelError(f"the model {path} cannot be read ({error.strerror})") from error
    except OSError:  # a name longer than the system allows
        pass
    if str(model) in shipped_models():
        return MODELS / str(model)
    near = nearest(model, shipped_models())
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) and not near:
        raise ModelError(
            f"the model {str(model)!r} is neither a folder nor a file, and nothing is fetched; "
            "download it first, and give the path of its folder or file"
        )
    raise ModelError(
        f"the model {str(model)!r} is neither a folder or file nor one that ships; "
        + (f"did you mean {near!r}? What " if near else "give the path of one; what ")
        + f"ships is {', '.join(shipped_models()) or 'nothing'}"
    )
