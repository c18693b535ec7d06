"""The lists of Automatic1111's API: what there is by its names, and empty ones of what is not."""

import os
from typing import Any

from fastapi import APIRouter

from serving.client import EngineClient
from serving.http.automatic1111.controlnet import SCRIPT
from serving.http.automatic1111.names import (
    LATENT_MODES,
    list_samplers,
    list_schedulers,
    list_upscalers,
)
from serving.http.fields import Catalog
from serving.memory import resident_bytes, total_bytes

NONE_HERE = (
    *("sd-vae", "hypernetworks", "face-restorers", "realesrgan-models", "prompt-styles"),
    *("script-info", "extensions"),
)
ALWAYS_FRESH = (
    *("refresh-checkpoints", "refresh-vae", "refresh-loras", "refresh-embeddings"),
    *("unload-checkpoint", "reload-checkpoint"),
)


def add_lists(router: APIRouter, catalog: Catalog, engine: EngineClient) -> None:
    """Add the routes that list; no path of this machine is in any."""

    @router.get("/sd-models")
    async def models() -> list[dict[str, Any]]:
        """List the models of this server; a title is a name."""
        unknown = {"hash": None, "sha256": None, "config": None}
        return [
            {"title": name, "model_name": name, "filename": name, **unknown}
            for name in catalog.models
        ]

    @router.get("/loras")
    async def loras() -> list[dict[str, Any]]:
        """List the adapters that prompts may name."""
        return [
            {"name": name, "alias": name, "path": name, "metadata": {}} for name in catalog.loras
        ]

    @router.get("/samplers")
    async def samplers() -> list[dict[str, Any]]:
        """List the samplers."""
        return list_samplers()

    @router.get("/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        """List the schedules of noise."""
        return list_schedulers()

    @router.get("/upscalers")
    async def upscalers() -> list[dict[str, Any]]:
        """List what pixels are enlarged by."""
        return list_upscalers(catalog)

    @router.get("/latent-upscale-modes")
    async def latent_modes() -> list[dict[str, str]]:
        """List what hires fix enlarges latents by."""
        return [{"name": name} for name in LATENT_MODES]

    @router.get("/embeddings")
    async def embeddings() -> dict[str, dict[str, Any]]:
        """List no words of textual inversion; a server has none."""
        return {"loaded": {}, "skipped": {}}

    @router.get("/scripts")
    async def scripts() -> dict[str, list[str]]:
        """List ControlNet, whose units are controls and image prompts, where there is one."""
        names = [SCRIPT] if catalog.controls or catalog.ip_adapters else []
        return {"txt2img": names, "img2img": names}

    @router.get("/cmd-flags")
    async def flags() -> dict[str, Any]:
        """Return the flags of Automatic1111 that this server is like."""
        return {"api": True, "nowebui": True}

    @router.get("/memory")
    async def memory() -> dict[str, Any]:
        """Return what the server's processes have in memory, and what there is, in bytes."""
        used = (resident_bytes(os.getpid()) or 0) + (engine.memory_bytes or 0)
        total = total_bytes() or used
        ram = {"free": max(total - used, 0), "used": used, "total": total}
        return {"ram": ram, "cuda": {"error": "unavailable"}}

    async def nothing() -> list[Any]:
        """List nothing: there is none here."""
        return []

    async def fresh() -> dict[str, Any]:
        """Do nothing: what is loaded is this server's own matter, and lists are fixed."""
        return {}

    for name in NONE_HERE:
        router.add_api_route(f"/{name}", nothing, name=name)
    for name in ALWAYS_FRESH:
        router.add_api_route(f"/{name}", fresh, methods=["POST"], name=name)
