"""Islands of float32 in float16 graphs: what leaves float16's range or loses too much in it.

float16 ends at 65504 and has 11 bits. What is kept in float32, and why:

- Group and layer normalisation: a sum of squares passes 65504 at once. ONNX's operators compute
  their statistics in float32 whatever they are given (`stash_type` 1, their default).
- Softmax: a sum of exponentials, of as many as there are keys where they are alike: 65,536 in a
  picture of 2048 × 2048. `softmax_precision` of ONNX's Attention asks for float32.
- The products of queries and keys, which pass 65504 in Stable Diffusion 2.1: ONNX's Attention
  multiplies both by the square root of its scale first, and the products of those stay far below.
- The whole of XL's autoencoder, whose convolutions pass 65504. Its weights stay float16.
- What moves between steps (registers, matrices, guidance, timesteps): `export.parts`. The spread
  that guidance is rescaled to is a mean over XL's latent at 1024 × 1024, of 65,536 numbers, and
  timesteps would lose their fractions. Registers would stay in range (18,400 at zero terminal SNR)
  but be rounded more than what the UNet gives.
"""

import onnx
import torch
from onnx import TensorProto, helper

from engine.configs.base import Config
from engine.graphs.graph import Precision

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def computed_in(config: Config, precision: Precision) -> torch.dtype:
    """Return the dtype that a part's module is traced in."""
    return torch.float32 if config.overflows_float16 else DTYPES[precision]


def keep_float32(model: onnx.ModelProto, config: Config, precision: Precision) -> None:
    """Mark the islands in a float16 graph; float32 graphs stay as they are."""
    if precision == "float32":
        return
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.attribute.append(helper.make_attribute("softmax_precision", TensorProto.FLOAT))
    if config.overflows_float16:
        _store_float16(model)


def _store_float16(model: onnx.ModelProto) -> None:
    """Take float32 weights as float16 and cast each where the graph begins."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        widened = f"{tensor.name}.float32"
        for node in model.graph.node:
            for i, given in enumerate(node.input):
                if given == tensor.name:
                    node.input[i] = widened
        tensor.data_type = TensorProto.FLOAT16
        for entry in tensor.external_data:
            if entry.key == "length":
                entry.value = str(int(entry.value) // 2)
        casts.append(helper.make_node("Cast", [tensor.name], [widened], to=TensorProto.FLOAT))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])
