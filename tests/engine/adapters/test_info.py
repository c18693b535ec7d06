import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.adapters.adapter import read_adapter
from tests.support.adapters import (
    GOOD,
    TO_K,
    Model,
    factors,
    write_attention,
)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


def test_an_adapter_is_described(model: Model, tmp_path: Path) -> None:
    frequency = {"10_cat": {"cat ": 3, "tree": 1}, "5_x": {"cat": 2, "bad": "3"}, "y": 3}
    path = write_attention(
        model,
        tmp_path / "a.safetensors",
        metadata={
            "ss_base_model_version": "sd_v1",
            "ss_tag_frequency": json.dumps(frequency),
            "modelspec.trigger_phrase": "wtrclr",
        },
    )
    description = read_adapter(path).describe()
    assert json.loads(json.dumps(description)) == description
    assert description == {
        "family": "Stable Diffusion 1.x",
        "kinds": {"LoRA": 60},
        "ranks": [4],
        "alphas": [3.0],
        "scales": [0.75],
        "modules": {"unet": 48, "text_encoder": 12},
        "targets": {
            "attention": 48,
            "text encoder: attention": 8,
            "text encoder: feed-forward": 4,
        },
        "trigger_words": ["wtrclr"],
        "training_tags": {"cat": 5, "tree": 1},
        "embeddings": {},
    }


def test_kinds_and_targets_are_described(tmp_path: Path) -> None:
    ones = torch.ones(2, 2)
    state = factors("lora_unet_conv_in", (2, 2), (2, 2))
    state |= {"lora_unet_conv_in.lora_mid.weight": torch.ones(2, 2, 3, 3)}
    state |= factors("lora_unet_a_proj_in", (2, 2), (2, 2))
    state |= {"lora_unet_a_proj_in.dora_scale": torch.ones(2, 1)}
    state |= {f"lora_unet_b_ff_net_2.hada_{p}": ones for p in ("w1_a", "w1_b", "w2_a", "w2_b")}
    state |= {f"lora_unet_time_embedding_linear_1.lokr_{p}": ones for p in ("w1", "w2")}
    state |= {"lora_unet_norm.b_norm": torch.ones(2), "bundle_emb.x.string_to_param.*": ones}
    save_file({n: t.clone() for n, t in state.items()}, tmp_path / "a.safetensors")
    description = read_adapter(tmp_path / "a.safetensors").describe()
    assert description["kinds"] == {
        "LoCon": 1,
        "LoRA with DoRA": 1,
        "LoHa": 1,
        "LoKr": 1,
        "difference": 1,
    }
    assert set(description["targets"]) == {
        "convolutions",
        "projections",
        "feed-forward",
        "embeddings",
        "norms",
    }
    assert description["family"] is None


@pytest.mark.parametrize(
    ("name", "width", "metadata", "family"),
    [
        (f"lora_unet_{TO_K}", 768, {}, "Stable Diffusion 1.x"),
        (f"lora_unet_{TO_K}", 1024, {}, "Stable Diffusion 2.x"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_v", 2048, {}, "XL"),
        (f"lora_unet_{TO_K}", 1280, {}, "the refiner of"),
        (f"lora_unet_{TO_K}", 5, {"ss_base_model_version": "sdxl_base_v1-0"}, "XL"),
        ("unet.x", 5, {"modelspec.architecture": "stable-diffusion-v2-512/lora"}, "2.x"),
        (f"lora_unet_{TO_K}", 768, {"ss_base_model_version": "sdxl_base_v1-0"}, "1.x"),
        ("lora_te2_x", 5, {}, "XL"),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 1024, {}, "2.x"),
        ("transformer.transformer_blocks.0.x", 5, {}, "a diffusion transformer"),
        ("lora_unet_joint_blocks_0_x", 5, {}, "Stable Diffusion 3"),
    ],
)
def test_families_are_told_by_shapes_then_by_metadata(
    tmp_path: Path, name: str, width: int, metadata: dict[str, str], family: str
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(factors(name, (8, 2), (2, width)), path, metadata=metadata)
    assert family in read_adapter(path).describe()["family"]


@pytest.mark.parametrize("tags", ["", "{", "[]", "[" * 100_000, '{"a": [1]}', '{"a": {"b": "c"}}'])
def test_tags_that_are_damaged_are_none(tmp_path: Path, tags: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file(GOOD, path, metadata={"ss_tag_frequency": tags})
    assert read_adapter(path).describe()["training_tags"] == {}
