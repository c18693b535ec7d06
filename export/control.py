"""The graphs of a ControlNet as modules: its hint, once a picture, and its part of a step."""

import torch
from torch import Tensor, nn

from export.modules.control_net import ControlNet, by_level
from export.modules.control_net_union import ControlNetUnion


class ControlHint(nn.Module):
    """picture (B, 3, H, W), 0 to 1, -1 where an inpainting net is to fill -> hint (B, F, h, w)."""

    def __init__(self, control_net: ControlNet) -> None:
        super().__init__()
        self.model = control_net

    def forward(self, picture: Tensor) -> Tensor:
        """Encode the picture (B, 3, H, W) as features (B, F, h, w) of the first level, float32."""
        encoder = self.model.controlnet_cond_embedding
        return encoder(picture.to(encoder.conv_in.weight.dtype)).float()


class ControlUnionHint(nn.Module):
    """picture as above, control_types (B, K) -> hint (B, F, h, w), type_embedding (B, Y)."""

    def __init__(self, control_net: ControlNetUnion) -> None:
        super().__init__()
        self.model = control_net

    def forward(self, picture: Tensor, control_types: Tensor) -> tuple[Tensor, Tensor]:
        """Encode the picture as a picture of its type, and the type, both float32."""
        hint = self.model.hint(picture.to(self.model.conv_in.weight.dtype), control_types)
        return hint.float(), self.model.embed_types(control_types).float()


class Control(nn.Module):
    """Add a ControlNet's residuals to those of others: residuals + weights · own.

    registers, timestep, input_scale, context: a step's; hint: (B, F, h, w) of `ControlHint`;
    weights: (N, g, B), how much each of the N residuals counts in each group of each picture.
    type_embedding: (B, Y) of `ControlUnionHint`, of a union alone.
    residuals_0 and so on: (g, B, C, h, w) of each level, its maps' channels behind each other.
    """

    def __init__(self, control_net: ControlNet) -> None:
        super().__init__()
        self.model = control_net

    def forward(
        self,
        registers: Tensor,
        timestep: Tensor,
        input_scale: Tensor,
        context: Tensor,
        hint: Tensor,
        weights: Tensor,
        residuals_0: Tensor,
        residuals_1: Tensor | None = None,
        residuals_2: Tensor | None = None,
        residuals_3: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        type_embedding: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the next residuals of each level, (g, B, C, h, w) float32."""
        dtype: torch.dtype = self.model.conv_in.weight.dtype
        groups = context.shape[0]
        x = registers[:, 0] * input_scale[:, None, None, None]
        maps = self.model(
            x.to(dtype),
            timestep,
            context.flatten(0, 1).to(dtype),
            hint.to(dtype),
            groups=groups,
            text_embeds=None if text_embeds is None else text_embeds.flatten(0, 1).to(dtype),
            time_ids=None if time_ids is None else time_ids.flatten(0, 1),
            type_embedding=None if type_embedding is None else type_embedding.to(dtype),
        )
        counts = weights.flatten(1)[..., None, None, None].unbind()
        weighed = [features.float() * n for features, n in zip(maps, counts, strict=True)]
        own = by_level(weighed, self.model.config.residual_widths())
        given = [r for r in (residuals_0, residuals_1, residuals_2, residuals_3) if r is not None]
        return tuple(r + o.unflatten(0, (groups, -1)) for r, o in zip(given, own, strict=True))
