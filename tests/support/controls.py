"""Small ControlNets of small models: diffusers' own, with random numbers in all their weights."""

from pathlib import Path

import torch
from diffusers import ControlNetModel
from safetensors.torch import save_file

from engine.configs.diffusion import UNetConfig
from engine.graphs.graph import Part, graph_name
from runtime.pipeline import Pipeline
from tests.support.small_models import SmallModel
from tests.support.traced import trace_once

HINT_WIDTHS = (8, 8, 16, 16)


def small_control_net(small: SmallModel, seed: int = 0) -> ControlNetModel:
    """Make a ControlNet of a small model's UNet whose residuals are of the size of its features."""
    net = ControlNetModel.from_unet(
        small.reference.unet, conditioning_embedding_out_channels=HINT_WIDTHS
    )
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.startswith("controlnet_"):
                fan_in = max(parameter[0].numel(), 1)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
            elif parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.2 * parameter.std() * noise)
    return net.eval()


def write_control_net(net: ControlNetModel, folder: Path) -> Path:
    net.save_pretrained(folder)
    return folder


def write_control_lora(small: SmallModel, net: ControlNetModel, path: Path, rank: int = 2) -> Path:
    """Write a control-LoRA with a net's hint and zero convolutions, and make the net what it means.

    The net's other matrices become the UNet's own with the products of factors added.
    """
    generator, stored = torch.Generator().manual_seed(7), {"lora_controlnet": torch.zeros(0)}
    unet = small.reference.unet.state_dict()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name not in unet:
                stored[name] = parameter.clone()
                continue
            parameter.copy_(unet[name])
            if parameter.ndim > 1:
                module, kernel = name.removesuffix(".weight"), parameter.shape[1:]
                up = torch.randn(len(parameter), rank, generator=generator) * 0.2
                down = torch.randn(rank, *kernel, generator=generator) / kernel.numel() ** 0.5
                parameter.add_((up @ down.flatten(1)).reshape(parameter.shape))
                stored[f"{module}.up"] = up.reshape(*up.shape, *[1] * len(kernel[1:]))
                stored[f"{module}.down"] = down
    save_file(stored, path)
    return path


def trace_control_graphs(pipeline: Pipeline, graphs: Path) -> None:
    """Trace what a model needs to be steered by the ControlNets that the pipeline has."""
    unet, nets = pipeline.model.unet, pipeline.control_nets
    wanted: list[tuple[Part, UNetConfig]] = [
        ("step_controlled", unet),
        ("step_shallow_controlled", unet),
    ]
    for name in set(nets.names) - set(nets.adapters):
        wanted += [("control_hint", nets.config(name)), ("control", nets.config(name))]
    for part, config in wanted:
        path = graphs / graph_name(part, config, "float32")
        if not path.exists():
            path.write_bytes(trace_once(part, config, "float32").model.SerializeToString())
