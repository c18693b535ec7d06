"""The `config.json` files of published models, as their folders hold them."""

from typing import Any

DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"

UNET_SD15: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [DOWN, DOWN, DOWN, "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", UP, UP, UP],
}
UNET_SD21: dict[str, Any] = UNET_SD15 | {
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
UNET_XL: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.19.0.dev0",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", DOWN, DOWN],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": [UP, UP, "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
UNET_REFINER: dict[str, Any] = UNET_XL | {
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D", DOWN, DOWN, "DownBlock2D"],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "up_block_types": ["UpBlock2D", UP, UP, "UpBlock2D"],
}

TEXT_SD15: dict[str, Any] = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "vocab_size": 49408,
}
TEXT_SD21: dict[str, Any] = TEXT_SD15 | {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
TEXT_XL_2: dict[str, Any] = TEXT_SD15 | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}

VAE_SD15: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
VAE_XL: dict[str, Any] = VAE_SD15 | {
    "_diffusers_version": "0.20.0.dev0",
    "force_upcast": True,
    "latents_mean": None,
    "latents_std": None,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "shift_factor": None,
}
TINY: dict[str, Any] = {
    "_class_name": "AutoencoderTiny",
    "_diffusers_version": "0.20.0.dev0",
    "act_fn": "relu",
    "decoder_block_out_channels": [64] * 4,
    "encoder_block_out_channels": [64] * 4,
    "force_upcast": False,
    "in_channels": 3,
    "latent_channels": 4,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "num_decoder_blocks": [3, 3, 3, 1],
    "num_encoder_blocks": [1, 3, 3, 3],
    "out_channels": 3,
    "scaling_factor": 1.0,
    "upsampling_scaling_factor": 2,
}

# Models that were distilled to fewer blocks.
BK_SDM: dict[str, Any] = UNET_SD15 | {"layers_per_block": 1}
BK_SDM_TINY: dict[str, Any] = BK_SDM | {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": [DOWN] * 3,
    "mid_block_type": None,
    "up_block_types": [UP] * 3,
}
XL_HALF_MIDDLE: dict[str, Any] = UNET_XL | {"mid_block_type": "UNetMidBlock2D"}
DISTILLED: dict[str, dict[str, Any]] = {
    "bk-sdm-base": BK_SDM,
    "bk-sdm-small": BK_SDM | {"mid_block_type": None},
    "bk-sdm-tiny": BK_SDM_TINY,
    "sdxs-512-dreamshaper": BK_SDM_TINY
    | {
        "attention_head_dim": [5, 10, 20],
        "down_block_types": ["DownBlock2D", DOWN, DOWN],
        "up_block_types": [UP, UP, "UpBlock2D"],
    },
    "sdxs-512-0.9": BK_SDM_TINY
    | {
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 1024,
        "only_cross_attention": [True, False, False],
        "use_linear_projection": True,
    },
    "ssd-1b": XL_HALF_MIDDLE
    | {
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    },
    "vega": XL_HALF_MIDDLE
    | {
        "transformer_layers_per_block": [1, [1, 1], [2, 2]],
        "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
    },
}
