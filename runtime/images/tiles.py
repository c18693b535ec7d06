"""Large pictures through the autoencoder in tiles, whose overlaps are blended.

The memory that an autoencoder needs grows with the picture, its attention's with the square of it.
A picture larger than models are trained on is therefore cut into tiles of a fixed size.

Tiles are not exact: a group norm takes its mean and variance from what it sees, and a tile is not
the whole picture, so tiles differ in colour and contrast. Two things bring them together:
- each tile is computed beside a thumbnail of the whole picture, half as large as the tile, whose
  own result is thrown away: so the norms see the rest of the picture;
- a number is added to each channel of each tile, such that neighbours agree on the mean of what
  both hold (as exposures are compensated in Brown and Lowe 2007, "Automatic Panoramic Image
  Stitching using Invariant Features", section 6).
Against decoding whole, eight pictures of 512 to 1024 pixels, tiles of 256, with the model that
ships: blending alone 28 dB (18 to 40), as in diffusers; with the two 35 dB (29 to 40).

Sizes are those of latents, unless a name says pixels; one latent is `compression` pixels wide.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import FindEngine
from engine.devices.device import DeviceArray, HostOrDeviceArray, on_host
from engine.errors import RequestError
from engine.graphs.seamless import AXES
from engine.graphs.variants import Variant

# Up to this area a picture is computed whole: 1024 × 1024 pixels, which is what XL is trained on.
WHOLE = 128 * 128
# The side of a tile; what is computed at once is half as large again. Beyond its weights the
# autoencoder of Stable Diffusion in float32 on ONNX Runtime takes, to decode 2048 × 2048 pixels,
# 0.9 GiB in tiles of 48, 1.6 GiB in tiles of 56 and 1.8 GiB in tiles of 64; encoding takes half.
TILE = 56
SMALLEST_TILE = 8

Run = Callable[[Mapping[str, Any]], dict[str, NDArray[Any]]]
Array = NDArray[Any]
Cut = tuple[slice, slice]  # rows and columns


def decode(
    run: Run, latents: HostOrDeviceArray, compression: int, *, tile: int | None = None
) -> NDArray[np.uint8]:
    """Decode latents (B, C, h, w) into pixels (B, H, W, 3), uint8, in tiles where it must be.

    run: `vae_decoder`'s engine, where the latents are; compression: pixels along one side of one
    tile: the side of a tile, to have all larger pictures cut; None cuts only the largest
    Raises RequestError for a tile that is too small, BackendError when the engine fails.
    """
    side = _side(latents.shape[2:], tile)
    if side is None:
        if not isinstance(latents, DeviceArray):
            latents = np.ascontiguousarray(latents)
        whole: Array = run({"latents": latents})["pixels"]
        return whole

    def decode_tile(image: Array) -> Array:
        decoded: Array = run({"latents": _channels_first(image)})["pixels"][0]
        return decoded

    images = (
        _tiled(decode_tile, [np.moveaxis(image, 0, -1)], side, compression)
        for image in on_host(latents)
    )
    return np.stack([_as_bytes(image) for image in images])


def encode(
    run: Run,
    pixels: NDArray[np.uint8],
    noise: NDArray[np.float32],
    compression: int,
    *,
    tile: int | None = None,
) -> NDArray[np.float32]:
    """Encode pixels (B, H, W, 3), uint8, into latents (B, C, h, w), in tiles where it must be.

    run: `vae_encoder`'s engine; noise: (B, C, h, w), of the posterior, one field for all tiles
    compression, tile and what is raised: as for `decode`
    """
    side = _side(noise.shape[2:], tile)
    if side is None:
        whole: Array = run({"pixels": pixels, "noise": noise})["latents"]
        return whole

    def encode_tile(image: Array, drawn: Array) -> Array:
        inputs = {"pixels": np.ascontiguousarray(image[None]), "noise": _channels_first(drawn)}
        return np.moveaxis(run(inputs)["latents"][0], 0, -1)

    latents = [
        _tiled(encode_tile, [image, np.moveaxis(drawn, 0, -1)], side, 1)
        for image, drawn in zip(pixels, noise, strict=True)
    ]
    return np.ascontiguousarray(np.moveaxis(np.stack(latents), -1, 1))


def decode_seamless(
    engine: FindEngine, latents: NDArray[np.float32], compression: int, along: str
) -> NDArray[np.uint8]:
    """Decode latents (B, C, h, w) whose opposite edges join into pixels (B, H, W, 3), uint8.

    engine: returns that of `vae_decoder`, and of a variant; along: "x", "y" or "both"
    Tiles reach beyond the edges, to the other side. Raises BackendError when an engine fails.
    """
    if _side(latents.shape[2:], None) is None:
        run = engine("vae_decoder", Variant(seamless=along)).run
        return decode(run, latents, compression)
    margins = _margins(latents.shape[2:], along)
    wider = np.pad(latents, ((0, 0), (0, 0), *((margin,) * 2 for margin in margins)), mode="wrap")
    pixels = decode(engine("vae_decoder").run, wider, compression)
    for axis, margin in enumerate(margins, start=1):
        pixels = _folded(pixels, axis, compression * margin)
    return pixels


def encode_seamless(
    engine: FindEngine,
    pixels: NDArray[np.uint8],
    noise: NDArray[np.float32],
    compression: int,
    along: str,
) -> NDArray[np.float32]:
    """Encode pixels (B, H, W, 3), uint8, whose opposite edges join into latents (B, C, h, w).

    engine and along: as for `decode_seamless`; noise: as for `encode`
    """
    if _side(noise.shape[2:], None) is None:
        run = engine("vae_encoder", Variant(seamless=along)).run
        return encode(run, pixels, noise, compression)
    margins = _margins(noise.shape[2:], along)
    sides = [(margin,) * 2 for margin in margins]
    wider = np.pad(noise, ((0, 0), (0, 0), *sides), mode="wrap")
    sides = [(compression * margin,) * 2 for margin in margins]
    larger = np.pad(pixels, ((0, 0), *sides, (0, 0)), mode="wrap")
    latents = encode(engine("vae_encoder").run, larger, wider, compression)
    for axis, margin in enumerate(margins, start=2):
        latents = _folded(latents, axis, margin)
    return np.ascontiguousarray(latents)


def _margins(size: tuple[int, ...], along: str) -> list[int]:
    """Return how far tiles reach beyond the edges of (h, w) latents, along each axis."""
    return [
        min(TILE // 2, side // 2) if axis in AXES[along] else 0
        for axis, side in enumerate(size, start=2)
    ]


def _folded(array: Array, axis: int, margin: int) -> Array:
    """Fade what lies beyond the edges along an axis into the other side, and cut it off.

    Tiles at the two ends are offset on their own, so that what both show is not quite the same.
    """
    if not margin:
        return array
    whole = np.moveaxis(array, axis, 0)
    inside = whole[margin:-margin].astype(np.float32)
    own = (0.5 + (np.arange(margin, dtype=np.float32) + 0.5) / (2 * margin)).reshape(
        -1, *[1] * (array.ndim - 1)
    )
    first = own * inside[:margin] + (1 - own) * whole[-margin:]
    last = own[::-1] * inside[-margin:] + (1 - own[::-1]) * whole[:margin]
    inside[:margin], inside[-margin:] = first, last
    if array.dtype == np.uint8:
        return np.moveaxis(_as_bytes(inside), 0, axis)
    return np.moveaxis(inside, 0, axis)


def _side(size: tuple[int, ...], tile: int | None) -> int | None:
    """Return the side of the tiles to cut into, or None for the whole picture."""
    if tile is None:
        return TILE if math.prod(size) > WHOLE else None
    if tile < SMALLEST_TILE:
        raise RequestError(
            f"the tile is {tile}; give a whole number of latents from {SMALLEST_TILE}, "
            "or leave it out"
        )
    return tile if max(size) > tile else None


def _as_bytes(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round in place: copies of a large picture would count."""
    return np.rint(image, out=image).clip(0, 255, out=image).astype(np.uint8)


def _channels_first(array: Array) -> Array:
    return np.ascontiguousarray(np.moveaxis(array, -1, 0)[None])


def _tiled(
    compute: Callable[..., Array], sources: Sequence[Array], side: int, scale: int
) -> NDArray[np.float32]:
    """Compute one picture in tiles and blend them; arrays are (rows, columns, channels).

    sources: what `compute` takes, the last as large as the latents
    scale: how much larger the result is than the latents
    """
    height, width = sources[-1].shape[:2]
    rows, columns = _cuts(height, side), _cuts(width, side)
    cuts = list(product(rows, columns))
    tiles = _compute(compute, sources, cuts, scale)
    places = [_scaled(cut, scale) for cut in cuts]
    windows = product(_windows(rows, scale), _windows(columns, scale))
    blended = np.zeros((scale * height, scale * width, tiles[0].shape[2]), np.float32)
    for tile, offset, place, (down, across) in zip(
        tiles, _offsets(tiles, places), places, windows, strict=True
    ):
        blended[place] += (tile + offset) * np.multiply.outer(down, across)[:, :, None]
    return blended


def _compute(
    compute: Callable[..., Array], sources: Sequence[Array], cuts: Sequence[Cut], scale: int
) -> list[Array]:
    """Compute each tile beside a thumbnail, and cut that off again."""
    size = sources[-1].shape[:2]
    shape = [part.stop for part in cuts[0]]
    axis = 0 if shape[0] < size[0] else 1
    length = shape[axis]
    shape[axis] = length // 2
    scales = [len(source) // size[0] for source in sources]
    thumbnails = [_thumbnail(source, shape, k) for source, k in zip(sources, scales, strict=True)]
    tiles = []
    for cut in cuts:
        last = cut[axis].stop == size[axis]
        pairs = [
            (source[_scaled(cut, k)], thumbnail)
            for source, thumbnail, k in zip(sources, thumbnails, scales, strict=True)
        ]
        # Beside the tile's inner edge, which has little weight: the picture's own stays an edge.
        joined = [np.concatenate(pair[::-1] if last else pair, axis) for pair in pairs]
        kept = slice(-scale * length, None) if last else slice(scale * length)
        result = compute(*joined)
        tiles.append((result[kept] if axis == 0 else result[:, kept]).copy())
    return tiles


def _cuts(size: int, side: int) -> list[slice]:
    """Cut an axis into evenly spread tiles that overlap by at least a quarter."""
    side = min(side, size)
    count = math.ceil((size - side // 4) / (side - side // 4))
    starts = [round(i * (size - side) / max(count - 1, 1)) for i in range(count)]
    return [slice(start, start + side) for start in starts]


def _windows(cuts: Sequence[slice], scale: int) -> list[NDArray[np.float32]]:
    """Weigh the tiles along an axis, (side · scale,) each; weights sum to 1 everywhere.

    Over a quarter of a tile they fall to its edge as the square of a cosine does.
    """
    side = cuts[0].stop
    places = np.arange(scale * side) + 0.5
    to_edge = np.minimum(places, places[::-1]) / (scale * max(side // 4, 1))
    window = np.sin(np.pi / 2 * np.minimum(to_edge, 1)) ** 2
    total = np.zeros(scale * cuts[-1].stop)
    for cut in cuts:
        total[scale * cut.start : scale * cut.stop] += window
    return [
        (window / total[scale * cut.start : scale * cut.stop]).astype(np.float32) for cut in cuts
    ]


def _thumbnail(source: Array, shape: Sequence[int], scale: int) -> Array:
    """Take evenly spread samples: a mean of them would have another variance."""
    rows, columns = (
        np.linspace(0, size - 1, scale * wanted).round().astype(int)
        for size, wanted in zip(source.shape[:2], shape, strict=True)
    )
    sampled: Array = source[rows[:, None], columns]
    return sampled


def _offsets(tiles: Sequence[Array], places: Sequence[Cut]) -> NDArray[np.float32]:
    """Return what to add to each tile, (tiles, channels), so that overlaps agree in their mean.

    Least squares, each pair with the weight of its area; of all solutions the one of mean 0.
    """
    equations, differences = [], []
    for i, j in combinations(range(len(tiles)), 2):
        shared = tuple(_shared(a, b) for a, b in zip(places[i], places[j], strict=True))
        area = math.prod(max(cut.stop - cut.start, 0) for cut in shared)
        if area:
            first, second = (
                tiles[k][tuple(_within(a, b) for a, b in zip(shared, places[k], strict=True))]
                for k in (i, j)
            )
            difference = second.mean(axis=(0, 1)) - first.mean(axis=(0, 1))
            equation = np.zeros(len(tiles))
            equation[i], equation[j] = 1, -1
            equations.append(math.sqrt(area) * equation)
            differences.append(math.sqrt(area) * difference)
    solved: Array = np.linalg.lstsq(np.array(equations), np.array(differences), rcond=None)[0]
    return solved.astype(np.float32)


def _shared(a: slice, b: slice) -> slice:
    return slice(max(a.start, b.start), min(a.stop, b.stop))


def _within(inner: slice, outer: slice) -> slice:
    return slice(inner.start - outer.start, inner.stop - outer.start)


def _scaled(cut: Cut, scale: int) -> Cut:
    rows, columns = (slice(scale * part.start, scale * part.stop) for part in cut)
    return rows, columns
