"""Engines of the model that ships, and what OpenVINO made of them."""

from collections import Counter

import numpy as np

from engine.backends.settings import BackendSettings
from engine.engines import open_engine
from engine.graphs.graph import find_graph, graph_folders
from engine.model import Model, find_model

MODEL = Model.open(find_model("pictogram"))


def graph_of(part):
    return find_graph(part, MODEL.config(part), "float32", graph_folders(), MODEL.path)


def opened(part, backend, precision="float32", ranges=None):
    graph = graph_of(part)
    settings = BackendSettings(backend=backend, threads=1)
    return open_engine(graph, dict(MODEL.weights(part)), settings, precision, ranges)


def operations(engine):
    """List what the library calls the operations of a compiled model, and how it computes them."""
    for node in engine._compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        yield info["layerType"].astype(str), info["primitiveType"].astype(str)


def counted(engine):
    """Count the operations of a compiled model by what the library calls them."""
    return Counter(kind for kind, _ in operations(engine))


def step_inputs(height, width):
    rng = np.random.default_rng(0)
    return {
        "registers": rng.standard_normal(
            (1, 1, MODEL.vae.latent_channels, height, width), np.float32
        ),
        "matrices": np.array([[[0, 1, 0]]], np.float32),
        "timestep": np.array([500], np.float32),
        "input_scale": np.ones(1, np.float32),
        # as large as a text's: the layers that read larger ones round coarsely
        "context": rng.standard_normal((2, 1, 8, MODEL.unet.cross_attention_dim), np.float32) / 4,
        "guidance": np.float32([-4, 5]).reshape(2, 1, 1, 1, 1),
        "guidance_rescale": np.zeros(1, np.float32),
        "noise": np.zeros((1, MODEL.vae.latent_channels, height, width), np.float32),
        "mask": np.ones((1, 1, height, width), np.float32),
        "outside": np.zeros((1, 3), np.float32),
    }
