"""Adapters of which not all fits a model, and what else comes in their files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from engine.adapters.adapter import AdapterChoice, adapt, read_adapter, read_adapters
from engine.checkpoints.families import FAMILIES
from engine.checkpoints.few_steps import find_variant_of_adapter
from engine.errors import ModelError

DRAW = np.random.default_rng(0)
SHAPES = {f"blocks.{i}.to_q.weight": (8, 6) for i in range(4)} | {"conv_in.weight": (8, 9, 3, 3)}
BASES = {"unet": {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}}


def factors(module: str, rows: int = 8, columns: int = 6) -> dict[str, NDArray[np.float32]]:
    ends = {"lora_up.weight": (rows, 2), "lora_down.weight": (2, columns)}
    return {f"{module}.{end}": DRAW.standard_normal(s).astype("f4") for end, s in ends.items()}


def written(folder: Path, *modules: dict[str, NDArray[np.float32]]) -> Path:
    state = {name: value for module in modules for name, value in module.items()}
    save_file(state, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def deltas(path: Path, *, strict: bool = False) -> dict[str, NDArray[np.float32]]:
    (adapter,) = read_adapters([path], strict=strict)
    adapted = adapt(BASES, {"unet": SHAPES}, [adapter])["unet"]
    return {name: adapted[name] for name in adapted.touched}


def test_most_of_an_adapter_is_used_and_the_rest_named(tmp_path: Path) -> None:
    good = [factors(f"lora_unet_blocks_{i}_to_q") for i in range(2)]
    path = written(tmp_path, *good, factors("lora_te_vision_model_fc1"))
    expected = deltas(written(tmp_path, *good))
    written(tmp_path, *good, factors("lora_te_vision_model_fc1"))
    found = deltas(path)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    (note,) = read_adapter(path).resolve({"unet": SHAPES}).notes
    assert note == (
        "1 of the 3 modules of lora.safetensors do not fit the model and are not used: "
        "'vision_model_fc1'"
    )


@pytest.mark.parametrize("fitting", [0, 1])
def test_less_than_half_of_an_adapter_is_too_little(tmp_path: Path, fitting: int) -> None:
    good = [factors(f"lora_unet_blocks_{i}_to_q") for i in range(fitting)]
    bad = [factors(f"lora_unet_other_{i}") for i in range(fitting + 1)]
    path = written(tmp_path, *good, *bad)
    said = f"{fitting} of its {2 * fitting + 1} modules fit and its fam"
    with pytest.raises(ModelError, match=said):
        deltas(path)


def test_half_of_an_adapter_is_enough(tmp_path: Path) -> None:
    path = written(tmp_path, factors("lora_unet_blocks_0_to_q"), factors("lora_te_vision_fc1"))
    assert list(deltas(path)) == ["blocks.0.to_q.weight"]
    with pytest.raises(ModelError, match="1 of its 2 modules fit"):
        deltas(path, strict=True)


def test_who_is_strict_wants_all_of_it(tmp_path: Path) -> None:
    good = [factors(f"lora_unet_blocks_{i}_to_q") for i in range(3)]
    path = written(tmp_path, *good, factors("lora_unet_blocks_3_to_q", columns=7))
    assert len(deltas(path)) == 3
    with pytest.raises(ModelError, match=r"has 8 × 7 numbers .*; 3 of its 4 modules fit"):
        deltas(path, strict=True)
    choice = AdapterChoice(path=path, strict=True)
    with pytest.raises(ModelError, match="3 of its 4 modules fit"):
        adapt(BASES, {"unet": SHAPES}, [(read_adapter(path), choice)])


@pytest.mark.parametrize(("theirs", "ours"), [(4, 9), (9, 4)])
@pytest.mark.parametrize("kind", ["LoRA", "difference"])
def test_the_first_convolution_of_kin(tmp_path: Path, theirs: int, ours: int, kind: str) -> None:
    change = factors("lora_unet_conv_in", columns=theirs * 9)
    delta = (
        change["lora_unet_conv_in.lora_up.weight"] @ change["lora_unet_conv_in.lora_down.weight"]
    )
    if kind == "difference":
        change = {"lora_unet_conv_in.diff": delta.reshape(8, theirs, 3, 3)}
    shapes = {"conv_in.weight": (8, ours, 3, 3)}
    bases = {"unet": {"conv_in.weight": np.zeros(shapes["conv_in.weight"], np.float32)}}
    path = written(tmp_path, change)
    adapted = adapt(bases, {"unet": shapes}, read_adapters([path]))["unet"]["conv_in.weight"]
    expected = delta.reshape(8, theirs, 3, 3)
    np.testing.assert_array_equal(adapted[:, :4], expected[:, :4])
    assert not adapted[:, 4:].any()


@pytest.mark.parametrize("columns", [5 * 9, 8 * 9, 37])
def test_other_channels_do_not_fit(tmp_path: Path, columns: int) -> None:
    path = written(tmp_path, factors("lora_unet_conv_in", columns=columns))
    with pytest.raises(ModelError, match="0 of its 1 modules fit"):
        deltas(path)


def test_an_alpha_may_be_a_plain_number(tmp_path: Path) -> None:
    state = {n: torch.from_numpy(v) for n, v in factors("lora_unet_blocks_0_to_q").items()}
    alpha = "lora_unet_blocks_0_to_q.alpha"
    torch.save(state | {alpha: 0.5}, tmp_path / "plain.pt")
    torch.save(state | {alpha: torch.tensor(0.5)}, tmp_path / "tensor.pt")
    plain, tensor = (deltas(tmp_path / f"{name}.pt") for name in ("plain", "tensor"))
    (name,) = plain
    assert np.array_equal(plain[name], tensor[name])
    assert not np.array_equal(
        plain[name], deltas(written(tmp_path, factors("lora_unet_blocks_0_to_q")))[name]
    )
    torch.save(state | {alpha: "much"}, tmp_path / "plain.pt")
    with pytest.raises(ModelError, match="an alpha is one number"):
        read_adapter(tmp_path / "plain.pt")


@pytest.mark.parametrize(
    ("names", "components"),
    [
        (("string_to_param.*",), {"text_encoder"}),
        (("emb_params",), {"text_encoder"}),
        (("clip_l", "clip_g"), {"text_encoder", "text_encoder_2"}),
    ],
)
def test_words_come_in_an_adapters_file(
    tmp_path: Path, names: tuple[str, ...], components: set[str]
) -> None:
    words = {f"bundle_emb.my.cat.{name}": np.ones((2, 4), np.float32) for name in names}
    adapter = read_adapter(written(tmp_path, factors("lora_unet_blocks_0_to_q"), words))
    (embedding,) = adapter.embeddings
    assert embedding.name == "my.cat"
    assert set(embedding.vectors) == components
    assert adapter.describe()["embeddings"] == {"my.cat": list(embedding.vectors)}
    with pytest.raises(ModelError, match=r"'bundle_emb\.cat\.other', which is no textual"):
        read_adapter(
            written(tmp_path, {"bundle_emb.cat.other": np.ones((2, 4), np.float32)}, factors("a"))
        )


FEW = {
    "lcm-lora-sdv1-5/pytorch_lora_weights": ("lcm", 8, 1.0),
    "LCM_LoRA_SDXL": ("lcm", 8, 1.0),
    "sdxl_lightning_4step_lora": ("lightning", 4, 1.0),
    "Hyper-SDXL-8steps-lora": ("hyper", 8, 1.0),
    "Hyper-SD15-8steps-CFG-lora": ("hyper", 8, 5.0),
    "sd_xl_turbo_lora_v1": ("turbo", 4, 1.0),
    "dmd2_sdxl_4step_lora_fp16": ("dmd2", 4, 1.0),
    "TCD-SDXL-LoRA/adapter_model": ("tcd", 8, 1.0),
    "SDXLLightning8Step": ("lightning", 8, 1.0),
}


@pytest.mark.parametrize("name", FEW)
def test_adapters_of_few_steps_are_known_by_name(name: str) -> None:
    variant = find_variant_of_adapter(Path(f"{name}.safetensors"), FAMILIES["xl"].variants)
    assert variant is not None
    assert (variant.name, variant.steps[1], variant.guidance_scale) == FEW[name]


@pytest.mark.parametrize(
    "name",
    [
        "lightning_bolts",
        "hyper_realistic_v3",
        "turbo_racer",
        "storm-lightning-style",
        "pytorch_lora",
    ],
)
def test_subjects_of_such_names_are_none(name: str) -> None:
    assert find_variant_of_adapter(Path(f"{name}.safetensors"), FAMILIES["xl"].variants) is None


@pytest.mark.parametrize(
    "beside", ["step", "global_step", "epoch", "optimizer.exp_avg", "lr_scheduler", "ema_decay"]
)
def test_a_trainings_state_beside_an_adapter_is_named(tmp_path: Path, beside: str) -> None:
    state = factors("lora_unet_blocks_0_to_q")
    plain = deltas(written(tmp_path, state))
    path = written(tmp_path, state | {beside: np.ones(3, np.float32)})
    assert read_adapter(path).modules[0].module == "blocks_0_to_q"
    resolution = read_adapter(path).resolve({"unet": SHAPES})
    assert resolution.notes == [f"'{beside}' in {path.name} is a training's and not used"]
    assert {n: v.tolist() for n, v in deltas(path).items()} == {
        n: v.tolist() for n, v in plain.items()
    }


def test_output_vectors_of_a_word_in_an_adapter_are_named(tmp_path: Path) -> None:
    names = ("clip_l", "clip_g", "clip_l_out", "t5")
    words = {f"bundle_emb.cat.{name}": np.ones((2, 4), np.float32) for name in names}
    adapter = read_adapter(written(tmp_path, factors("lora_unet_blocks_0_to_q"), words))
    (embedding,) = adapter.embeddings
    assert set(embedding.vectors) == {"text_encoder", "text_encoder_2"}
    assert set(embedding.unused) == {"clip_l_out", "t5"}
