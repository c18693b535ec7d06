from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.adapters.adapter import AdapterChoice, parse_adapter
from engine.adapters.names import flat_name, module_index, split_name
from engine.checkpoints.ldm_names import unet_sources
from engine.configs.diffusion import UNetConfig
from engine.errors import ModelError
from tests.support.adapters import DOWN, SD15, UP, XL, make_unet


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers_per_block": 1},
        {"layers_per_block": (1, 3)},
        {"down_block_types": (DOWN, DOWN), "up_block_types": (UP, UP)},
        {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2},
    ],
)
def test_original_names_are_those_of_original_checkpoints(options: dict[str, Any]) -> None:
    unet = make_unet(SD15 | options)
    index = module_index("unet", unet.state_dict())
    for name, source in unet_sources(UNetConfig.from_dict(dict(unet.config))).items():
        module, theirs = (n.rpartition(".")[0] for n in (name, source.name))
        assert index[flat_name(theirs)] == index[flat_name(module)] == module


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1, 1)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8, 0.8)),
        ("a.safetensors:0.8:-.5", ("a.safetensors", 0.8, -0.5)),
        ("a:1:2:3", ("a:1", 2, 3)),
        (r"C:\lora\a.safetensors", (r"C:\lora\a.safetensors", 1, 1)),
        (r"C:\lora\a.safetensors:1e-1", (r"C:\lora\a.safetensors", 0.1, 0.1)),
        ("a:b.safetensors", ("a:b.safetensors", 1, 1)),
        ("a:b", ("a:b", 1, 1)),
        ("a: 2 ", ("a", 2, 2)),
        ("a:+2.:0", ("a", 2, 0)),
        ("a:0x2", ("a:0x2", 1, 1)),
        ("a:١", ("a:١", 1, 1)),
    ],
)
def test_choices_are_read(text: str, expected: tuple[str, float, float]) -> None:
    choice = parse_adapter(text)
    assert (choice.path, choice.unet, choice.text_encoder) == (Path(expected[0]), *expected[1:])
    assert choice.weight("unet") == choice.unet
    assert choice.weight("text_encoder_2") == choice.text_encoder


@pytest.mark.parametrize(
    "text", ["", ":0.5", " :1:1", "a:nan", "a:INF", "a:1:-inf", "a:1e999", "\0"]
)
def test_choices_of_nothing_are_refused(text: str) -> None:
    with pytest.raises(ModelError, match=r"names no adapter|cannot be added with the weight"):
        parse_adapter(text)


@settings(deadline=None)
@given(st.text(), st.floats(allow_nan=False, allow_infinity=False), st.booleans())
def test_any_path_and_weight_come_back(path: str, weight: float, both: bool) -> None:
    try:
        choice = parse_adapter(f"{path}:{weight!r}:{-weight!r}" if both else f"{path}x:{weight!r}")
    except ModelError:
        assert not path.strip() or "\0" in path
        return
    assert choice == AdapterChoice(
        path=Path(path if both else f"{path}x"),
        unet=weight,
        text_encoder=-weight if both else weight,
    )


@settings(deadline=None)
@given(st.text(st.sampled_from("lorate_unet.AB0:-updownmidweightalphahada")), st.text(max_size=9))
def test_any_name_is_split_or_not(name: str, tail: str) -> None:
    for text in (name, name + tail, f"lora_unet_{name}.lora_up.weight", f"{name}.lokr_w1"):
        split = split_name(text)
        if split is not None:
            component, module, part = split
            assert component in (None, "unet", "text_encoder", "text_encoder_2")
            assert module
            assert module in text
            assert part


def test_endless_names_are_no_adapters() -> None:
    assert split_name("a" * 10_000 + ".alpha") is None
    assert split_name("lora_unet_.alpha") is None


def test_flat_names_are_different_for_every_module() -> None:
    for config in (SD15, XL):
        names = make_unet(config).state_dict()
        modules = {name.rpartition(".")[0] for name in names}
        assert len({flat_name(module) for module in modules}) == len(modules)


@pytest.mark.parametrize(
    "prefix",
    ["unet.base_model.model.", "base_model.model.unet.", "lora_unet__orig_mod_", "unet.unet."],
)
def test_prefixes_are_nested(prefix):
    module = "mid_block_attn" if prefix.endswith("_") else "mid_block.attn"
    split = split_name(f"{prefix}{module}.lora_A.weight")
    assert split == ("unet", module, "down")


@pytest.mark.parametrize(
    ("prefix", "component"),
    [
        ("lora_unet.", "unet"),
        ("lora_te.", "text_encoder"),
        ("lora_te1.", "text_encoder"),
        ("lora_te2.", "text_encoder_2"),
    ],
)
def test_kohyas_prefixes_before_names_with_dots(prefix, component):
    split = split_name(f"{prefix}mid_block.attn.lora_down.weight")
    assert split == (component, "mid_block.attn", "down")
