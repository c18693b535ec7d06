"""Pictures enlarged in tiles: no seams, sizes as asked for, transparency, and what is refused."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from engine.backends.settings import BackendSettings
from engine.configs.upscalers import CompactConfig, ESRGANConfig, SwinIRConfig
from engine.errors import BackendError, RequestError
from runtime.images import overlaps
from runtime.images.files import SOURCE_KEY
from runtime.images.upscaler import LARGEST_TILE, MAX_PIXELS, Upscaler, tile_side
from runtime.images.upscaling import parse_upscaler
from tests.support.tolerances import UPSCALER_SEAM
from tests.support.upscaler_files import COMPACT, ESRGAN, write_upscaler

SETTINGS = BackendSettings(threads=1)
TILE = 64


class Recorded:
    """An engine that notes the shapes of what it is given."""

    def __init__(self, engine):
        self.engine, self.shapes = engine, []

    def run(self, inputs):
        self.shapes.append(inputs["pixels"].shape)
        return self.engine.run(inputs)


def load(path, config=COMPACT, **options):
    return Upscaler.load(write_upscaler(path / "up.safetensors", config, **options))


@pytest.fixture(scope="module")
def compact(tmp_path_factory):
    return load(tmp_path_factory.mktemp("compact"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Repeats pixels, and does nothing else."""
    return load(tmp_path_factory.mktemp("plain"), scale=0.0)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Sees 40 pixels around each, more than two tiles share."""
    return load(tmp_path_factory.mktemp("deep"), ESRGAN, scale=0.1)


def gradient(width, height):
    down, across = np.mgrid[:height, :width]
    planes = (255 * across / width, 255 * down / height, 255 * (across + down) / (width + height))
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


def noise(width, height, channels=3):
    shape = (height, width, channels)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def difference(one, other):
    assert one.size == other.size
    return int(abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max())


@pytest.mark.parametrize("size", [(200, 150), (65, 200), (64, 64), (129, 66), (33, 300)])
def test_tiles_of_a_gradient_have_no_seams(deep, compact, plain, size):
    picture = gradient(*size)
    for upscaler in (deep, compact, plain):
        whole, tiled = upscaler(picture), replace(upscaler, tile=TILE)(picture)
        assert difference(whole, tiled) <= UPSCALER_SEAM


def test_a_cut_without_blending_would_be_seen(deep, monkeypatch):
    """The bound above is one that seams do not keep."""
    monkeypatch.setattr(overlaps, "EDGE", 0)
    monkeypatch.setattr(overlaps, "OVERLAP", 1)
    picture = gradient(200, 150)
    assert difference(deep(picture), replace(deep, tile=TILE)(picture)) > UPSCALER_SEAM


@pytest.mark.parametrize("size", [(200, 150), (65, 131), (512, 70)])
def test_tiles_of_a_busy_picture_fit(compact, plain, size):
    """What a network sees of its neighbours is within what tiles throw away."""
    for upscaler in (compact, plain):
        picture = noise(*size)
        assert difference(upscaler(picture), replace(upscaler, tile=TILE)(picture)) <= 1


def test_memory_is_that_of_a_tile(compact):
    recorded = Recorded(compact.engine)
    seen = []
    upscaler = replace(compact, engine=recorded, tile=TILE)
    upscaler(noise(300, 200), on_tile=lambda done, total: seen.append((done, total)))
    assert set(recorded.shapes) == {(1, 3, TILE, TILE)}
    assert seen == [(i + 1, len(recorded.shapes)) for i in range(len(recorded.shapes))]
    assert len(seen) > 20


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (ESRGANConfig(doublings=2), 230),
        (ESRGANConfig(doublings=2, unshuffle=2), LARGEST_TILE),
        (ESRGANConfig(doublings=3), 120),
        (CompactConfig(), LARGEST_TILE),
        (SwinIRConfig(upsampler="nearest+conv", embed_dim=240), 240),
    ],
)
def test_tiles_are_smaller_for_wider_networks(config, most):
    side = tile_side(config)
    assert 64 <= side <= most
    assert side % config.multiple == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (3, 2), (201, 7)])
@pytest.mark.parametrize("unshuffle", [1, 2])
def test_any_size_becomes_so_many_times_larger(tmp_path, size, unshuffle):
    config = replace(ESRGAN, num_block=1, doublings=2, unshuffle=unshuffle)
    upscaler = load(tmp_path, config)
    scale = 4 // unshuffle
    assert upscaler.scale == scale
    assert upscaler(noise(*size)).size == (scale * size[0], scale * size[1])


@pytest.mark.parametrize("size", [(1, 1), (9, 70), (130, 65)])
def test_windows_are_whole_in_every_tile(tmp_path, size):
    """SwinIR takes whole windows alone: a picture is continued at its edges, and cut again."""
    groups = {"embed_dim": 12, "depths": (2,), "num_heads": (2,), "hidden_dim": 12}
    config = SwinIRConfig(**groups, window_size=8, upsampler="pixelshuffledirect", upscale=3)
    upscaler = load(tmp_path, config, scale=0.05)
    recorded = Recorded(upscaler.engine)
    larger = replace(upscaler, engine=recorded, tile=TILE)(gradient(*size))
    assert larger.size == (3 * size[0], 3 * size[1])
    assert all(side % 8 == 0 and side <= TILE for shape in recorded.shapes for side in shape[2:])


@pytest.mark.parametrize(
    ("factor", "passes", "size"),
    [
        (None, 1, (20, 14)),
        (1, 1, (10, 7)),
        (1.5, 1, (15, 10)),
        (2, 1, (20, 14)),
        (3, 2, (30, 21)),
        (4, 2, (40, 28)),
        (16, 4, (160, 112)),
    ],
)
def test_a_factor_is_reached(compact, factor, passes, size):
    recorded = Recorded(compact.engine)
    larger = replace(compact, engine=recorded)(noise(10, 7), factor)
    assert larger.size == size
    assert len(recorded.shapes) == passes
    assert max(shape[2] for shape in recorded.shapes) <= max(size[1] // 2 + 1, 7)


def test_a_scale_of_one_restores_once(tmp_path):
    upscaler = load(tmp_path, replace(COMPACT, upscale=1))
    recorded = Recorded(upscaler.engine)
    assert replace(upscaler, engine=recorded)(noise(9, 8), 3).size == (27, 24)
    assert len(recorded.shapes) == 1


def test_transparency_and_what_it_is_are_kept(plain):
    picture = noise(9, 8, 4)
    picture.info = {SOURCE_KEY: "compositeWithTrainedAlgorithmicMedia", "prompt": "hidden"}
    larger = plain(picture)
    assert larger.mode == "RGBA"
    assert larger.info == {SOURCE_KEY: "compositeWithTrainedAlgorithmicMedia"}
    colours = np.asarray(picture)[..., :3].repeat(2, 0).repeat(2, 1)
    assert np.array_equal(np.asarray(larger)[..., :3], colours)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK", "I;16", "RGB"])
def test_pictures_of_every_mode(plain, mode):
    picture = Image.new(mode, (5, 4), 1)
    assert plain(picture).size == (10, 8)


def test_what_would_be_too_large_is_refused_before_any_work(compact):
    recorded = Recorded(compact.engine)
    upscaler = replace(compact, engine=recorded)
    picture = Image.new("RGB", (2048, 2048))
    with pytest.raises(RequestError, match=f"32768 x 32768 pixels, and {MAX_PIXELS} in all"):
        upscaler(picture, 16)
    with pytest.raises(RequestError, match="factor is 17; give a number from 1 to 16"):
        upscaler(picture, 17)
    with pytest.raises(RequestError, match="image came as ndarray"):
        upscaler(np.zeros((4, 4, 3), np.uint8))
    assert not recorded.shapes


def test_what_the_backend_does_not_offer(tmp_path):
    path = write_upscaler(tmp_path / "up.safetensors")
    with pytest.raises(BackendError, match="does not compute in bfloat16"):
        Upscaler.load(path, precision="bfloat16", settings=SETTINGS)
    on_gpu = Upscaler.load(path, settings=BackendSettings(backend="cuda"))
    assert on_gpu(noise(4, 4)).size == (8, 8)


@pytest.mark.parametrize(
    ("text", "path", "factor"),
    [
        ("up.pth", "up.pth", None),
        ("up.pth:2", "up.pth", 2),
        ("a:b/up.pth:1.5", "a:b/up.pth", 1.5),
        (r"C:\up.pth", r"C:\up.pth", None),
        ("a:b", "a:b", None),
    ],
)
def test_an_option_is_parted(text, path, factor):
    choice = parse_upscaler(text)
    assert (str(choice.path), choice.factor) == (path, factor)


@pytest.mark.parametrize("text", ["", ":2", "a\0b", "up.pth:0.5", "up.pth:17", "up.pth:nan"])
def test_what_is_no_option(text):
    with pytest.raises(RequestError):
        parse_upscaler(text)


MEASURED = """
import sys
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from PIL import Image
from engine.backends.settings import BackendSettings
from runtime.images.upscaler import Upscaler

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

class Twice:
    def __init__(self, engine):
        self.engine, self.runs = engine, 0

    def run(self, inputs):
        self.runs += 1
        if self.runs <= 2:
            self.found = self.engine.run(inputs)
        return self.found

upscaler = Upscaler.load(sys.argv[1], settings=BackendSettings(threads=2))
upscaler = replace(upscaler, engine=Twice(upscaler.engine))
before = peak()
larger = upscaler(Image.new("RGB", (512, 512), "gray"))
print(larger.size, upscaler.engine.runs, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="where the kernel says the peak")
def test_the_memory_of_512_to_2048(tmp_path):
    """Real-ESRGAN x4plus, random weights; all tiles are of one size, and two are computed."""
    path = write_upscaler(tmp_path / "x4plus.safetensors", ESRGANConfig(doublings=2), scale=0.01)
    command = [sys.executable, "-c", MEASURED, str(path)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    print(f"x4plus, 512 to 2048: {int(said.split()[-1]) / 2**20:.0f} MiB beyond the weights")
    assert said.startswith("(2048, 2048) 9 ")
    assert int(said.split()[-1]) < 2**31
