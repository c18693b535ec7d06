"""The graphs that ship: of exactly the published architectures, with exactly their weights."""

from collections import Counter
from dataclasses import replace

import onnx
import pytest

from engine.checkpoints.families.sd import SD1
from engine.configs.control_net import control_net_of
from engine.configs.diffusion import (
    AutoencoderConfig,
    TextEncoderConfig,
    TinyAutoencoderConfig,
    UNetConfig,
)
from engine.graphs.graph import find_graph
from engine.graphs.steering import CONTROLLED_LEVELS, IP_PARTS
from engine.model import COMPONENTS, Model
from engine.shipped import GRAPHS
from export.published import precisions, published_parts
from tests.support import published_configs as published
from tests.support.original_layout import (
    DISTILLED,
    FULL,
    editing,
    inpainting,
    model_names,
    write_sparse,
)

PARTS = list(published_parts())
BASE = (published.UNET_SD15, published.UNET_SD21, published.UNET_XL, published.UNET_REFINER)
UNETS = [
    *BASE,
    *(BASE[i] | {"in_channels": 9} for i in range(3)),
    BASE[0] | {"in_channels": 8},
    *(BASE[i] | {"time_cond_proj_dim": 256} for i in (0, 2)),
    *published.DISTILLED.values(),
]
TEXTS = [published.TEXT_SD15, published.TEXT_SD21, published.TEXT_XL_2]


OTHERS = {"control": "control_hint", "control_hint": "control"}


def keys(part):
    return [config.key() for name, config in PARTS if name == part]


def test_the_architectures_are_those_of_the_published_configurations():
    expected = {UNetConfig.from_dict(values).key() for values in UNETS}
    assert sorted(keys("step")) == sorted(keys("step_shallow")) == sorted(expected)
    unet = UNetConfig.from_dict(published.UNET_SD15)
    assert keys("step_controlled") == keys("step_shallow_controlled") == [unet.key()]
    for part in ("step_shrunk", *IP_PARTS):
        assert keys(part) == [unet.key()]
    assert keys("control") == keys("control_hint") == [control_net_of(unet).key()]
    expected = {TextEncoderConfig.from_dict(values).key() for values in TEXTS}
    assert sorted(keys("text_encoder")) == sorted(expected)
    vaes = (published.VAE_SD15, published.VAE_XL)
    expected = {AutoencoderConfig.from_dict(values).key() for values in vaes}
    expected.add(TinyAutoencoderConfig.from_dict(published.TINY).key())
    assert sorted(keys("vae_decoder")) == sorted(keys("vae_encoder")) == sorted(expected)


def told_its_guidance(params):
    return replace(params, unet=replace(params.unet, time_cond=256))


VARIANTS = {**FULL, **DISTILLED}
VARIANTS |= {f"{name}-inpainting": inpainting(FULL[name]) for name in ("sd1", "sd2", "xl")}
VARIANTS["sd1-editing"] = editing(FULL["sd1"])
VARIANTS |= {f"{name}-lcm": told_its_guidance(FULL[name]) for name in ("sd1", "xl")}


@pytest.mark.parametrize("params", VARIANTS.values(), ids=VARIANTS)
def test_every_family_of_one_file_has_its_graphs(params, tmp_path):
    """What is concluded from a file's shapes must name a graph that ships."""
    path = write_sparse(tmp_path / "model.safetensors", model_names(params))
    configs = Model.read(path).configs
    assert configs
    for part, name in COMPONENTS.items():
        if name in configs and part not in (*CONTROLLED_LEVELS, "step_shrunk"):
            kind = "text_encoder" if part == "text_encoder_2" else part
            assert configs[name].key() in keys(kind), (part, configs[name])


@pytest.mark.parametrize("name", DISTILLED)
def test_a_distilled_file_is_of_the_architecture_of_its_folder(name, tmp_path):
    path = write_sparse(tmp_path / "model.safetensors", model_names(DISTILLED[name]))
    assert Model.read(path).unet == UNetConfig.from_dict(published.DISTILLED[name])


@pytest.mark.parametrize(
    ("part", "config", "precision"),
    [(part, config, each) for part, config in PARTS for each in precisions(part, config)],
    ids=[f"{p}-{c.key()}-{each}" for p, c in PARTS for each in precisions(p, c)],
)
def test_the_graph_ships_and_wants_the_weights_of_its_architecture(part, config, precision):
    graph = find_graph(part, config, precision, [GRAPHS], "the published model")
    assert graph.precision == precision
    expected = config.tensor_shapes()
    assert graph.weights.items() <= expected.items()
    if part == "vae_decoder":
        other = find_graph("vae_encoder", config, precision, [GRAPHS], "the published model")
        assert {**graph.weights, **other.weights} == expected
    elif part in ("control", "control_hint"):
        other = find_graph(OTHERS[part], config, precision, [GRAPHS], "the published net")
        assert {**graph.weights, **other.weights} == expected
        assert not graph.weights.keys() & other.weights.keys()
    elif part.startswith("step_shallow"):
        shared = find_graph("step", config, precision, [GRAPHS], "the published model").weights
        assert graph.weights.items() < shared.items()
    elif part != "vae_encoder":
        assert dict(graph.weights) == expected


def test_the_graphs_take_a_few_megabytes():
    assert 0 < sum(path.stat().st_size for path in GRAPHS.iterdir()) < 5e6


SUMS = {"Add", "Concat", "Mul", "Reshape", "Shape", "Split", "Squeeze"}


ATTENTION = SUMS - {"Split"} | {"MatMul", "Softmax", "Transpose", "Slice", "Expand", "Unsqueeze"}
OPERATIONS = {"step": 1417, "step_shallow": 207}


@pytest.mark.parametrize(
    ("plain", "steered", "kinds"),
    [
        ("step", "step_controlled", SUMS),
        ("step_shallow", "step_shallow_controlled", SUMS),
        ("step", "step_ip", ATTENTION),
        ("step_shallow", "step_shallow_ip", ATTENTION),
        ("step_controlled", "step_controlled_ip", ATTENTION),
        ("step_shallow_controlled", "step_shallow_controlled_ip", ATTENTION),
    ],
)
def test_a_step_pays_nothing_for_what_does_not_steer_it(plain, steered, kinds):
    """Its operations are those of before, and residuals add sums, pictures attention, alone."""
    found = [operations(part) for part in (plain, steered)]
    assert sum(found[0].values()) == OPERATIONS.get(plain, sum(found[0].values()))
    assert not found[0] - found[1]
    added = found[1] - found[0]
    assert set(added) == kinds
    layers = 1 if "shallow" in plain else len(SD1.cross_attentions())
    assert added["Softmax"] == (layers if "Softmax" in kinds else 0)


def operations(part):
    graph = find_graph(part, SD1, "float32", (GRAPHS,), None)
    return Counter(node.op_type for node in onnx.load_from_string(graph.data()).graph.node)
