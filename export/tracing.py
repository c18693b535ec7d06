"""Tracing of a part to ONNX: the graph alone, its weights named as in the checkpoint."""

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version

import onnx
import onnx_ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.configs.diffusion import (
    LARGEST_ID,
    AutoencoderConfig,
    Config,
    TextEncoderConfig,
    TinyDecoderConfig,
    UNetConfig,
)
from engine.configs.gpt2 import GPT2Config
from engine.graphs.graph import METADATA_KEY, Part, Precision, signature
from export.islands import computed_in, keep_float32
from export.modules.autoencoder import Autoencoder
from export.modules.clip import TextEncoder
from export.modules.gpt2 import GPT2, LanguageModelPart
from export.modules.tiny_autoencoder import PreviewDecode, TinyAutoencoder
from export.modules.unet import UNet
from export.parts import Step, TextEncode, VaeDecode, VaeEncode

OPSET = 23  # the first with an Attention operator; GroupNormalization came with 21
WEIGHTS = "model."  # where the parts keep the reference module, whose names are the checkpoint's


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedPart:
    """A graph, and what it is the graph of."""

    part: Part
    config: Config
    precision: Precision
    model: onnx.ModelProto


def build_module(part: Part, config: Config) -> nn.Module:
    """Build the module of a part with untrained weights; `.model` holds the reference module."""
    if isinstance(config, TextEncoderConfig):
        return TextEncode(TextEncoder(config)).eval()
    if isinstance(config, UNetConfig):
        return Step(UNet(config)).eval()
    if isinstance(config, GPT2Config):
        return LanguageModelPart(GPT2(config)).eval()
    if isinstance(config, TinyDecoderConfig):
        return PreviewDecode(TinyAutoencoder(config)).eval()
    assert isinstance(config, AutoencoderConfig)
    autoencoder = Autoencoder(config)
    return (VaeDecode(autoencoder) if part == "vae_decoder" else VaeEncode(autoencoder)).eval()


def example_inputs(
    part: Part, config: Config, sizes: dict[str, int], generator: torch.Generator
) -> dict[str, Tensor]:
    """Draw random inputs of a part; `sizes` gives the signature's symbols a number."""
    sizes = {**_fixed_sizes(config), **sizes, "r + 2": sizes["r"] + 2}
    if isinstance(config, AutoencoderConfig | TinyDecoderConfig):
        sizes |= {"H": config.compression * sizes["h"], "W": config.compression * sizes["w"]}
    inputs: dict[str, Tensor] = {}
    for name, tensor in signature(part, config).inputs.items():
        shape = [symbol if isinstance(symbol, int) else sizes[symbol] for symbol in tensor.shape]
        if name == "input_ids" and isinstance(config, GPT2Config):
            inputs[name] = torch.randint(config.vocab_size, shape, generator=generator)
        elif name == "input_ids":
            assert isinstance(config, TextEncoderConfig)
            ids = torch.randint(config.vocab_size + sizes["e"], shape, generator=generator)
            ids[:, -1] = 0 if config.eos_token_id == LARGEST_ID else config.eos_token_id
            inputs[name] = ids
        elif tensor.dtype == "uint8":
            inputs[name] = torch.randint(256, shape, generator=generator).to(torch.uint8)
        elif name in ("timestep", "time_ids"):
            inputs[name] = torch.rand(shape, generator=generator) * 999
        else:
            inputs[name] = torch.randn(shape, generator=generator)
    return inputs


def trace(part: Part, config: Config, precision: Precision) -> TracedPart:
    """Trace a part; every symbol of its signature stays free.

    The module is built of fake tensors, which have shapes and no numbers, so tracing takes neither
    the weights' memory nor the time to fill it. Weights become external initializers that bear the
    names of the checkpoint and hold nothing.
    """
    described = signature(part, config)
    side = latent_multiple(config)
    sizes = {"B": 2, "g": 2, "r": 3, "n": 5, "p": 3, "e": 3, "h": 2 * side, "w": 3 * side}
    real = example_inputs(part, config, sizes, torch.Generator().manual_seed(0))
    auto = torch.export.Dim.AUTO
    dynamic = {
        name: {axis: auto for axis, symbol in enumerate(tensor.shape) if _is_free(symbol, config)}
        for name, tensor in described.inputs.items()
    }
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, _default_dtype(computed_in(config, precision)):
        module = build_module(part, config)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            (),
            kwargs={name: fake.from_tensor(value) for name, value in real.items()},
            dynamo=True,
            opset_version=OPSET,
            optimize=False,  # it would fold transposes into weights, which then lose their names
            dynamic_shapes=dynamic,
            output_names=list(described.outputs),
            verbose=False,
        )
    assert program is not None
    model = _simplify(_without_numbers(program.model))
    _name_symbols(model, part, config)
    weights = _detach_weights(model)
    keep_float32(model, config, precision)
    metadata = {
        "part": part,
        "architecture": config.key(),
        "precision": precision,
        "inputs": list(described.inputs),
        "weights": weights,
        "torch": version("torch"),
    }
    del model.metadata_props[:]
    model.metadata_props.add(key=METADATA_KEY, value=json.dumps(metadata, sort_keys=True))
    onnx.checker.check_model(_without_external(model))
    return TracedPart(part=part, config=config, precision=precision, model=model)


def _without_numbers(model: onnx_ir.Model) -> onnx.ModelProto:
    """Serialise a graph whose weights are fake tensors: as external data of their size."""
    for name, value in model.graph.initializers.items():
        if name.startswith(WEIGHTS) and (tensor := value.const_value) is not None:
            value.const_value = onnx_ir.ExternalTensor(
                "weights",
                0,
                tensor.nbytes,
                tensor.dtype,
                shape=onnx_ir.Shape(list(tensor.shape)),  # type: ignore[arg-type]
                name=name,
            )
    return onnx_ir.to_proto(model)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new parameters of a dtype: fake ones cannot be converted afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress, deprecations and optional packages from the user."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _fixed_sizes(config: Config) -> dict[str, int]:
    if isinstance(config, UNetConfig):
        sizes = config.addition_time_ids * config.addition_time_embed_dim
        return {
            "C": config.out_channels,
            "D": config.cross_attention_dim,
            "P": config.projection_class_embeddings_input_dim - sizes,
            "T": config.addition_time_ids,
            "E": config.time_cond_proj_dim,
            "X": config.in_channels - config.out_channels,
            "F": config.block_out_channels[0],
        }
    if isinstance(config, TextEncoderConfig):
        return {"D": config.hidden_size}
    if isinstance(config, GPT2Config):
        return {"l": config.n_layer, "a": config.n_head, "d": config.head_width}
    if isinstance(config, AutoencoderConfig | TinyDecoderConfig):
        return {"C": config.latent_channels}
    return {}


def _is_free(symbol: str | int, config: Config) -> bool:
    return isinstance(symbol, str) and symbol not in _fixed_sizes(config)


def latent_multiple(config: Config) -> int:
    """A side that every level of a UNet halves evenly."""
    return int(2 ** len(config.block_out_channels)) if isinstance(config, UNetConfig) else 4


def _simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold and fuse what the exporter left, with the weights as inputs so that none is touched."""
    from onnxscript import optimizer

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    del model.graph.initializer[:]
    free = len(model.graph.input)
    for tensor in weights.values():
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    del model.graph.value_info[:]
    model = optimizer.optimize(model)
    del model.graph.input[free:]
    model.graph.initializer.extend(weights.values())
    del model.graph.value_info[:]
    for named in (*model.graph.node, *model.graph.input, *model.graph.output):
        del named.metadata_props[:]  # the exporter's notes on where in the source it came from
        named.doc_string = ""
    return model


def _name_symbols(model: onnx.ModelProto, part: Part, config: Config) -> None:
    """Call the free dimensions of inputs and outputs what the signature calls them."""
    described = signature(part, config)
    for values, tensors in (
        (model.graph.input, described.inputs),
        (model.graph.output, described.outputs),
    ):
        for value, (name, tensor) in zip(values, tensors.items(), strict=True):
            assert value.name == name
            dims = value.type.tensor_type.shape.dim
            for dim, symbol in zip(dims, tensor.shape, strict=True):
                if not dim.HasField("dim_value"):
                    dim.dim_param = str(symbol)


def _detach_weights(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Give the external initializers their names in the checkpoint; return these with shapes."""
    shapes = {}
    for tensor in model.graph.initializer:
        if not tensor.name.startswith(WEIGHTS):
            continue
        name = tensor.name.removeprefix(WEIGHTS)
        for node in model.graph.node:
            for i, given in enumerate(node.input):
                if given == tensor.name:
                    node.input[i] = name
        tensor.name = name
        shapes[name] = list(tensor.dims)
    return shapes


def _without_external(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a graph with its weights as inputs, which the checker can look at."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kept = []
    for tensor in copy.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            copy.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
        else:
            kept.append(tensor)
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(kept)
    return copy
