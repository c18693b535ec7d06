import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from engine.backends.settings import BackendSettings
from engine.engines import open_engine
from engine.errors import RequestError
from engine.graphs.graph import find_graph, graph_folders
from engine.model import Model, find_model
from runtime.images import tiles
from tests.support.pictures import drawing, psnr
from tests.support.tolerances import (
    TILE_EDGE,
    TILED_LATENTS_RTOL,
    TILED_NOISE,
    TILED_PSNR_DB,
    TILED_SUM,
)

TILE = 24


class LocalEngine:
    """An autoencoder whose latents see no neighbours, so that tiles must fit without a trace."""

    def __init__(self, compression=8):
        self.compression, self.shapes = compression, []

    def decode(self, inputs):
        latents = inputs["latents"]
        assert latents.flags.c_contiguous
        self.shapes.append(latents.shape)
        values = (latents[:, :3] * 20 + 128).clip(0, 255).astype(np.uint8)
        for axis in (2, 3):
            values = values.repeat(self.compression, axis)
        return {"pixels": np.ascontiguousarray(values.transpose(0, 2, 3, 1))}

    def encode(self, inputs):
        pixels, noise = inputs["pixels"], inputs["noise"]
        assert pixels.flags.c_contiguous
        assert noise.flags.c_contiguous
        self.shapes.append(noise.shape)
        step = self.compression
        mean = pixels[:, ::step, ::step].transpose(0, 3, 1, 2) / np.float32(255)
        return {"latents": np.concatenate([mean, mean[:, :1]], axis=1) + noise}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def noisy_picture(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def engines():
    """The autoencoder of the model that ships."""
    model = Model.open(find_model("pictogram"))
    settings = BackendSettings(backend="cpu", threads=1)
    return {
        part: open_engine(
            find_graph(part, model.config(part), "float32", graph_folders(), model.path),
            model.weights(part),
            settings,
        )
        for part in ("vae_decoder", "vae_encoder")
    }


@pytest.fixture(scope="module")
def pixels():
    return np.asarray(drawing(384, 320))[None].copy()


@pytest.fixture(scope="module")
def latents(engines, pixels):
    inputs = {"pixels": pixels, "noise": np.zeros((1, 8, 48, 40), np.float32)}
    return engines["vae_encoder"].run(inputs)["latents"]


@pytest.mark.parametrize(
    ("height", "width", "calls"),
    [(256, 256, 36), (256, 128, 18), (1024, 17, 25), (130, 127, 9), (128, 128, 1), (64, 256, 1)],
)
def test_only_the_largest_pictures_are_cut(height, width, calls):
    engine = LocalEngine(compression=1)
    tiles.decode(engine.decode, normal(1, 4, height, width), 1)
    assert len(engine.shapes) == calls
    whole = height * width <= tiles.WHOLE
    tall = tiles.TILE * 3 // 2  # with its thumbnail
    largest = (height, width) if whole else (min(height, tall), min(width, tiles.TILE))
    assert set(engine.shapes) == {(1, 4, *largest)}
    tiles.encode(engine.encode, noisy_picture(1, height, width, 3), normal(1, 4, height, width), 1)
    assert engine.shapes[calls:] == engine.shapes[:calls]


@pytest.mark.parametrize("size", [(64, 48), (33, 32), (2, 40), (100, 3)])
@pytest.mark.parametrize("tile", [8, 13, 32])
def test_tiles_of_what_sees_no_neighbours_fit_without_a_trace(size, tile):
    engine = LocalEngine()
    latents = normal(2, 4, *size)
    whole = engine.decode({"latents": latents})["pixels"]
    assert (tiles.decode(engine.decode, latents, 8, tile=tile) == whole).all()
    pixels, noise = noisy_picture(2, 8 * size[0], 8 * size[1], 3), normal(2, 4, *size, seed=1)
    expected = engine.encode({"pixels": pixels, "noise": noise})["latents"]
    given = tiles.encode(engine.encode, pixels, noise, 8, tile=tile)
    assert given.dtype == np.float32
    np.testing.assert_allclose(given, expected, atol=TILED_SUM)


def test_what_fits_one_tile_is_not_cut(engines, latents, pixels):
    latents, pixels = latents[:, :, :16, :12].copy(), pixels[:, :128, :96].copy()
    run = engines["vae_decoder"].run
    whole = run({"latents": latents})["pixels"]
    for tile in (None, 16, 64):
        assert (tiles.decode(run, latents, 8, tile=tile) == whole).all()
    noise = normal(*latents.shape)
    run = engines["vae_encoder"].run
    whole = run({"pixels": pixels, "noise": noise})["latents"]
    for tile in (None, 16, 64):
        assert (tiles.encode(run, pixels, noise, 8, tile=tile) == whole).all()


def test_a_tile_too_small_is_refused():
    with pytest.raises(RequestError, match="the tile is 7; give a whole number of latents from 8"):
        tiles.decode(LocalEngine().decode, normal(1, 4, 16, 16), 8, tile=7)
    with pytest.raises(RequestError, match="the tile is 0"):
        tiles.encode(LocalEngine().encode, noisy_picture(1, 8, 8, 3), normal(1, 4, 1, 1), 8, tile=0)


def test_tiles_are_as_near_to_the_whole_picture_as_those_of_diffusers(engines, latents):
    run = engines["vae_decoder"].run
    reference = AutoencoderKL.from_pretrained(find_model("pictogram") / "vae", dtype=torch.float32)
    reference.enable_tiling()
    reference.tile_latent_min_size, reference.tile_sample_min_size = TILE, 8 * TILE
    with torch.no_grad():
        decoded = reference.decode(torch.from_numpy(latents)).sample
    theirs = (decoded * 127.5 + 127.5).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    whole = run({"latents": latents})["pixels"]
    ours = tiles.decode(run, latents, 8, tile=TILE)
    assert psnr(ours, whole) >= max(psnr(theirs, whole), TILED_PSNR_DB)


def test_encoded_tiles_draw_from_one_field_of_noise(engines, latents, pixels):
    run = engines["vae_encoder"].run
    none, noise = np.zeros_like(latents), normal(*latents.shape)
    mean = tiles.encode(run, pixels, none, 8, tile=TILE)
    assert np.linalg.norm(mean - latents) < TILED_LATENTS_RTOL * np.linalg.norm(latents)
    drawn = tiles.encode(run, pixels, noise, 8, tile=TILE)
    whole = run({"pixels": pixels, "noise": noise})["latents"]
    correlation = np.corrcoef((drawn - mean).ravel(), (whole - latents).ravel())[0, 1]
    assert correlation > TILED_NOISE


def test_no_edge_is_seen_where_tiles_meet(engines):
    ramp = np.linspace(60, 200, 384).astype(np.uint8)
    smooth = np.broadcast_to(
        (ramp[:, None] // 2 + ramp[None] // 2)[None, ..., None], (1, 384, 384, 3)
    )
    inputs = {"pixels": smooth.copy(), "noise": np.zeros((1, 8, 48, 48), np.float32)}
    latents = engines["vae_encoder"].run(inputs)["latents"]
    run = engines["vae_decoder"].run
    blended = tiles.decode(run, latents, 8, tile=TILE)
    halves = [latents[:, :, :TILE], latents[:, :, TILE:]]
    abutted = np.concatenate([run({"latents": half.copy()})["pixels"] for half in halves], axis=1)
    assert edge(blended) < TILE_EDGE < edge(abutted)


def edge(pixels):
    """Return the largest step between rows where a tile begins or ends, over the usual one."""
    steps = np.abs(np.diff(pixels[0].astype(float), axis=0)).mean(axis=(1, 2))[7::8]
    ends = [TILE // 2 - 1, TILE - 1, 3 * TILE // 2 - 1]
    return steps[ends].max() / np.median(steps)


MEASURED = """
import re, sys
from pathlib import Path
import numpy as np
from engine.backends.settings import BackendSettings
from engine.engines import open_engine
from engine.configs.diffusion import AutoencoderConfig
from engine.graphs.graph import find_graph, graph_folders
from runtime.images import tiles

def resident(what):
    return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def first_calls(inputs):
    # All tiles have one shape: after a few the engine's memory has grown as far as it will, and
    # the others, a quarter of an hour of them, may have the last one's result.
    if len(results) < 4:
        results.append(engine.run(inputs))
    return results[-1]

def run(size):
    results.clear()
    noise = rng.standard_normal((1, 4, size, size), np.float32)
    if part == "vae_decoder":
        return tiles.decode(first_calls, noise, 8)
    return tiles.encode(first_calls, np.zeros((1, 8 * size, 8 * size, 3), np.uint8), noise, 8)

part, rng, results = sys.argv[1], np.random.default_rng(0), []
graph = find_graph(part, AutoencoderConfig(), "float32", graph_folders(), Path("random"))
weights = {
    name: np.float32(np.prod(shape[1:]) ** -0.5) * rng.standard_normal(shape, np.float32)
    for name, shape in graph.weights.items()
}
engine = open_engine(graph, weights, BackendSettings())
run(4)
before = resident("VmRSS")
made = run(256)
print(made.shape[1:3], resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("part", "size"), [("vae_decoder", 2048), ("vae_encoder", 4)])
def test_the_memory_of_a_picture_of_2048_by_2048_pixels(part, size):
    """A Stable Diffusion 1.5 autoencoder, random weights: what is needed beyond the weights."""
    command = [sys.executable, "-c", MEASURED, part]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    taken = int(said.split()[-1])
    print(f"{part}, 2048 × 2048: {taken / 2**20:.0f} MiB beyond the weights")
    assert said.startswith(f"({size}, ")
    assert taken < 2**31
