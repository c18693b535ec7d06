from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from engine.configs.diffusion import TextEncoderConfig
from export.modules.clip import TextEncoder
from tests.support.parity import randomised, relative_error, text_checkpoint
from tests.support.tolerances import PARITY_RTOL

START, END, LEGACY_END, LENGTH = 98, 99, 2, 16

BASE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "eos_token_id": END,
    "projection_dim": 24,
    "hidden_act": "quick_gelu",
}
KINDS: dict[str, dict[str, Any]] = {
    "base": BASE,
    "gelu": BASE | {"hidden_act": "gelu"},
    "legacy-end": BASE | {"eos_token_id": LEGACY_END},
    "gelu-legacy-end": BASE | {"hidden_act": "gelu", "eos_token_id": LEGACY_END},
    "one-layer": BASE | {"num_hidden_layers": 1},
    "one-head": BASE | {"num_attention_heads": 1},
    "wide-epsilon": BASE | {"layer_norm_eps": 1e-2},
}
CLASSES = (CLIPTextModel, CLIPTextModelWithProjection)


def pair(kind: dict[str, Any], model_class: type) -> tuple[Any, TextEncoder]:
    torch.manual_seed(0)
    reference = randomised(model_class(CLIPTextConfig(**kind)))
    values = reference.config.to_dict() | {"architectures": [model_class.__name__]}
    module = TextEncoder(TextEncoderConfig.from_dict(values))
    module.load_state_dict(text_checkpoint(reference), strict=True)
    return reference, module.eval()


def prompts(batch: int, length: int, padding: int) -> Tensor:
    """Start, words, end, and padding after it; the first row is full and the second empty."""
    input_ids = torch.randint(3, START, (batch, length))
    input_ids[:, 0] = START
    for row, end in zip(input_ids, (length - 1, 1, length // 2), strict=False):
        row[end:] = padding
        row[end] = END
    return input_ids


@torch.no_grad()
def check(kind: dict[str, Any], model_class: type, input_ids: Tensor) -> None:
    reference, module = pair(kind, model_class)
    expected = reference(input_ids, output_hidden_states=True)
    projected = model_class is CLIPTextModelWithProjection
    expected_pooled = expected.text_embeds if projected else expected.pooler_output
    last, penultimate, pooled = module(input_ids)
    assert relative_error(last, expected.last_hidden_state) < PARITY_RTOL
    assert relative_error(penultimate, expected.hidden_states[-2]) < PARITY_RTOL
    assert relative_error(pooled, expected_pooled) < PARITY_RTOL


@pytest.mark.parametrize("padding", [0, END], ids=["pad-0", "pad-end"])
@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_agrees_with_transformers(kind, model_class, padding):
    check(kind, model_class, prompts(3, LENGTH, padding))


@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize("length", [2, 5, LENGTH])
@pytest.mark.parametrize("batch", [1, 3])
def test_agrees_at_any_length_and_batch(batch, length, model_class):
    check(BASE, model_class, prompts(batch, length, END))


def test_a_prompt_without_an_end_is_pooled_at_its_start():
    other_end = BASE | {"eos_token_id": LEGACY_END + 1}  # not the largest id, which is looked for
    check(other_end, CLIPTextModel, torch.randint(LEGACY_END + 2, START, (2, LENGTH)))


def test_an_end_that_is_not_the_largest_id():
    input_ids = prompts(3, LENGTH, 5)
    input_ids[input_ids == END] = 50
    input_ids[:, -1] = END
    check(BASE | {"eos_token_id": 50}, CLIPTextModelWithProjection, input_ids)


EXTRA = 3


@torch.no_grad()
@pytest.mark.parametrize("end", [LEGACY_END, END])
@pytest.mark.parametrize("model_class", CLASSES)
def test_taught_words_are_rows_after_the_vocabulary(model_class, end):
    """transformers' model with a longer table is the oracle; it is told the end by its id."""
    reference, module = pair(BASE | {"eos_token_id": end}, model_class)
    extra = torch.randn(EXTRA, BASE["hidden_size"])
    reference.resize_token_embeddings(BASE["vocab_size"] + EXTRA)
    table = reference.get_input_embeddings().weight
    table[-EXTRA:] = extra
    transformer = getattr(reference, "text_model", reference)
    transformer.eos_token_id = END
    input_ids = prompts(3, LENGTH, END)
    input_ids[:, 2] = BASE["vocab_size"] + torch.arange(3)
    input_ids[0, 5:8] = BASE["vocab_size"] + torch.tensor([2, 0, 2])
    expected = reference(input_ids, output_hidden_states=True)
    projected = model_class is CLIPTextModelWithProjection
    last, penultimate, pooled = module(input_ids, extra)
    assert relative_error(last, expected.last_hidden_state) < PARITY_RTOL
    assert relative_error(penultimate, expected.hidden_states[-2]) < PARITY_RTOL
    expected_pooled = expected.text_embeds if projected else expected.pooler_output
    assert relative_error(pooled, expected_pooled) < PARITY_RTOL


@torch.no_grad()
def test_rows_that_no_id_asks_for_change_nothing():
    _, module = pair(BASE, CLIPTextModel)
    input_ids = prompts(3, LENGTH, END)
    without = module(input_ids)
    for rows in (1, 4):
        given = module(input_ids, torch.full((rows, BASE["hidden_size"]), 1e4))
        assert all(torch.equal(a, b) for a, b in zip(given, without, strict=True))


def test_a_token_does_not_see_those_after_it():
    _, module = pair(BASE, CLIPTextModel)
    one = prompts(1, LENGTH, END)
    other = one.clone()
    other[:, 8:] = 5
    with torch.no_grad():
        before, after = module(one)[0], module(other)[0]
    assert relative_error(after[:, :8], before[:, :8]) < PARITY_RTOL
    assert relative_error(after[:, 8:], before[:, 8:]) > PARITY_RTOL
