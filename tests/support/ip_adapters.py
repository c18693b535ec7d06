"""Small IP-Adapters and image encoders: random numbers by their names, and diffusers' own."""

from copy import deepcopy

import torch
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from engine.graphs.graph import graph_name
from tests.support.small_models import SmallModel
from tests.support.small_pictures import reference_pipeline
from tests.support.traced import trace_once

VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 24,
    "hidden_act": "gelu",
}
KINDS = ("linear", "plus", "full")
HEADS = 2  # of the resampler, 64 wide


def small_encoder(**fields):
    """Make CLIP's half for pictures with random numbers that keep its outputs near 1."""
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**{**VISION, **fields})).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            size = 0.2 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            noise = size * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + (1 if parameter.ndim == 1 else 0))
    return model


def small_ip_adapter(small: SmallModel, kind: str, seed: int = 0):
    """Draw an IP-Adapter for a small model: what its authors save, two dictionaries of tensors."""
    unet = small.reference.unet
    width, (embed, hidden) = unet.config.cross_attention_dim, (24, 64)
    generator = torch.Generator().manual_seed(40 + seed)

    def drawn(*shape):
        fan_in = torch.Size(shape[1:]).numel()
        return torch.randn(shape, generator=generator) / fan_in**0.5

    def norm(name, size):
        near = 0.2 * torch.randn(2, size, generator=generator)
        return {f"{name}.weight": 1 + near[0], f"{name}.bias": near[1]}

    def layer(name, outputs, inputs, *, bias=True):
        tensors = {f"{name}.weight": drawn(outputs, inputs)}
        return tensors | ({f"{name}.bias": 0.2 * drawn(outputs, 1)[:, 0]} if bias else {})

    if kind == "linear":
        projection = layer("proj", 4 * width, embed) | norm("norm", width)
    elif kind == "full":
        projection = layer("proj.0", hidden, hidden) | layer("proj.2", width, hidden)
        projection |= norm("proj.3", width)
    else:
        dim, inner = 48, 64 * HEADS
        projection = {"latents": 3 * drawn(1, 6, dim)} | layer("proj_in", dim, hidden)
        projection |= layer("proj_out", width, dim) | norm("norm_out", width)
        for i in range(4):  # as many as diffusers makes
            name = f"layers.{i}"
            projection |= norm(f"{name}.0.norm1", dim) | norm(f"{name}.0.norm2", dim)
            projection |= layer(f"{name}.0.to_q", inner, dim, bias=False)
            projection |= layer(f"{name}.0.to_kv", 2 * inner, dim, bias=False)
            projection |= layer(f"{name}.0.to_out", dim, inner, bias=False)
            projection |= norm(f"{name}.1.0", dim)
            projection |= layer(f"{name}.1.1", 4 * dim, dim, bias=False)
            projection |= layer(f"{name}.1.3", dim, 4 * dim, bias=False)
    layers, number = {}, 1
    for name in unet.attn_processors:
        if "attn2" in name:
            module = unet.get_submodule(name.removesuffix(".processor"))
            for kind_of in ("to_k_ip", "to_v_ip"):
                layers |= layer(f"{number}.{kind_of}", module.to_q.out_features, width, bias=False)
            number += 2
    return {"image_proj": projection, "ip_adapter": layers}


def write_ip_adapter(state, path):
    """Save as the authors do: pickled dictionaries, or safetensors with joined names."""
    if path.suffix == ".bin":
        torch.save(state, path)
        return path
    joined = {f"{part}.{n}": t.contiguous() for part, own in state.items() for n, t in own.items()}
    save_file(joined, path)
    return path


def seeing_pipeline(kind, small, states, encoder, scales=1.0, **more):
    """Return diffusers' pipeline of a small model with IP-Adapters."""
    side = encoder.config.image_size
    parts = {"unet": deepcopy(small.reference.unet), "image_encoder": encoder, **more}
    parts["feature_extractor"] = CLIPImageProcessor(size=side, crop_size=side)
    pipeline = reference_pipeline(kind, small, **parts)
    pipeline.unet._load_ip_adapter_weights(states, low_cpu_mem_usage=False)
    pipeline.unet.eval()
    pipeline.set_ip_adapter_scale(scales)
    return pipeline


def trace_ip_graphs(model, graphs, parts=("step_ip",)):
    """Trace what a model needs to attend to pictures, less what is there."""
    for part in parts:
        path = graphs / graph_name(part, model.unet, "float32")
        if not path.exists():
            path.write_bytes(trace_once(part, model.unet, "float32").model.SerializeToString())
