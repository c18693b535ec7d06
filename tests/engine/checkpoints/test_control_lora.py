"""Control-LoRAs: differences of low rank from the UNet, in both layouts, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.checkpoints.component import Source, assemble
from engine.checkpoints.control_net import open_control_net
from engine.checkpoints.families.xl import XL
from engine.checkpoints.formats.files import open_weights
from engine.checkpoints.ldm_names import control_net_sources
from engine.configs.control_net import control_net_of
from engine.errors import ModelError
from tests.support.original_layout import write_sparse
from tests.support.small_parts import UNET

HINT_WIDTHS = (4, 4, 8, 8)
SMALL = replace(control_net_of(UNET), conditioning_embedding_out_channels=HINT_WIDTHS)
RANK = 2


def component(path, config):
    sources = {name: Source(name=name) for name in config.tensor_shapes()}
    return assemble(path, open_weights(path), config, sources)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    rng = np.random.default_rng(0)
    shapes = UNET.tensor_shapes()
    weights = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    path = tmp_path_factory.mktemp("unet") / "unet.safetensors"
    save_file(weights, path)
    return component(path, UNET)


def made(config, base, named):
    """Return a control-LoRA's tensors by their stored names, and what they come to by the graph's.

    Matrices of the UNet's have factors, but for one that is left out and one that is whole; so are
    its biases.
    """
    rng = np.random.default_rng(1)
    stored, expected = {"lora_controlnet": np.zeros(0, np.float32)}, {}
    matrices = [n for n, s in config.tensor_shapes().items() if n in base.shapes and len(s) > 1]
    for name, shape in config.tensor_shapes().items():
        own = rng.standard_normal(shape).astype(np.float32)
        if name in matrices[2:]:
            columns = int(np.prod(shape[1:]))
            up = rng.standard_normal((shape[0], RANK)).astype(np.float32)
            down = rng.standard_normal((RANK, columns)).astype(np.float32)
            module = named[name].removesuffix(".weight")
            stored[f"{module}.up"] = up.reshape(*up.shape, *[1] * len(shape[2:]))
            stored[f"{module}.down"] = down.reshape(RANK, *shape[1:])
            expected[name] = base[name] + (up @ down).reshape(shape)
        elif name == matrices[1]:
            expected[name] = base[name]
        else:
            stored[named[name]] = expected[name] = own
    return stored, expected


def names_of(config, layout, prefix=""):
    if layout == "diffusers":
        return {name: prefix + name for name in config.tensor_shapes()}
    return {name: prefix + source.name for name, source in control_net_sources(config).items()}


@pytest.mark.parametrize("prefix", ["", "control_model."])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_factors_are_added_to_the_unets_own(base, layout, prefix, tmp_path):
    stored, expected = made(SMALL, base, names_of(SMALL, layout, prefix))
    save_file(stored, tmp_path / "net.safetensors")
    config, net = open_control_net(tmp_path / "net.safetensors", UNET, base)
    assert config == SMALL
    assert net.keys() == expected.keys()
    assert net.used() == stored.keys() - {"lora_controlnet"}
    for name, value in net.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, atol=1e-6, err_msg=name)
    net.release()


def test_a_file_of_xl_is_accounted_for(tmp_path):
    """Of full size and without numbers: factors for every matrix of the way down."""
    unet = component(write_sparse(tmp_path / "unet.safetensors", XL.tensor_shapes()), XL)
    config = control_net_of(XL)
    shapes = {"lora_controlnet": ()}
    for name, source in control_net_sources(config).items():
        shape = config.tensor_shapes()[name]
        if name in unet.shapes and len(shape) > 1:
            module, ones = source.name.removesuffix(".weight"), (1,) * len(shape[2:])
            shapes[f"{module}.up"] = (shape[0], 128, *ones)
            shapes[f"{module}.down"] = (128, *shape[1:])
        elif name not in unet.shapes:
            shapes[source.name] = shape
    path = write_sparse(tmp_path / "net.safetensors", shapes)
    found, net = open_control_net(path, XL, unet)
    assert found == config
    assert net.used() == shapes.keys() - {"lora_controlnet"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored, module: stored.pop(f"{module}.down"), "of another family"),
        (lambda stored, module: stored.pop(f"{module}.up"), "of another family"),
        (
            lambda stored, module: stored.update({f"{module}.down": np.zeros((3, 4), np.float32)}),
            "of another family",
        ),
        (lambda stored, module: stored.pop("zero_convs.0.0.bias"), "lacks zero_convs.0.0.bias"),
        (
            lambda stored, module: stored.update({"middle_block.7.up": np.zeros((4, 2))}),
            "for which this architecture has no place",
        ),
        (
            lambda stored, module: stored.update({f"{module}.up": np.zeros((4, 2), np.int32)}),
            "another family|no weight's",
        ),
    ],
)
def test_what_does_not_fit_is_refused(base, change, message, tmp_path):
    stored, _ = made(SMALL, base, names_of(SMALL, "original"))
    module = next(name.removesuffix(".up") for name in stored if name.endswith(".up"))
    change(stored, module)
    save_file(stored, tmp_path / "net.safetensors")
    with pytest.raises(ModelError, match=message):
        open_control_net(tmp_path / "net.safetensors", UNET, base)


def test_of_an_inpainting_model_the_first_convolution_must_be_the_files_own(base, tmp_path):
    inpainting = replace(UNET, in_channels=9)
    path = write_sparse(tmp_path / "unet.safetensors", inpainting.tensor_shapes())
    stored, _ = made(SMALL, base, names_of(SMALL, "original"))
    for name in ("input_blocks.0.0.weight", "input_blocks.0.0.up", "input_blocks.0.0.down"):
        stored.pop(name, None)
    save_file(stored, tmp_path / "net.safetensors")
    with pytest.raises(ModelError, match="give it with a model for text to image"):
        open_control_net(tmp_path / "net.safetensors", inpainting, component(path, inpainting))
