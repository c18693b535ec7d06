"""Quantised files and small UNets of published sizes, random numbers (`-m slow`).

A model in GGUF draws, and takes as much memory as from a float16 file; UNets of fewer blocks
compute what diffusers' do. What the machine has too little memory for is skipped.
"""

import gc
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks.race import available_bytes
from engine.backends.settings import BackendSettings
from engine.checkpoints.pieces import open_piece
from engine.engines import open_engine
from engine.graphs.graph import find_graph, graph_folders
from export.parity import relative_error
from tests.support import published_configs as published
from tests.support.full_size_files import KINDS, write_float16, write_gguf
from tests.support.original_layout import FULL, model_names
from tests.support.tolerances import CHECKPOINT_RTOL

pytestmark = pytest.mark.slow

GIB = 2**30
MOST_SHARE = 1.2  # of the peak memory of the same model from a float16 file
NEEDED = {  # memory that must be free to draw in a backend's own precision
    ("sd1", "cpu"): 8 * GIB,
    ("sd1", "openvino"): 8 * GIB,
    ("xl", "cpu"): 20 * GIB,
    ("xl", "openvino"): 16 * GIB,
}
DRAW = """
import json, sys
import numpy as np
from benchmarks.machine import peak_bytes
from engine.backends.settings import BackendSettings
from runtime import Pipeline
path, backend = sys.argv[1:]
pipeline = Pipeline.load(path, settings=BackendSettings(backend=backend))
drawn = pipeline("a lighthouse", seed=7, num_inference_steps=2, height=256, width=256)
image = np.asarray(drawn.images[0])
print(json.dumps({"peak": peak_bytes(), "shape": image.shape, "spread": float(image.std())}))
"""


def drawn(path, backend):
    """Draw in a process of its own; returns its peak memory in bytes."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", DRAW, str(path), backend], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["shape"] == [256, 256, 3]
    assert told["spread"] > 5, "not one colour"
    return told["peak"]


@pytest.mark.parametrize(("family", "backend"), NEEDED)
def test_a_quantised_model_takes_no_more_memory(family, backend, tmp_path):
    if (free := available_bytes()) < NEEDED[family, backend]:
        pytest.skip(f"{free / GIB:.0f} GiB of memory are free")
    names = {name: shape for name, shape in model_names(FULL[family]).items() if shape}
    path = write_float16(tmp_path / "plain.safetensors", names)
    plain = drawn(path, backend)
    print(f"{family}, {backend}: {plain / GIB:.2f} GiB from float16")
    path.unlink()
    for kind in (KINDS.Q8_0, KINDS.Q4_K):
        path = write_gguf(tmp_path / f"{kind.name}.gguf", names, kind)
        peak = drawn(path, backend)
        print(f"{family}, {backend}: {peak / GIB:.2f} GiB from {kind.name}, {peak / plain:.2f}")
        path.unlink()
        assert peak <= MOST_SHARE * plain


@pytest.mark.parametrize("name", published.DISTILLED)
@torch.no_grad()
def test_a_distilled_unet_computes_what_diffusers_does(name, tmp_path):
    values = published.DISTILLED[name]
    torch.manual_seed(0)
    reference = UNet2DConditionModel.from_config(values).eval()
    for parameter in reference.parameters():  # as it is stored, so that both have the same
        parameter.data = parameter.data.half().float()
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 32, 24, generator=generator)
    context = torch.randn(1, 77, values["cross_attention_dim"], generator=generator)
    inputs = {
        "registers": sample[:, None].numpy(),
        "matrices": np.array([[[0, 1, 0]]], np.float32),  # what the UNet gives, and nothing else
        "timestep": np.array([500], np.float32),
        "input_scale": np.ones(1, np.float32),
        "context": context[None].numpy(),
        "guidance": np.ones((1, 1, 1, 1, 1), np.float32),
        "guidance_rescale": np.zeros(1, np.float32),
        "noise": np.zeros((1, 4, 32, 24), np.float32),
        "mask": np.ones((1, 1, 32, 24), np.float32),
        "outside": np.zeros((1, 3), np.float32),
    }
    added = None
    if values.get("addition_embed_type"):
        text_embeds = torch.randn(1, 1280, generator=generator)
        time_ids = torch.tensor([[1024.0, 768, 0, 0, 1024, 768]])
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        inputs |= {"text_embeds": text_embeds[None].numpy(), "time_ids": time_ids[None].numpy()}
    expected = reference(sample, 500, context, added_cond_kwargs=added).sample.numpy()[:, None]
    reference.half().save_pretrained(tmp_path / "unet")
    del reference
    gc.collect()
    _, config, component = open_piece(tmp_path / "unet")
    graph = find_graph("step", config, "float32", graph_folders(), tmp_path)
    given = open_engine(graph, component, BackendSettings()).run(inputs)["next_registers"]
    error = relative_error(given, expected)
    print(f"{name}: {error:.1e}")
    assert expected.std() > 0.01
    assert error < CHECKPOINT_RTOL
