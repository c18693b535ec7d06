"""Options of Automatic1111's API: those of it that act here, kept for each key apart."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from runtime.request import MAX_CLIP_SKIP
from serving.errors import BadRequestError
from serving.http.documents import invalid
from serving.http.fields import Catalog, check_whole, file_format
from serving.limits import Limits

NOISES: Mapping[str, str] = {"GPU": "cuda", "NV": "cuda", "CPU": "cpu"}
OWN_VAE = ("Automatic", "None", "")
MOST_QUALITY = 100


class Settings(BaseModel):
    """Options by Automatic1111's names, with its defaults."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    sd_model_checkpoint: str
    sd_vae: str = "Automatic"
    CLIP_stop_at_last_layers: int = 1
    randn_source: str = "GPU"
    samples_format: str = "png"
    jpeg_quality: int = 80
    live_previews_enable: bool = True
    show_progress_every_n_steps: int = 10

    @property
    def preview_every(self) -> int:
        """Steps between previews, 0 for none."""
        every = self.show_progress_every_n_steps
        return max(every, 0) if self.live_previews_enable else 0


class CallersSettings:
    """The options of everybody who has set some, by the names of their keys."""

    def __init__(self, catalog: Catalog, limits: Limits) -> None:
        self._catalog = catalog
        self._limits = limits
        self._kept: dict[str, Settings] = {}

    def of(self, caller: str) -> Settings:
        """Return a caller's."""
        return self._kept.get(caller) or Settings(sd_model_checkpoint=self._catalog.models[0])

    def keep(self, caller: str, given: Mapping[str, Any]) -> None:
        """Change some of a caller's options, all that are given or none. Raises RefusalError."""
        self._kept[caller] = self.changed(caller, given)

    def changed(self, caller: str, given: Mapping[str, Any]) -> Settings:
        """Return a caller's options with others for one request.

        Names that are not known here, and null, change nothing. Raises RefusalError.
        """
        known = {name: given[name] for name in Settings.model_fields if given.get(name) is not None}
        try:
            settings = Settings.model_validate({**self.of(caller).model_dump(), **known})
        except ValidationError as error:
            raise invalid(error.errors()) from None
        self._check(settings)
        model = self.model(settings.sd_model_checkpoint)
        return settings.model_copy(update={"sd_model_checkpoint": model})

    def model(self, title: str) -> str:
        """Return the model that a title means, "name", "name.safetensors" or "name [hash]".

        Raises NotFoundError.
        """
        name = title.partition(" [")[0].strip()
        shorter = name.removesuffix(".safetensors").removesuffix(".ckpt")
        return self._catalog.model(shorter if shorter in self._catalog.models else name)

    def _check(self, settings: Settings) -> None:
        if settings.sd_vae not in OWN_VAE:
            raise BadRequestError(
                f"sd_vae is {settings.sd_vae[:60]!r}; every model has its own here, so give "
                "Automatic",
                param="sd_vae",
            )
        if settings.randn_source not in NOISES:
            raise BadRequestError(
                f"randn_source is {settings.randn_source[:60]!r}; choose {', '.join(NOISES)}",
                param="randn_source",
            )
        file_format(settings.samples_format, "samples_format")
        check_whole("CLIP_stop_at_last_layers", settings.CLIP_stop_at_last_layers, 1, MAX_CLIP_SKIP)
        check_whole("jpeg_quality", settings.jpeg_quality, 1, MOST_QUALITY)
        every = settings.show_progress_every_n_steps
        check_whole("show_progress_every_n_steps", every, -1, self._limits.steps)
