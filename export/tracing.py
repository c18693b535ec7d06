"""Tracing of a part to ONNX: the graph alone, its weights named as in the checkpoint."""

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import onnx
import onnx_ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.configs.control_net import ControlNetConfig
from engine.configs.control_net_union import ControlNetUnionConfig
from engine.configs.diffusion import (
    LARGEST_ID,
    AutoencoderConfig,
    Config,
    IdentityAutoencoderConfig,
    TextEncoderConfig,
    TinyAutoencoderConfig,
    TinyDecoderConfig,
    UNetConfig,
)
from engine.configs.gpt2 import GPT2Config
from engine.configs.text_encoders import BertConfig, GPT2TextConfig, T5Config
from engine.graphs.graph import METADATA_KEY, Part, Precision, Symbol, signature
from export.control import Control, ControlHint, ControlUnionHint
from export.islands import computed_in, keep_float32
from export.modules.autoencoder import Autoencoder
from export.modules.clip import TextEncoder
from export.modules.control_net import ControlNet
from export.modules.control_net_union import ControlNetUnion
from export.modules.gpt2 import GPT2, LanguageModelPart
from export.modules.identity_autoencoder import (
    IdentityAutoencoder,
    IdentityDecode,
    IdentityEncode,
)
from export.modules.text_encoders import BertTextEncoder, GPT2TextEncoder, T5TextEncoder
from export.modules.tiny_autoencoder import PreviewDecode, TinyAutoencoder, TinyEncode
from export.modules.unet import UNet
from export.parts import Step, TextEncode, VaeDecode, VaeEncode

OPSET = 23  # the first with an Attention operator; GroupNormalization came with 21
OR_ONE = " or 1"  # ends the symbol of a size that may also be 1; it is traced as 1
WEIGHTS = "model."  # where the parts keep the reference module, whose names are the checkpoint's


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedPart:
    """A graph, and what it is the graph of."""

    part: Part
    config: Config
    precision: Precision
    model: onnx.ModelProto


# What computes a part, by the class of its architecture: torch is imported in this package alone.
MODULES: Mapping[type[Config], Callable[[Part, Any], nn.Module]] = {
    TextEncoderConfig: lambda part, config: TextEncode(TextEncoder(config)),
    BertConfig: lambda part, config: TextEncode(BertTextEncoder(config)),
    T5Config: lambda part, config: TextEncode(T5TextEncoder(config)),
    GPT2TextConfig: lambda part, config: TextEncode(GPT2TextEncoder(config)),
    UNetConfig: lambda part, config: Step(UNet(config), shrinks=part == "step_shrunk"),
    ControlNetConfig: lambda part, config: (ControlHint if part == "control_hint" else Control)(
        ControlNet(config)
    ),
    ControlNetUnionConfig: lambda part, config: (
        ControlUnionHint if part == "control_hint" else Control
    )(ControlNetUnion(config)),
    AutoencoderConfig: lambda part, config: (VaeDecode if part == "vae_decoder" else VaeEncode)(
        Autoencoder(config)
    ),
    TinyAutoencoderConfig: lambda part, config: (
        PreviewDecode if part == "vae_decoder" else TinyEncode
    )(TinyAutoencoder(config)),
    IdentityAutoencoderConfig: lambda part, config: (
        IdentityDecode if part == "vae_decoder" else IdentityEncode
    )(IdentityAutoencoder(config)),
    TinyDecoderConfig: lambda part, config: PreviewDecode(TinyAutoencoder(config)),
    GPT2Config: lambda part, config: LanguageModelPart(GPT2(config)),
}


def build_module(part: Part, config: Config) -> nn.Module:
    """Build the module of a part with untrained weights; `.model` holds the reference module."""
    return MODULES[type(config)](part, config).eval()


def example_inputs(
    part: Part, config: Config, sizes: dict[str, int], generator: torch.Generator
) -> dict[str, Tensor]:
    """Draw random inputs of a part's signature; `sizes` gives its shapes' symbols a number."""
    sizes = {**config.symbols(), **sizes, "r + 2": sizes["r"] + 2}
    for pixels, latents in (("H", "h"), ("W", "w")):
        sizes[pixels] = config.compression * sizes.get(latents, 0)
    for level in range(1, len(config.residual_widths())):
        for side in ("h", "w"):
            above = sizes.get(f"{side}{level - 1}" if level > 1 else side, 0)
            sizes[f"{side}{level}"] = (above + 1) // 2
    inputs: dict[str, Tensor] = {}
    described = signature(part, config).inputs
    for name, tensor in described.items():
        shape = [_size(symbol, sizes) for symbol in tensor.shape]
        if name == "input_ids":
            embeddings = sizes["e"] if "extra_embeddings" in described else 0
            ids = torch.randint(sizes["V"] + embeddings, shape, generator=generator)
            if isinstance(config, TextEncoderConfig):  # the pooled text is taken where a text ends
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
    side = config.latent_multiple * (1 + (part == "step_shrunk"))
    sizes = {"B": 2, "g": 2, "r": 3, "n": 5, "p": 3, "e": 3, "h": 2 * side, "w": 3 * side}
    sizes |= {"k": 2, "t": 3}
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


def _is_free(symbol: str | int, config: Config) -> bool:
    # What may be 1 is broadcast by ONNX, whatever it was traced as; torch would fix it to a side.
    free = isinstance(symbol, str) and not symbol.endswith(OR_ONE)
    return free and symbol not in config.symbols()


def _size(symbol: Symbol, sizes: Mapping[str, int]) -> int:
    if isinstance(symbol, int):
        return symbol
    return 1 if symbol.endswith(OR_ONE) else sizes[symbol]


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
                if not dim.HasField("dim_value") or str(symbol).endswith(OR_ONE):
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
