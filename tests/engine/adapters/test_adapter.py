import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from engine.adapters.adapter import adapt, parse_adapter, read_adapter
from engine.checkpoints.ldm_names import unet_sources
from engine.configs.diffusion import UNetConfig
from tests.support.adapters import (
    ATTENTION,
    EVERYTHING,
    RANK,
    TEXT,
    Model,
    adapted,
    agrees,
    modules_of,
    random_factors,
    write_attention,
    write_kohya,
)
from tests.support.tolerances import ADAPTER_RTOL


def load_with_diffusers(
    unet: Any, encoders: Iterable[Any], state: Any, kind: Any = StableDiffusionPipeline
) -> None:
    """Add an adapter by diffusers' own loaders, and fuse it into the weights."""
    state, alphas, metadata = kind.lora_state_dict(
        state, unet_config=unet.config, return_lora_metadata=True
    )
    unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas, metadata=metadata)
    unet.fuse_lora()
    for encoder, name in zip(encoders, ("text_encoder", "text_encoder_2"), strict=False):
        kind.load_lora_into_text_encoder(state, alphas, encoder, prefix=name, metadata=metadata)
        for module in encoder.modules():
            if hasattr(module, "merge"):
                module.merge()


def test_kohya_agrees_with_diffusers(tmp_path: Path) -> None:
    model, path = Model(), tmp_path / "a.safetensors"
    unet = modules_of(model.shapes["unet"], *EVERYTHING)
    text = modules_of(model.shapes["text_encoder"], *TEXT)
    modules = {f"lora_unet_{m}": s for m, s in unet.items()}
    modules |= {f"lora_te_{m}": s for m, s in text.items()}
    state = write_kohya(path, modules)
    weights = adapted(model.bases, path)
    load_with_diffusers(model.unet, model.encoders, state)
    assert model.agrees(weights) == {"unet": len(unet), "text_encoder": len(text)}
    assert weights["unet"].touched == {f"{module}.weight" for module in unet}


def test_kohya_for_xl_in_the_original_names_agrees_with_diffusers(tmp_path: Path) -> None:
    model, path = Model("xl"), tmp_path / "a.safetensors"
    sources = unet_sources(UNetConfig.from_dict(dict(model.unet.config)))
    unet = modules_of(model.shapes["unet"], *EVERYTHING)
    modules = {
        "lora_unet_" + sources[f"{m}.weight"].name.removesuffix(".weight"): s
        for m, s in unet.items()
    }
    assert {
        "lora_unet_label_emb.0.0",
        "lora_unet_out.2",
        "lora_unet_middle_block.1.proj_in",
    } <= set(modules)
    for number, encoder in enumerate(("text_encoder", "text_encoder_2"), 1):
        text = modules_of(model.shapes[encoder], *TEXT)
        modules |= {f"lora_te{number}_{m}": s for m, s in text.items()}
    state = write_kohya(path, modules)
    weights = adapted(model.bases, path)
    load_with_diffusers(model.unet, model.encoders, state, StableDiffusionXLPipeline)
    assert model.agrees(weights) == {"unet": len(unet), "text_encoder": 12, "text_encoder_2": 12}


@pytest.mark.parametrize("dialect", ["lora_A", "lora.down", "processor"])
def test_diffusers_names_agree_with_diffusers(tmp_path: Path, dialect: str) -> None:
    model, path = Model(), tmp_path / "a.safetensors"
    unet = modules_of(model.shapes["unet"], *ATTENTION)
    text = modules_of(model.shapes["text_encoder"], *TEXT[:4])
    parts = {"up": ".lora.up.weight", "down": ".lora.down.weight"}
    if dialect == "lora_A":
        parts = {"up": ".lora_B.weight", "down": ".lora_A.weight"}
    state = {}
    for i, (module, shape) in enumerate(unet.items()):
        name = module
        if dialect == "processor":
            head, _, last = module.removesuffix(".0").rpartition(".")
            name = f"{head}.processor.{last}_lora"
            parts = {"up": ".up.weight", "down": ".down.weight"}
        for part, factor in random_factors(shape, i).items():
            state[f"unet.{name}{parts[part]}"] = factor
    for i, (module, shape) in enumerate(text.items()):
        name = module.removeprefix("text_model.")  # as transformers names them since 5.0
        if dialect != "lora_A":
            name = f"text_model.{name}".replace("out_proj", "to_out_lora")
            name = re.sub("(.)_proj$", r"to_\1_lora", name)
            parts = {"up": ".up.weight", "down": ".down.weight"}
        for part, factor in random_factors(shape, 99 + i).items():
            state[f"text_encoder.{name}{parts[part]}"] = factor
    save_file(state, path)
    weights = adapted(model.bases, path)
    load_with_diffusers(model.unet, model.encoders, state)
    assert model.agrees(weights) == {"unet": len(unet), "text_encoder": len(text)}


def randomise_adapter(model: Any) -> None:
    """Fill an adapter's tensors, whose up factors start at zero."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter *= 1.5
            elif any(mark in name for mark in ("lora_", "hada_", "lokr_")):
                parameter.copy_(torch.randn(parameter.shape) / 2)


def test_files_that_diffusers_saves_agree_with_diffusers(tmp_path: Path) -> None:
    model = Model()
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        rank_pattern={"conv_in": 2},
        alpha_pattern={"^conv_in": 5, "attn2.to_k": 7},
        target_modules=["conv_in", "to_k", "to_q", "linear_1"],
    )
    text = LoraConfig(r=3, lora_alpha=2, use_rslora=True, target_modules=["q_proj", "fc1"])
    model.unet.add_adapter(config)
    model.encoders[0].add_adapter(text)
    randomise_adapter(model.unet)
    randomise_adapter(model.encoders[0])
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(model.unet, adapter_name="default"),
        text_encoder_lora_layers=get_peft_model_state_dict(
            model.encoders[0], adapter_name="default"
        ),
        unet_lora_adapter_metadata=config.to_dict(),
        text_encoder_lora_adapter_metadata=text.to_dict(),
    )
    weights = adapted(model.bases, tmp_path)
    fuse(model.unet)
    fuse(model.encoders[0])
    assert model.agrees(weights) == {"unet": 26, "text_encoder": 4}
    model.unet.save_lora_adapter(tmp_path / "unet")  # the same without a prefix
    alone = adapted(model.bases, tmp_path / "unet")
    for name in model.bases["unet"]:
        assert np.array_equal(alone["unet"][name], weights["unet"][name])


def fuse(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "merge"):
            module.merge()


CONVOLUTIONS = ["conv1", "conv_in", "proj_in"]
LINEAR = ["to_q", "to_k", "linear_1"]


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR + CONVOLUTIONS),
        LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=LINEAR + CONVOLUTIONS),
        LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=LINEAR + CONVOLUTIONS),
        LoHaConfig(r=4, alpha=6, target_modules=LINEAR + CONVOLUTIONS),
        LoHaConfig(r=4, alpha=6, target_modules=LINEAR + CONVOLUTIONS, use_effective_conv2d=True),
        LoKrConfig(r=2, alpha=6, target_modules=LINEAR + CONVOLUTIONS),
        LoKrConfig(r=2, alpha=3, target_modules=LINEAR, decompose_both=True),
        LoKrConfig(r=1, alpha=3, target_modules=CONVOLUTIONS, use_effective_conv2d=True),
        LoKrConfig(
            r=8, alpha=3, target_modules=LINEAR, rank_pattern={"to_q": 9}, alpha_pattern={"to_k": 2}
        ),
    ],
    ids=lambda config: f"{config.peft_type.value}-{'-'.join(sorted(config.target_modules))}"[:30],
)
def test_files_that_peft_saves_agree_with_peft(tmp_path: Path, config: Any) -> None:
    model = Model()
    adapted_unet = get_peft_model(model.unet, config)
    randomise_adapter(adapted_unet)
    adapted_unet.save_pretrained(tmp_path)
    weights = adapted(model.bases, tmp_path)
    model.unet = adapted_unet.merge_and_unload()
    assert model.agrees(weights)["unet"] == len(weights["unet"].touched) > 10


def test_lycoris_kinds_in_one_file_agree_with_lycoris(tmp_path: Path) -> None:
    model = Model()
    layers = dict(model.unet.named_modules())
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    options = {"lora_dim": 2, "alpha": 3.0}
    kinds: list[tuple[str, type[Any], dict[str, Any]]] = [
        ("conv_in", LoConModule, options | {"use_tucker": True}),
        ("conv_out", LohaModule, options | {"use_tucker": True}),
        (f"{block}.attn1.to_q", LoConModule, options),
        (f"{block}.attn1.to_k", LohaModule, options),
        (f"{block}.attn1.to_v", LokrModule, options | {"factor": 2}),
        (f"{block}.attn1.to_out.0", LokrModule, options | {"lora_dim": 99}),
        (f"{block}.attn2.to_q", LoConModule, options | {"weight_decompose": True}),
        (f"{block}.attn2.to_k", LokrModule, options | {"weight_decompose": True, "factor": 2}),
        (f"{block}.ff.net.2", FullModule, {}),
        (f"{block}.norm1", NormModule, {}),
        ("down_blocks.0.resnets.0.conv1", LokrModule, options | {"use_tucker": True, "factor": 2}),
        ("down_blocks.0.resnets.0.conv2", LokrModule, options | {"factor": 4}),
        ("down_blocks.0.resnets.1.conv2", LoConModule, options | {"weight_decompose": True}),
    ]
    torch.manual_seed(0)
    state, expected = {}, {}
    for module, kind, kwargs in kinds:
        net = kind(module, layers[module], **kwargs).eval()
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if not name.startswith("org_"):
                    parameter.add_(torch.randn(parameter.shape) / 3)
        base = layers[module].weight.detach()
        if kind in (FullModule, NormModule):
            change, bias = (
                (net.weight, net.bias) if kind is FullModule else (net.w_norm, net.b_norm)
            )
            names = ("diff", "diff_b") if kind is FullModule else ("w_norm", "b_norm")
            parts = dict(zip(names, (change, bias), strict=True))
            expected[f"{module}.bias"] = layers[module].bias + bias
            merged = base + change
        else:
            parts = net.custom_state_dict()
            # not get_merged_weight, which multiplies LoHa and LoKr by their scale again
            change = net.get_diff_weight()[0] if kind is LoConModule else net.get_weight(base.shape)
            merged = base + change
            merged = net.apply_weight_decompose(merged) if net.wd else merged
        expected[f"{module}.weight"] = merged
        flat = "lycoris_" + module.replace(".", "_")
        state |= {f"{flat}.{part}": value.detach().contiguous() for part, value in parts.items()}
    save_file(state, tmp_path / "a.safetensors")
    weights = adapted(model.bases, tmp_path / "a.safetensors")["unet"]
    assert weights.touched == set(expected)
    fused = model.bases["unet"] | {n: v.detach().numpy() for n, v in expected.items()}
    assert agrees(weights, fused, model.bases["unet"]) == len(expected)


# What adding means


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


def test_what_is_not_touched_is_the_base_itself(model: Model, tmp_path: Path) -> None:
    path = write_attention(model, tmp_path / "a.safetensors")
    before = {name: array.copy() for name, array in model.bases["unet"].items()}
    weights = adapted(model.bases, path)["unet"]
    assert len(weights) == len(model.bases["unet"])
    assert "conv_in.weight" in weights
    assert "nothing" not in weights
    with pytest.raises(KeyError):
        weights["nothing"]
    for name, array in weights.items():
        base = model.bases["unet"][name]
        assert (array is base) == (name not in weights.touched)
        assert np.array_equal(base, before[name])  # taking the adapter off restores every bit
    assert weights["conv_in.weight"] is model.bases["unet"]["conv_in.weight"]
    assert 0 < len(weights.touched) < len(weights)


def test_adapted_weights_are_compared_and_shown_without_computing(
    model: Model, tmp_path: Path
) -> None:
    path = write_attention(model, tmp_path / "a.safetensors")
    first, second = (adapted(model.bases, path)["text_encoder"] for _ in range(2))
    assert first == first
    assert first != second
    assert len({first, second}) == 2
    assert repr(first) == "Adapted(12 of 36 tensors)"


def test_a_weight_of_zero_is_the_base_itself(model: Model, tmp_path: Path) -> None:
    path = write_attention(model, tmp_path / "a.safetensors")
    weights = adapted(model.bases, (path, 0.0))
    for component, base in model.bases.items():
        assert not weights[component].touched
        assert all(weights[component][name] is base[name] for name in base)


def test_the_text_encoder_has_its_own_weight(model: Model, tmp_path: Path) -> None:
    path = write_attention(model, tmp_path / "a.safetensors")
    choice = parse_adapter(f"{path}:0.5:0")
    weights = adapt(model.bases, model.shapes, [(read_adapter(path), choice)])
    assert weights["unet"].touched
    assert not weights["text_encoder"].touched


def test_several_adapters_add_up_in_any_order(model: Model, tmp_path: Path) -> None:
    chosen = [
        (write_attention(model, tmp_path / f"{i}.safetensors", i), weight)
        for i, weight in enumerate((0.7, -0.4, 1.3))
    ]
    base = model.bases["unet"]
    forwards = adapted(model.bases, *chosen)["unet"]
    backwards = adapted(model.bases, *reversed(chosen))["unet"]
    alone = [adapted(model.bases, choice)["unet"] for choice in chosen]
    for name in forwards.touched:
        total = base[name] + sum(one[name].astype(np.float64) - base[name] for one in alone)
        norm = np.linalg.norm(total)
        assert np.linalg.norm(forwards[name] - backwards[name]) <= ADAPTER_RTOL * norm
        assert np.linalg.norm(forwards[name] - total) <= ADAPTER_RTOL * norm


def test_the_weight_multiplies_the_change(model: Model, tmp_path: Path) -> None:
    path = write_attention(model, tmp_path / "a.safetensors")
    base = model.bases["unet"]
    once, twice = (adapted(model.bases, (path, w))["unet"] for w in (1.0, -2.0))
    for name in once.touched:
        expected = base[name] - 2 * (once[name] - base[name])
        assert np.allclose(twice[name], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_bases_of_other_floats_give_float32(model: Model, tmp_path: Path, dtype: Any) -> None:
    path = write_attention(model, tmp_path / "a.safetensors")
    bases = {"unet": {n: a.astype(dtype) for n, a in model.bases["unet"].items()}}
    bases["text_encoder"] = model.bases["text_encoder"]
    single = adapted(model.bases, path)["unet"]
    weights = adapted(bases, path)["unet"]
    for name in weights.touched:
        assert weights[name].dtype == np.float32
        assert np.allclose(weights[name], single[name], rtol=0, atol=1e-2)
    assert weights["conv_in.weight"].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_factors_are_read_in_every_float(model: Model, tmp_path: Path, dtype: Any) -> None:
    shape = model.shapes["unet"]["conv_in.weight"]
    factors = {part: factor.to(dtype) for part, factor in random_factors(shape, 0).items()}
    state = {f"lora_unet_conv_in.lora_{part}.weight": value for part, value in factors.items()}
    for name, alpha in (("f", torch.tensor(2.0, dtype=dtype)), ("i", torch.tensor([2]))):
        path = tmp_path / f"{name}.safetensors"
        save_file(state | {"lora_unet_conv_in.alpha": alpha}, path)
        actual = adapted(model.bases, path)["unet"]["conv_in.weight"]
        up, down = (factors[part].double().flatten(1) for part in ("up", "down"))
        expected = model.bases["unet"]["conv_in.weight"] + (up @ down / 2).numpy().reshape(shape)
        assert np.linalg.norm(actual - expected) <= ADAPTER_RTOL * np.linalg.norm(expected)


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_without_an_alpha_it_is_the_rank(model: Model, tmp_path: Path, alpha: Any) -> None:
    state = {
        f"lora_unet_conv_in.lora_{part}.weight": factor
        for part, factor in random_factors(model.shapes["unet"]["conv_in.weight"], 0).items()
    }
    stated = {"lora_unet_conv_in.alpha": torch.tensor(float(RANK if alpha is None else alpha))}
    save_file(state, tmp_path / "a.safetensors")
    save_file(state | stated, tmp_path / "b.safetensors")
    a, b = (adapted(model.bases, tmp_path / f"{x}.safetensors")["unet"] for x in "ab")
    assert np.array_equal(a["conv_in.weight"], b["conv_in.weight"])


def test_linear_factors_fit_a_convolution_of_one_pixel(model: Model, tmp_path: Path) -> None:
    module = "down_blocks.0.attentions.0.proj_in"
    shape = model.shapes["unet"][f"{module}.weight"]
    assert shape == (8, 8, 1, 1)
    for file, used in (("a", shape), ("b", shape[:2])):
        write_kohya(tmp_path / f"{file}.safetensors", {f"lora_unet_{module}": used})
    a, b = (adapted(model.bases, tmp_path / f"{x}.safetensors")["unet"] for x in "ab")
    assert a[f"{module}.weight"].shape == shape
    assert np.array_equal(a[f"{module}.weight"], b[f"{module}.weight"])
