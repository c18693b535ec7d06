"""The architecture of a UNet, read off the shapes of its tensors in diffusers' layout."""

from engine.checkpoints.architecture import HEAD_DIM, SD1_HEADS, Stored, told_numbers
from engine.configs.diffusion import UNetConfig

__all__ = ["diffusers_unet_config"]


def diffusers_unet_config(stored: Stored, *, pooled: int, refiner: bool) -> UNetConfig:
    """Read off a UNet's architecture; pooled: width of XL's pooled text.

    Raises ModelError naming a tensor that is missing.
    """
    blocks = [f"down_blocks.{i}" for i in range(stored.count("down_blocks.{}"))]
    widths = tuple(stored.size(f"{block}.resnets.0.conv1.weight") for block in blocks)
    layers = [stored.count(block + ".resnets.{}") for block in blocks]
    depths = [stored.count(block + ".attentions.0.transformer_blocks.{}") for block in blocks]
    middle = "mid_block.attentions.0"
    lowest = stored.count(middle + ".transformer_blocks.{}")
    depths[-1:] = [depths[-1] or lowest]
    attends = [f"{block}.attentions" in stored for block in blocks]
    linear = len(stored.shapes.get(f"{middle}.proj_in.weight", ())) == 2
    inputs = stored.size("add_embedding.linear_1.weight", 1) if "add_embedding" in stored else 0
    condition = "time_embedding.cond_proj.weight"
    equal = len({depth for depth in depths if depth}) <= 1
    return UNetConfig(
        in_channels=stored.size("conv_in.weight", 1),
        out_channels=stored.size("conv_out.weight"),
        block_out_channels=widths,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]),
        layers_per_block=layers[0] if len(set(layers)) == 1 else tuple(layers),
        cross_attention_dim=stored.size(f"{middle}.transformer_blocks.0.attn2.to_k.weight", 1),
        attention_head_dim=(
            tuple(max(width // HEAD_DIM, 1) for width in widths) if linear else SD1_HEADS
        ),
        transformer_layers_per_block=lowest if equal else tuple(depth or 1 for depth in depths),
        use_linear_projection=linear,
        addition_embed_type="text_time" if inputs else None,
        **told_numbers(inputs, pooled, refiner=refiner),
        projection_class_embeddings_input_dim=inputs,
        time_cond_proj_dim=stored.size(condition, 1) if condition in stored else 0,
    )
