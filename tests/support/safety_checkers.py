"""Small safety checkers as diffusers makes and saves them."""

import json

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig

VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}


def small_checker(threshold=0.0, **vision):
    """Build one with random weights, 17 concepts and 3 special ones, as the published one has."""
    torch.manual_seed(0)
    config = CLIPConfig(projection_dim=24, vision_config={**VISION, **vision})
    checker = StableDiffusionSafetyChecker(config).eval()
    with torch.no_grad():
        for parameter in checker.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.dim() > 1 else 0.5))
        for weights in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
            weights.copy_(torch.rand(weights.shape) * 0.1 + threshold)
    return checker


def write_checker(folder, checker, **config):
    """Save a checker as diffusers does; config: fields of config.json that are others."""
    checker.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder
