"""The four graphs as modules: a reference module with what belongs to it at its borders.

What an app hands over and gets back is float32, int64 or uint8 whatever the module computes in;
the casts are in the graph. Names and shapes are those of `engine.graphs.graph`.
"""

import torch
from torch import Tensor, nn

from export.modules.autoencoder import Autoencoder
from export.modules.layers import for_groups
from export.modules.unet import UNet

TINY = 1e-12  # below any spread of an output


class TextEncode(nn.Module):
    """input_ids (B, n) int64, extra_embeddings (e, D) -> hidden states, pooled text, float32."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.model = text_encoder

    def forward(self, input_ids: Tensor, extra_embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the last and the penultimate hidden states, (B, n, D), and the pooled text."""
        last, penultimate, pooled = self.model(input_ids, extra_embeddings)
        return last.float(), penultimate.float(), pooled.float()


class Step(nn.Module):
    """One step of any sampler: scale, denoise all groups at once, guide, apply the matrices.

    registers: (B, r, C, h, w), the first is the latent; matrices: (B, r, r + 2) act on
    [registers; guided output; noise]; guidance: (g, B, 1, h or 1, w or 1) weighs the groups of the
    conditioning, for a whole picture or cell by cell
    ([1 - s, s] is classifier-free guidance, Ho & Salimans 2022, arXiv:2207.12598, equation 6);
    guidance_rescale: (B,), how far the guided output is brought back to the spread of the last
    group's (Lin et al. 2023, arXiv:2305.08891, equations 15 and 16); mask: (B, 1, h, w), where it
    is 0 the latent is what `outside`, (B, r + 2), makes of the same [registers; output; noise].
    deep: (g, B, F, h, w), the UNet's deep features of an earlier step, which makes it the part
    `step_shallow`. residuals_0 and so on: (g, B, C, h, w) of each level, what ControlNets add to
    the UNet's maps, which makes it `step_controlled` or, of the first alone,
    `step_shallow_controlled`. ip_keys and ip_values: (B, k, t, W), what IP-Adapters make of
    pictures, with ip_bias and the weights (g, B, k, h, w) of each level, for `step_ip` and its kin.
    shrinks: whether it is `step_shrunk`, see `UNet.with_deep`.
    """

    def __init__(self, unet: UNet, *, shrinks: bool = False) -> None:
        super().__init__()
        self.model = unet
        self.shrinks = shrinks

    def forward(
        self,
        registers: Tensor,
        matrices: Tensor,
        timestep: Tensor,
        input_scale: Tensor,
        context: Tensor,
        guidance: Tensor,
        guidance_rescale: Tensor,
        noise: Tensor,
        mask: Tensor,
        outside: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        image_conditioning: Tensor | None = None,
        edited_image: Tensor | None = None,
        deep: Tensor | None = None,
        residuals_0: Tensor | None = None,
        residuals_1: Tensor | None = None,
        residuals_2: Tensor | None = None,
        residuals_3: Tensor | None = None,
        ip_keys: Tensor | None = None,
        ip_values: Tensor | None = None,
        ip_bias: Tensor | None = None,
        ip_weights_0: Tensor | None = None,
        ip_weights_1: Tensor | None = None,
        ip_weights_2: Tensor | None = None,
        ip_weights_3: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the next registers, (B, r, C, h, w) float32, and deep features if none came."""
        dtype = self.model.conv_in.weight.dtype
        groups = context.shape[0]
        residuals = (residuals_0, residuals_1, residuals_2, residuals_3)
        images = [i.to(dtype) for i in (ip_keys, ip_values, ip_bias) if i is not None]
        weights = (ip_weights_0, ip_weights_1, ip_weights_2, ip_weights_3)
        images += [w.flatten(0, 1).to(dtype) for w in weights if w is not None]
        x = registers[:, 0] * input_scale[:, None, None, None]
        if image_conditioning is not None:
            x = torch.cat([x, image_conditioning], dim=1)
        in_common: int | None = groups
        if edited_image is not None:  # groups that see other pictures share nothing
            x = torch.cat([x[None].expand(groups, *x.shape), edited_image], dim=2).flatten(0, 1)
            timestep, in_common = for_groups(timestep, groups), None
            images[:3] = [for_groups(image, groups) for image in images[:3]]
        out, features = self.model.with_deep(
            x.to(dtype),
            timestep,
            context.flatten(0, 1).to(dtype),
            groups=in_common,
            shrinks=self.shrinks,
            deep=None if deep is None else deep.flatten(0, 1).to(dtype),
            residuals=[r.flatten(0, 1).to(dtype) for r in residuals if r is not None],
            images=images,
            text_embeds=None if text_embeds is None else text_embeds.flatten(0, 1).to(dtype),
            time_ids=None if time_ids is None else time_ids.flatten(0, 1),
            timestep_cond=None if timestep_cond is None else timestep_cond.to(dtype),
        )
        out = out.float().unflatten(0, (groups, -1))
        guided = (guidance * out).sum(dim=0)
        spread = out[-1].std(dim=(1, 2, 3)) / guided.std(dim=(1, 2, 3)).clamp_min(TINY)
        guided = guided * (1.0 + guidance_rescale * (spread - 1.0))[:, None, None, None]
        known = torch.cat([registers, guided[:, None], noise[:, None]], dim=1)
        rows = torch.cat([matrices, outside[:, None]], dim=1)
        moved = torch.bmm(rows, known.flatten(2)).unflatten(2, registers.shape[2:])
        x = mask * moved[:, 0] + (1.0 - mask) * moved[:, -1]
        registers = torch.cat([x[:, None], moved[:, 1:-1]], dim=1)
        if deep is not None:
            return registers
        return registers, features.float().unflatten(0, (groups, -1))


class VaeDecode(nn.Module):
    """latents (B, C, h, w) float32 -> pixels (B, H, W, 3) uint8."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.model = autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        """Undo the scaling of latents (B, C, h, w), decode, round to (B, H, W, 3) uint8."""
        config = self.model.config
        latents = latents / config.scaling_factor + config.shift_factor
        pixels = self.model.decode(latents.to(self.model.decoder.conv_in.weight.dtype)).float()
        pixels = (pixels * 127.5 + 127.5).clamp(0.0, 255.0).round()
        return pixels.permute(0, 2, 3, 1).to(torch.uint8)


class VaeEncode(nn.Module):
    """pixels (B, H, W, 3) uint8, noise (B, C, h, w) -> latents (B, C, h, w) float32."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.model = autoencoder

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Encode (B, H, W, 3) uint8, draw from the posterior with the noise (B, C, h, w), scale."""
        config = self.model.config
        # Floats first: TensorRT takes bytes and moves none.
        scaled = pixels.float().permute(0, 3, 1, 2) / 127.5 - 1.0
        mean, std = self.model.encode(scaled.to(self.model.encoder.conv_in.weight.dtype))
        return (mean.float() + std.float() * noise - config.shift_factor) * config.scaling_factor
