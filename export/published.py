"""The architectures whose graphs ship: Stable Diffusion 1.x, 2.x and XL, in all their forms."""

from collections.abc import Iterator
from dataclasses import replace

from engine.configs.diffusion import (
    XL_SCALING_FACTOR,
    AutoencoderConfig,
    Config,
    TextEncoderConfig,
    TinyDecoderConfig,
    UNetConfig,
)
from engine.graphs.graph import Part

INPAINTING_CHANNELS = 9  # the latent, the mask and the masked picture's latents
LCM_GUIDANCE_CHANNELS = 256  # of the embedded guidance scale that an LCM's UNet is told

CLIP_L = TextEncoderConfig(
    vocab_size=49408,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
)
OPEN_CLIP_H = TextEncoderConfig(
    vocab_size=49408,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,  # of 24: the UNet attends to the layer before the last
    num_attention_heads=16,
    hidden_act="gelu",
)
OPEN_CLIP_G = TextEncoderConfig(
    vocab_size=49408,
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
)

SD1 = UNetConfig(cross_attention_dim=768)
SD2 = UNetConfig(
    cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
)
XL = UNetConfig(
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
REFINER = UNetConfig(
    block_out_channels=(384, 768, 1536, 1536),
    down_block_types=(
        "DownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(6, 12, 24, 24),
    transformer_layers_per_block=4,
    cross_attention_dim=1280,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2560,
)

TEXT_ENCODERS = (CLIP_L, OPEN_CLIP_H, OPEN_CLIP_G)
UNETS = (
    SD1,
    SD2,
    XL,
    REFINER,
    *(replace(unet, in_channels=INPAINTING_CHANNELS) for unet in (SD1, SD2, XL)),
    *(replace(unet, time_cond_proj_dim=LCM_GUIDANCE_CHANNELS) for unet in (SD1, XL)),
)
AUTOENCODERS = (AutoencoderConfig(), AutoencoderConfig(scaling_factor=XL_SCALING_FACTOR))


def published_parts() -> Iterator[tuple[Part, Config]]:
    """List the parts whose graphs ship, the model that ships aside."""
    yield from (("text_encoder", config) for config in TEXT_ENCODERS)
    for config in AUTOENCODERS:
        yield "vae_decoder", config
        yield "vae_encoder", config
    yield "preview_decoder", TinyDecoderConfig()  # TAESD
    for unet in UNETS:
        yield "step", unet
        yield "step_shallow", unet
