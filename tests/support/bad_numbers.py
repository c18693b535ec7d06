"""Weights of one byte whose scales or descriptions are damaged, or of a kind that is not read."""

import json
from collections.abc import Iterator, Mapping


def safetensors(
    tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]], **metadata: str
) -> bytes:
    """Lay out a file of tensors: dtype, shape and bytes of each."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        place = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": place}
        data += content
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


WEIGHT = {"layer.weight": ("F8_E4M3", (4, 6), bytes(24))}


def described(text: str) -> bytes:
    """Give a layer a scale and a description."""
    content = text.encode()
    return safetensors(
        {
            **WEIGHT,
            "layer.weight_scale": ("F32", (), b"\0\0\x80\x3f"),
            "layer.comfy_quant": ("U8", (len(content),), content),
        }
    )


def scaled() -> Iterator[tuple[str, bytes, str]]:
    """Go through bad scales and descriptions."""
    for what, shape in (
        ("of three rows", (3,)),
        ("of no number", (0,)),
        ("of three dimensions", (1, 1, 2)),
        ("of blocks of five", (4, 5)),
        ("of a row too many", (4, 6, 2)),
    ):
        size = 4
        for number in shape:
            size *= number
        for name in ("layer.scale_weight", "layer.weight_scale"):
            content = safetensors({**WEIGHT, name: ("F32", shape, bytes(size))})
            yield f"a scale {name} {what}", content, f"'{name}', F32 of shape .* is no scale of"
    whole = safetensors({**WEIGHT, "layer.weight_scale": ("I64", (), bytes(8))})
    yield "a scale of whole numbers", whole, "I64 of shape .*, is no scale of 'layer.weight'"
    for what, text, message in (
        ("no JSON", "{", "'layer.comfy_quant' holds no valid JSON"),
        ("a list", "[]", "is a list, not an object"),
        ("a deep list", "[" * 4000, "holds no valid JSON"),
        ("nothing", "{}", "is quantised as None, which is not read"),
        ("numbers of 4 bits", '{"format": "nvfp4"}', "is quantised as 'nvfp4', which is not read"),
        ("of MX", '{"format": "mxfp8"}', "is quantised as 'mxfp8', which is not read"),
        (
            "rotated",
            '{"format": "int8_tensorwise", "convrot": true}',
            "is quantised as 'rotated int8_tensorwise', which is not read",
        ),
        ("5 kB", " " * 5000, "is no description of a layer"),
    ):
        yield f"a layer described as {what}", described(text), message
    missing = {**WEIGHT, "layer.comfy_quant": ("U8", (27,), b'{"format": "float8_e4m3fn"}')}
    yield "a scale that is missing", safetensors(missing), "its scale is missing"
    layers = '{"layers": {"layer": {"format": "svdquant_int4"}}}'
    content = safetensors(WEIGHT, _quantization_metadata=layers)
    yield "a layer of SVDQuant", content, "is quantised as 'svdquant_int4', which is not read"
    content = safetensors(WEIGHT, _quantization_metadata="{")
    yield "descriptions that are no JSON", content, "'_quantization_metadata' holds no valid JSON"
