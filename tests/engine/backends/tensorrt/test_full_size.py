"""Engines of the published architectures at their full size, from random weights (`-m slow`).

Needs 18 GB of memory and 7 GB of disk for XL.
"""

import math
import zlib

import numpy as np
import pytest
import safetensors.numpy

from engine.backends.tensorrt.build import build
from engine.backends.tensorrt.build_request import BuildRequest, BuildSettings
from engine.backends.tensorrt.profiles import Profile, Range
from engine.graphs.graph import find_graph, graph_folders
from engine.graphs.steering import CONTROLLED_LEVELS
from engine.model import COMPONENTS, Model
from tests.support import original_layout as original
from tests.support.tolerances import ENGINE_BYTES, ENGINE_PEAK, ENGINE_SPARE

pytestmark = pytest.mark.slow

FILES = {  # the family and the side in pixels
    "v1-5-pruned-emaonly": ("sd1", 512),
    "v2-1_768-ema-pruned": ("sd2", 768),
    "sd_xl_base_1.0": ("xl", 1024),
}


def random_tensors(names):
    """No two alike: the library finds equal weights and keeps them once."""
    pool, tensors = np.random.default_rng(0).standard_normal(2**24).astype(np.float16), {}
    for name, shape in names.items():
        start, size = zlib.crc32(name.encode()) % 2**20, math.prod(shape)
        values = np.resize(pool[start : start + size], shape)
        scale = np.float16(1 / math.sqrt(math.prod(shape[1:])))  # activations keep their size
        tensors[name] = np.asarray(values * scale)
    return tensors


@pytest.mark.parametrize("stem", list(FILES))
def test_every_part_is_built(stem, tmp_path):
    family, side = FILES[stem]
    path = tmp_path / f"{stem}.safetensors"
    tensors = random_tensors(original.model_names(original.FULL[family]))
    safetensors.numpy.save_file(tensors, path)
    del tensors
    model, sides = Model.open(path), Range(side, side, side)
    settings = BuildSettings(profiles=(Profile(height=sides, width=sides),), target="sm89")
    usual = (part for part in COMPONENTS if part not in (*CONTROLLED_LEVELS, "step_shrunk"))
    for part in (part for part in usual if COMPONENTS[part] in model.configs):
        graph = find_graph(part, model.config(part), "float16", graph_folders(), path)
        request = BuildRequest(
            library="tensorrt_rtx", part=part, graph=graph.path, model=path, settings=settings
        )
        built = build(request, tmp_path / "engine")
        weights = 2 * sum(math.prod(shape) for shape in graph.weights.values())
        assert weights <= built.nbytes <= ENGINE_BYTES * weights + ENGINE_SPARE
        assert built.peak_bytes <= ENGINE_PEAK * weights + ENGINE_SPARE
