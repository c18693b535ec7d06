"""The UNet that attends to pictures beside the text, against diffusers' IP-Adapters."""

from copy import deepcopy

import pytest
import torch

from engine.configs.diffusion import UNetConfig
from export.modules.unet import UNet
from tests.support.ip_adapters import small_ip_adapter
from tests.support.parity import relative_error
from tests.support.small_models import SMALL
from tests.support.tolerances import PARITY_RTOL

SCALES = [0.7, 0.4]


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd1", "xl"])
@pytest.mark.parametrize("sides", [(8, 8), (5, 7)])
def test_pictures_of_unlike_adapters_beside_the_text(name, sides):
    small = SMALL[name]
    states = [small_ip_adapter(small, kind) for kind in ("linear", "plus")]
    plain = small.reference.unet
    unet = deepcopy(plain)
    unet._load_ip_adapter_weights(states, low_cpu_mem_usage=False)
    unet.eval()
    processors = [p for n, p in unet.attn_processors.items() if "attn2" in n]
    for processor in processors:
        processor.scale = SCALES
    own = UNet(UNetConfig.from_dict(dict(plain.config))).eval()
    own.load_state_dict(plain.state_dict())
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator)

    sample, timestep = drawn(1, 4, *sides), torch.tensor([500.0])
    context = drawn(2, 77, own.config.cross_attention_dim)
    told = {}
    if small.is_xl:
        pooled = own.config.symbols()["P"]
        told = {"text_embeds": drawn(2, pooled), "time_ids": 100 * drawn(2, 6).abs()}
    embeds = [drawn(2, 1, 24), drawn(2, 1, 17, 64)]
    given = {"added_cond_kwargs": {**told, "image_embeds": embeds}}
    expected = unet(sample.repeat(2, 1, 1, 1), timestep, context, **given).sample

    tokens = [each[:, 0] for each in unet.encoder_hid_proj(embeds)]  # (2, 4, D) and (2, 6, D)
    images = [torch.zeros(1, 4, 6, sum(p.hidden_size for p in processors)) for _ in range(2)]
    bias = torch.full((1, 4, 6), -torch.inf)
    for i, each in enumerate(tokens):
        for group in range(2):  # each group of guidance has pictures of its own
            place = 2 * i + group
            bias[0, place, : each.shape[1]] = 0
            for into, projection in zip(images, ("to_k_ip", "to_v_ip"), strict=True):
                made = [getattr(p, projection)[i](each[group]) for p in processors]
                into[0, place, : each.shape[1]] = torch.cat(made, dim=-1)
    levels = sorted({layer.level for layer in own.config.cross_attentions()})
    weights = []
    for level in levels:
        height, width = sides
        for _ in range(level):
            height, width = (height + 1) // 2, (width + 1) // 2
        counts = torch.tensor([[SCALES[0], 0, SCALES[1], 0], [0, SCALES[0], 0, SCALES[1]]])
        weights.append(counts[..., None, None].expand(2, 4, height, width))
    every = [*images, bias, *weights]
    whole, deep = own.with_deep(sample, timestep, context, groups=2, images=every, **told)
    assert relative_error(whole, expected) < PARITY_RTOL
    again = {"groups": 2, "deep": deep, **told}
    shallow, _ = own.with_deep(sample, timestep, context, images=every, **again)
    assert relative_error(shallow, whole) < PARITY_RTOL
    without, _ = own.with_deep(sample, timestep, context, groups=2, **told)
    assert relative_error(without, whole) > 0.01
    both = sample.repeat(2, 1, 1, 1)
    expected = plain(both, timestep, context, added_cond_kwargs=told).sample
    assert relative_error(without, expected) < PARITY_RTOL
