"""Tracing of a part to ONNX: the graph alone, its weights named as in the checkpoint."""

import io
import json
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from engine.config import AutoencoderConfig, Config, TextEncoderConfig, UNetConfig
from engine.graphs import METADATA_KEY, Precision
from engine.signature import Part, signature
from export.autoencoder import Autoencoder
from export.clip import TextEncoder
from export.parts import Step, TextEncode, VaeDecode, VaeEncode
from export.unet import UNet

OPSET = 23  # the first with an Attention operator; GroupNormalization came with 21
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedPart:
    """A graph and the module that it was traced from, for comparing the two."""

    part: Part
    config: Config
    precision: Precision
    module: nn.Module
    model: onnx.ModelProto


def build_module(part: Part, config: Config) -> nn.Module:
    """Build the module of a part with untrained weights; `.model` holds the reference module."""
    if part == "text_encoder":
        assert isinstance(config, TextEncoderConfig)
        return TextEncode(TextEncoder(config)).eval()
    if part == "step":
        assert isinstance(config, UNetConfig)
        return Step(UNet(config)).eval()
    assert isinstance(config, AutoencoderConfig)
    autoencoder = Autoencoder(config)
    return (VaeDecode(autoencoder) if part == "vae_decoder" else VaeEncode(autoencoder)).eval()


def example_inputs(
    part: Part, config: Config, sizes: dict[str, int], generator: torch.Generator
) -> dict[str, Tensor]:
    """Draw random inputs of a part; `sizes` gives the signature's symbols a number."""
    sizes = {**_fixed_sizes(config), **sizes, "r + 2": sizes["r"] + 2}
    if isinstance(config, AutoencoderConfig):
        sizes |= {"H": config.compression * sizes["h"], "W": config.compression * sizes["w"]}
    inputs: dict[str, Tensor] = {}
    for name, tensor in signature(part, config).inputs.items():
        shape = [symbol if isinstance(symbol, int) else sizes[symbol] for symbol in tensor.shape]
        if name == "input_ids":
            assert isinstance(config, TextEncoderConfig)
            inputs[name] = torch.randint(config.vocab_size, shape, generator=generator)
            inputs[name][:, -1] = config.eos_token_id if config.eos_token_id != 2 else 0
        elif tensor.dtype == "uint8":
            inputs[name] = torch.randint(256, shape, generator=generator).to(torch.uint8)
        elif name in ("timestep", "time_ids"):
            inputs[name] = torch.rand(shape, generator=generator) * 999
        else:
            inputs[name] = torch.randn(shape, generator=generator)
    return inputs


def trace(part: Part, config: Config, precision: Precision, module: nn.Module) -> TracedPart:
    """Trace a part; every symbol of its signature stays free.

    Weights become external initializers that bear the names of the checkpoint and hold nothing.
    """
    module = module.to(DTYPES[precision])
    described = signature(part, config)
    side = latent_multiple(config)
    sizes = {"B": 2, "g": 2, "r": 3, "n": 5, "h": 2 * side, "w": 3 * side}
    inputs = example_inputs(part, config, sizes, torch.Generator().manual_seed(0))
    auto = torch.export.Dim.AUTO
    dynamic = {
        name: {axis: auto for axis, symbol in enumerate(tensor.shape) if _is_free(symbol, config)}
        for name, tensor in described.inputs.items()
    }
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            (),
            kwargs=inputs,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,  # it would fold transposes into weights, which then lose their names
            dynamic_shapes=dynamic,
            output_names=list(described.outputs),
            verbose=False,
        )
    assert program is not None
    model = _simplify(program.model_proto)
    _name_symbols(model, part, config)
    names = _detach_weights(model)
    metadata = {
        "part": part,
        "architecture": config.key(),
        "precision": precision,
        "weights": names,
        "torch": version("torch"),
    }
    del model.metadata_props[:]
    model.metadata_props.add(key=METADATA_KEY, value=json.dumps(metadata, sort_keys=True))
    onnx.checker.check_model(_without_external(model))
    return TracedPart(part=part, config=config, precision=precision, module=module, model=model)


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
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {
            "C": config.out_channels,
            "D": config.cross_attention_dim,
            "P": pooled,
            "E": config.time_cond_proj_dim,
        }
    return {"C": config.latent_channels} if isinstance(config, AutoencoderConfig) else {}


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
    _drop_traces(model.graph.node)
    return model


def _drop_traces(nodes: Iterable[Any]) -> None:
    """Remove the exporter's notes on where in the source a node came from."""
    for node in nodes:
        del node.metadata_props[:]
        node.doc_string = ""


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


def _detach_weights(model: onnx.ModelProto) -> list[str]:
    """Turn the module's parameters into external initializers; return their names in order."""
    names = []
    for tensor in model.graph.initializer:
        if not tensor.name.startswith("model."):
            continue
        name = tensor.name.removeprefix("model.")
        for node in model.graph.node:
            for i, given in enumerate(node.input):
                if given == tensor.name:
                    node.input[i] = name
        dims, dtype = list(tensor.dims), tensor.data_type
        size = len(tensor.raw_data)
        tensor.Clear()
        tensor.name, tensor.data_type = name, dtype
        tensor.dims.extend(dims)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "weights"), ("offset", "0"), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
        names.append(name)
    return sorted(names)


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
