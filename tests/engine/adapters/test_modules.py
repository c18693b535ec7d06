from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from engine.adapters.adapter import read_adapter
from engine.errors import ModelError
from tests.support.adapters import GOOD, TO_K, Model, adapted, factors


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


LORA_UP, LORA_DOWN = (f"lora_unet_conv_in.lora_{part}.weight" for part in ("up", "down"))
REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "nothing": ({}, "holds no adapter|no tensors"),
    "checkpoint": ({"model.diffusion_model.out.2.weight": torch.ones(3)}, "is no adapter that is"),
    "inversion": ({"emb_params": torch.ones(3)}, "is a textual inversion"),
    "oft": ({"lora_unet_conv_in.oft_blocks": torch.ones(3)}, "of the kind OFT"),
    "ia3": ({"lora_unet_conv_in.on_input": torch.ones(3)}, "of the kind"),
    "no down": ({LORA_UP: GOOD[LORA_UP]}, "incomplete: it has up and no down"),
    "no up": ({LORA_DOWN: GOOD[LORA_DOWN]}, "incomplete: it has down and no up"),
    "half a loha": ({"lora_unet_conv_in.hada_w1_a": torch.ones(2, 2)}, "and no hada_w1_b"),
    "half a lokr": ({"lora_unet_conv_in.lokr_w1": torch.ones(2, 2)}, "and no lokr_w2_a"),
    "alpha alone": ({"lora_unet_conv_in.alpha": torch.ones(())}, "made of alpha, which is no"),
    "norms alone": ({"lora_unet_conv_in.dora_scale": torch.ones(8, 1)}, "made of dora_scale"),
    "two kinds": (
        GOOD | {"lora_unet_conv_in.diff": torch.ones(8)},
        "made of diff, down, up, which",
    ),
    "twice": (GOOD | {"lora_unet_conv_in.lora_A.weight": torch.ones(2, 36)}, "a tensor twice"),
    "two names": (
        GOOD | factors("lora_unet_input_blocks_0_0", (8, 1, 1, 1), (1, 4, 3, 3)),
        "changes conv_in.weight of the unet twice",
    ),
    "ranks": (
        factors("lora_unet_conv_in", (8, 2), (3, 36)),
        r"do not fit together: \[8, 2\], \[3, 36\]",
    ),
    "integers": ({name: tensor.int() for name, tensor in GOOD.items()}, "as I32; an adapter's"),
    "two alphas": (GOOD | {"lora_unet_conv_in.alpha": torch.ones(2)}, "an alpha is one number"),
    "alpha nan": (GOOD | {"lora_unet_conv_in.alpha": torch.tensor(float("nan"))}, "the alpha nan"),
    "empty": (factors("lora_unet_conv_in", (8, 0), (0, 36)), "empty or a single number"),
    "module": (
        factors("lora_unet_nowhere", (8, 2), (2, 36)),
        "'nowhere', which this model does not",
    ),
    "encoder": (
        factors("lora_te2_text_projection", (8, 2), (2, 8)),
        "in its text_encoder_2; .* XL",
    ),
    "flux": (factors("lora_unet_double_blocks_0_img_attn_qkv", (8, 2), (2, 8)), "made for FLUX"),
    "size": (factors("lora_unet_conv_in", (8, 2), (2, 9)), "has 8 × 9 .* this model 8 × 4 × 3 × 3"),
    "sd2": (factors(f"lora_unet_{TO_K}", (8, 2), (2, 1024)), "made for Stable Diffusion 2.x"),
    "xl": (factors(f"lora_unet_{TO_K}", (8, 2), (2, 2048)), "made for Stable Diffusion XL"),
    "bias": ({f"lora_unet_{TO_K}.diff_b": torch.ones(8)}, "changes the bias of .* has none here"),
    "norms": (
        GOOD | {"lora_unet_conv_in.dora_scale": torch.ones(5, 1)},
        r"norms of the shape \[5, 1\]",
    ),
    "no component": (factors("base_model.model.nowhere", (8, 2), (2, 9)), "'nowhere', which this"),
    "unfit anywhere": (factors("base_model.model.conv_in", (8, 2), (2, 9)), "has 8 × 9"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_added_is_refused(model: Model, tmp_path: Path, case: str) -> None:
    state, message = REFUSED[case]
    path = tmp_path / "a.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    with pytest.raises(ModelError, match=message) as error:
        read_adapter(path).resolve(model.shapes)
    assert str(path) in str(error.value)
    assert len(str(error.value)) - len(str(path)) < 400
    assert "\n" not in str(error.value)


def test_a_misfit_names_the_model_too(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(factors(f"lora_unet_{TO_K}", (320, 2), (2, 1024)), path)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    with pytest.raises(ModelError, match=r"for Stable Diffusion 2.x, and the model is .* 1.x"):
        read_adapter(path).resolve({"unet": {name: (320, 768)}})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38])
@pytest.mark.parametrize("part", ["up", "down"])
@pytest.mark.parametrize("dora", [False, True])
def test_numbers_that_are_not_finite_are_refused(
    model: Model, tmp_path: Path, value: float, part: str, dora: bool
) -> None:
    state = {name: tensor.clone() for name, tensor in GOOD.items()}
    state[f"lora_unet_conv_in.lora_{part}.weight"].view(-1)[3] = value
    if dora:
        state["lora_unet_conv_in.dora_scale"] = torch.full((8, 1, 1, 1), value)
    save_file(state, tmp_path / "a.safetensors")
    weights = adapted(model.bases, tmp_path / "a.safetensors")["unet"]
    with pytest.raises(ModelError, match=r"'conv_in' in .* not finite or too large"):
        weights["conv_in.weight"]


def test_a_weight_that_makes_numbers_too_large_is_refused(model: Model, tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "a.safetensors")
    weights = adapted(model.bases, (tmp_path / "a.safetensors", 1e300))["unet"]
    with pytest.raises(ModelError, match=r"too large to be added"):
        weights["conv_in.weight"]


def test_places_without_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no adapter; give its file"):
        read_adapter(tmp_path)
    with pytest.raises(ModelError, match=r"does not exist"):
        read_adapter(tmp_path / "a.safetensors")


PEFT_NAMES = {
    f"base_model.model.conv_in.lora_{part}.default.weight": tensor
    for part, tensor in zip("BA", GOOD.values(), strict=True)
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON object"),
        ("[]", "no JSON object"),
        ("[" * 100_000, "no JSON object"),
        ('{"peft_type": "OFT"}', "kind 'OFT'; known are LORA"),
        ('{"peft_type": 3}', "kind 3"),
        ('{"lora_alpha": "8"}', "'8' as alpha"),
        ('{"lora_alpha": Infinity}', "inf as alpha"),
        ('{"lora_alpha": NaN}', "nan as alpha"),
        ('{"lora_alpha": true}', "True as alpha"),
        ('{"r": 0}', "0 as r; .* from 1 on"),
        ('{"alpha_pattern": 3}', "3 as alpha_pattern"),
        ('{"alpha_pattern": {"(a+)+": 3}}', "only names of modules"),
        ('{"rank_pattern": {"to_q": -1}}', "-1 as rank_pattern"),
    ],
)
def test_configurations_that_cannot_be_used_are_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    save_file(PEFT_NAMES, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        read_adapter(tmp_path)
    path = tmp_path / "a.safetensors"
    save_file(PEFT_NAMES, path, metadata={"lora_adapter_metadata": text})
    with pytest.raises(ModelError, match=message):
        read_adapter(path)


def test_configurations_that_are_no_text_are_refused(tmp_path: Path) -> None:
    save_file(PEFT_NAMES, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"adapter_config.json cannot be read"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(b" " * (2**24 + 1))
    with pytest.raises(ModelError, match=r"is larger than any adapter's configuration"):
        read_adapter(tmp_path)


def test_a_peft_file_without_a_configuration_has_no_alpha(model: Model, tmp_path: Path) -> None:
    save_file(PEFT_NAMES, tmp_path / "adapter_model.safetensors")
    (module,) = read_adapter(tmp_path).modules
    assert (module.rank(), module.alpha(), module.scale()) == (2, None, 1.0)
    assert adapted(model.bases, tmp_path)["unet"].touched == {"conv_in.weight"}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_files_of_any_tensors_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    prefixes = st.sampled_from(("", "lora_unet_", "unet.", "lora_te_", "base_model.model."))
    modules = st.sampled_from(("conv_in", TO_K, "x", "text_model.final_layer_norm"))
    parts = ["alpha", "diff", "diff_b", "w_norm", "dora_scale", "lora_magnitude_vector"]
    parts += [f"lora_{p}.weight" for p in ("up", "down", "mid", "A", "B", "C")]
    parts += [f"hada_{p}" for p in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")]
    parts += [f"lokr_{p}" for p in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")]
    names = st.tuples(prefixes, modules, st.sampled_from(parts)).map(
        lambda n: f"{n[0]}{n[1]}.{n[2]}"
    )
    sizes = st.lists(st.sampled_from((0, 1, 2, 4, 8, 36)), max_size=4)
    state = data.draw(st.dictionaries(names, sizes, min_size=1, max_size=8))
    path = tmp_path / "a.safetensors"
    save_file({name: torch.ones(size) for name, size in state.items()}, path)
    bases = {"unet": {"conv_in.weight": np.ones((8, 4, 3, 3), np.float32)}}
    with suppress(ModelError):
        assert adapted(bases, path)["unet"]["conv_in.weight"].shape == (8, 4, 3, 3)
