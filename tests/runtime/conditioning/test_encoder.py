"""What the UNet is told, with engines that give numbers by which they are known."""

from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline

from engine.adapters.textual_inversion import Embedding
from engine.configs.diffusion import TextEncoderConfig, UNetConfig
from engine.errors import ModelError, RequestError
from engine.model import Model, family_of, find_model
from runtime.conditioning.encoder import (
    EmbeddingCache,
    Encoder,
    Texts,
)
from runtime.conditioning.guidance import Guidance, embedded_guidance
from runtime.conditioning.tokenizer import Tokenizer, check_tokenizers, load_tokenizers
from tests.support import published_configs as published
from tests.support.tolerances import EMBEDDED_GUIDANCE

PICTOGRAM = Model.open(find_model("pictogram"))
XL, REFINER = (UNetConfig.from_dict(v) for v in (published.UNET_XL, published.UNET_REFINER))
CLIP_L, CLIP_H, CLIP_G = (
    TextEncoderConfig.from_dict(values)
    for values in (published.TEXT_SD15, published.TEXT_SD21, published.TEXT_XL_2)
)
TOKENIZERS = {
    "text_encoder": Tokenizer.clip("<|endoftext|>"),
    "text_encoder_2": Tokenizer.clip("!"),
}
HEIGHT, WIDTH = 768, 1024


class FakeEncoder:
    """Gives each text the sum of its ids, plus 0.5 before the last layer; keeps its inputs."""

    def __init__(self, config, scale):
        self.config, self.scale, self.calls = config, scale, []

    def run(self, inputs):
        self.calls.append(inputs)
        ids = inputs["input_ids"]
        marks = self.scale * ids.sum(1, dtype=np.float32)[:, None, None]
        hidden = np.broadcast_to(marks, (*ids.shape, self.config.hidden_size))
        width = self.config.projection_dim or self.config.hidden_size
        return {
            "last_hidden_state": hidden,
            "penultimate_hidden_state": hidden + 0.5,
            "pooled": np.broadcast_to(marks[:, 0], (len(ids), width)),
        }


def encoder(unet, encoders, **facts):
    configs = MappingProxyType({"unet": unet, **encoders})
    model = replace(PICTOGRAM, family=family_of(unet), configs=configs, **facts)
    engines = {
        name: FakeEncoder(config, i + 1) for i, (name, config) in enumerate(encoders.items())
    }
    tokenizers = {name: TOKENIZERS[name] for name in encoders}
    return Encoder(model=model, tokenizers=tokenizers, engine=engines.__getitem__), engines


def xl(**facts):
    both = {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G}
    return encoder(XL, both, **{"zeros_for_empty_prompt": True} | facts)


def condition(ours, *groups, scale=5.0, steps=1, repeats=1, size=(HEIGHT, WIDTH), **options):
    """Encode groups of texts, of which the last is the prompts."""
    texts = Texts(negatives=groups[:-1], prompts=groups[-1:], repeats=repeats)
    return ours.condition(texts, Guidance.over(scale, steps), *size, **options)


def mark(text, name="text_encoder"):
    return TOKENIZERS[name]([text]).input_ids.sum()


def test_one_encoder():
    ours, _ = encoder(UNetConfig.from_dict(published.UNET_SD15), {"text_encoder": CLIP_L})
    (given,) = condition(ours, ["", ""], ["a", "b"])
    assert set(given) == {"context", "guidance"}
    context = given["context"]
    assert context.shape == (2, 2, 77, 768)
    assert context.dtype == np.float32
    expected = [[mark(""), mark("")], [mark("a"), mark("b")]]
    np.testing.assert_array_equal(context[..., 0, 0], expected)
    assert given["guidance"][..., 0, 0, 0].tolist() == [[-4.0, -4.0], [5.0, 5.0]]


def test_two_encoders_are_put_side_by_side():
    ours, engines = xl()
    (given,) = condition(ours, ["no"], ["cat"], repeats=3)
    assert given["context"].shape == (2, 3, 77, 2048)
    first, second = mark("cat"), 2 * mark("cat", "text_encoder_2")
    assert first != second
    np.testing.assert_array_equal(given["context"][1, :, :, :768], first + 0.5)
    np.testing.assert_array_equal(given["context"][1, :, :, 768:], second + 0.5)
    assert given["text_embeds"].shape == (2, 3, 1280)
    np.testing.assert_array_equal(given["text_embeds"][1], second)
    np.testing.assert_array_equal(given["text_embeds"][0], 2 * mark("no", "text_encoder_2"))
    assert all(len(engine.calls) == 1 for engine in engines.values())
    assert {array.dtype for array in given.values()} == {np.dtype(np.float32)}


def test_the_sizes_that_xl_is_told():
    (given,) = condition(xl()[0], ["no"], ["cat"], repeats=2)
    row = [HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH]
    assert given["time_ids"].tolist() == [[row, row], [row, row]]


def test_the_scores_that_the_refiner_is_told():
    ours, _ = encoder(REFINER, {"text_encoder_2": CLIP_G})
    (given,) = condition(ours, ["no"], ["cat"])
    told = [HEIGHT, WIDTH, 0, 0]
    assert given["time_ids"].tolist() == [[[*told, 2.5]], [[*told, 6.0]]]
    assert given["context"].shape == (2, 1, 77, 1280)
    (alone,) = condition(ours, ["no"], ["cat"], scale=1.0)
    assert alone["time_ids"].tolist() == [[[*told, 6.0]]]


def test_an_empty_negative_prompt_is_zeros_where_the_model_says_so():
    ours, _ = xl()
    (given,) = condition(ours, ["", "no"], ["", "b"], repeats=2)
    for name in ("context", "text_embeds"):
        zeros = [[not rows.any() for rows in group] for group in given[name]]
        assert zeros == [[True, True, False, False], [False] * 4], "and no empty prompt"
    (told,) = condition(xl(zeros_for_empty_prompt=False)[0], [""], ["b"])
    assert told["context"].all()


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 7.5, 8.0, 20.0])
@pytest.mark.parametrize("channels", [4, 48, 256, 257])
def test_an_embedded_guidance_scale_is_that_of_diffusers(scale, channels):
    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    told = torch.tensor([scale - 1], dtype=torch.float64)
    expected = embed(None, told, channels, torch.float64)[0].numpy()
    given = embedded_guidance(scale, channels)
    assert given.dtype == np.float32
    assert given.shape == (channels,)
    np.testing.assert_allclose(given, expected, rtol=0, atol=EMBEDDED_GUIDANCE)


def test_a_model_that_is_told_its_guidance():
    unet = replace(UNetConfig.from_dict(published.UNET_SD15), time_cond_proj_dim=256)
    ours, _ = encoder(unet, {"text_encoder": CLIP_L})
    first, last = condition(ours, ["no", "no"], ["a", "b"], scale=(8.0, 2.0), steps=2)
    np.testing.assert_array_equal(first["timestep_cond"], [embedded_guidance(8.0, 256)] * 2)
    np.testing.assert_array_equal(last["timestep_cond"], [embedded_guidance(2.0, 256)] * 2)
    assert first["guidance"][..., 0, 0, 0].tolist() == [[1, 1]], "it guides itself, in one group"
    assert first["context"] is last["context"]


def test_long_prompts_are_as_long_as_the_longest():
    ours, engines = xl()
    long = "1 " * 76
    (given,) = condition(ours, ["", "no"], ["cat", long])
    assert given["context"].shape == (2, 2, 154, 2048)
    first, second, empty = mark("1 " * 75), mark("1"), mark("")
    marks = given["context"][..., ::77, 0]
    assert marks.tolist() == [
        [[0, 0], [mark("no") + 0.5, empty + 0.5]],
        [[mark("cat") + 0.5, empty + 0.5], [first + 0.5, second + 0.5]],
    ]
    assert given["text_embeds"][1, 1, 0] == 2 * mark("1 " * 75, "text_encoder_2")
    rows = [len(engine.calls[0]["input_ids"]) for engine in engines.values()]
    assert rows == [5, 5], "four texts, one of two chunks, one empty chunk that three share"


def test_many_texts_are_encoded_in_parts():
    ours, engines = encoder(UNetConfig.from_dict(published.UNET_SD15), {"text_encoder": CLIP_L})
    words = [f"{a} {b}" for a in "abcdefghijklmnopq" for b in "abcdefghijklmnopq"]
    (told,) = condition(ours, words)
    assert told["context"][0, :, 0, 0].tolist() == [mark(text) for text in words]
    rows = [len(call["input_ids"]) for call in engines["text_encoder"].calls]
    assert rows == [256, 33]


def test_the_pooled_text_has_no_weights():
    ours, _ = xl()
    plain, weighted = (condition(ours, [text])[0] for text in ("cat", "(cat:2)"))
    np.testing.assert_array_equal(plain["text_embeds"], weighted["text_embeds"])
    assert not np.array_equal(plain["context"], weighted["context"])


def test_prompts_that_change():
    ours, engines = xl()
    groups = ["", "[no:yes:5]"], ["[cat:dog:0.3]", "a [b|c]"]
    given, seen = condition(ours, *groups, steps=10), []
    assert len({id(now["context"]) for now in given}) == 6, "what is the same is the same array"
    for now in given:
        marks = now["text_embeds"][..., 0] / 2
        np.testing.assert_array_equal(now["context"][..., 0, 768], 2 * marks + 0.5 * (marks > 0))
        seen.append(marks.tolist())
    told = {text: float(mark(text, "text_encoder_2")) for text in ("no", "yes", "cat", "dog")}
    either = [float(mark(text, "text_encoder_2")) for text in ("a b", "a c")]
    assert seen == [
        [
            [0.0, told["no" if step < 5 else "yes"]],
            [told["cat" if step < 3 else "dog"], either[step % 2]],
        ]
        for step in range(10)
    ]
    assert [len(e.calls[0]["input_ids"]) for e in engines.values()] == [7, 7], "each text once"
    assert [len(e.calls) for e in engines.values()] == [1, 1]


def test_calls_that_are_not_guided_see_the_prompts_alone():
    ours, _ = xl()
    given = ours.condition(
        Texts(negatives=[["no"]], prompts=[["cat"]]),
        Guidance.over((5.0, 3.0), 5, (0.2, 0.8)),
        HEIGHT,
        WIDTH,
    )
    assert [now["guidance"][:, 0, 0, 0, 0].tolist() for now in given] == [
        [1],
        [-3.5, 4.5],
        [-3, 4],
        [-2.5, 3.5],
        [1],
    ]
    for now in given:
        assert {len(now[name]) for name in ("context", "text_embeds", "time_ids")} == {
            len(now["guidance"])
        }
    assert given[0]["context"] is given[4]["context"]
    np.testing.assert_array_equal(given[0]["context"], given[1]["context"][1:])


def test_negatives_that_no_call_sees_are_not_encoded():
    ours, engines = xl()
    condition(ours, ["no"], ["cat"], scale=1.0)
    assert [len(engine.calls[0]["input_ids"]) for engine in engines.values()] == [1, 1]


def test_composed_prompts_and_two_sided_guidance():
    ours, _ = encoder(REFINER, {"text_encoder_2": CLIP_G})
    parts = np.array([[1.0, 1.0], [0.5, 0.0]])
    texts = Texts(
        negatives=[["", ""], ["no", "no"]],
        prompts=[["cat", "a"], ["dog", "a"]],
        parts=parts,
        repeats=2,
    )
    (given,) = ours.condition(texts, Guidance.over(4.0, 1, negative_scale=2.0), HEIGHT, WIDTH)
    uncond = [1 - 4 * 1.5 + 2] * 2 + [1 - 4 + 2] * 2
    assert given["guidance"][..., 0, 0, 0].tolist() == [uncond, [-2] * 4, [4] * 4, [2, 2, 0, 0]]
    assert given["context"].shape[:2] == (4, 4)
    assert given["time_ids"][:, 0, -1].tolist() == [2.5, 2.5, 6.0, 6.0]
    assert np.allclose(given["guidance"].sum(0), 1)


def test_the_same_texts_are_not_encoded_again():
    ours, engines = xl()
    told = [condition(ours, ["no"], ["cat"])[0] for _ in range(2)]
    calls = [len(engine.calls) for engine in engines.values()]
    assert calls == [1, 1]
    np.testing.assert_array_equal(told[0]["context"], told[1]["context"])
    told[0]["context"][:] = 0
    (again,) = condition(ours, ["no"], ["cat"], repeats=2, scale=3.0, size=(512, 512))
    np.testing.assert_array_equal(again["context"][:, :1], told[1]["context"])
    condition(ours, ["no"], ["dog"])
    condition(ours.without_cache(), ["no"], ["cat"])
    assert [len(engine.calls) for engine in engines.values()] == [3, 3]


def test_what_is_kept_is_bounded():
    arrays = {key: (np.zeros(5, "f"), np.zeros(5, "f")) for key in "abc"}
    kept = EmbeddingCache(limit=100)
    kept.put("a", arrays["a"])
    kept.put("a", arrays["a"])
    kept.put("b", arrays["b"])
    assert kept.get("a") is arrays["a"]
    kept.put("c", arrays["c"])
    assert [kept.get(key) is not None for key in "abc"] == [True, False, True]
    kept.put("d", (np.zeros(50, "f"),))
    assert [kept.get(key) for key in "acd"] == [None] * 3, "it is too large for all"
    kept.put("a", arrays["a"])
    assert kept.get("a") is arrays["a"]


def embedding(name, count, tmp_path, **widths):
    vectors = {part: np.full((count, width), count, np.float32) for part, width in widths.items()}
    return Embedding(path=tmp_path / f"{name}.pt", name=name, vectors=vectors)


@pytest.fixture
def teachable(monkeypatch):
    monkeypatch.setattr(
        "runtime.conditioning.encoder.load_tokenizers", lambda model: dict(TOKENIZERS)
    )
    return xl()


def test_taught_words_are_rows_after_the_vocabulary(teachable, tmp_path):
    ours, engines = teachable
    widths = {"text_encoder": 768, "text_encoder_2": 1280}
    taught = ours.with_embeddings(
        [embedding("<one>", 1, tmp_path, **widths), embedding("<two>", 2, tmp_path, **widths)]
    )
    condition(taught, ["<two> <one>"])
    for name, width in widths.items():
        call = engines[name].calls[-1]
        assert call["input_ids"][0, 1:5].tolist() == [49409, 49410, 49408, 49407]
        np.testing.assert_array_equal(call["extra_embeddings"][:, 0], [1, 2, 2])
        assert call["extra_embeddings"].shape == (3, width)
    again = taught.with_embeddings([])
    condition(again, ["<two> <one>"])
    assert engines["text_encoder"].calls[-1]["input_ids"].max() == 49407
    assert engines["text_encoder"].calls[-1]["extra_embeddings"].shape == (1, 768)


def test_what_an_embedding_holds_beside_its_vectors_is_noted(teachable, tmp_path):
    ours, _ = teachable
    word = embedding("<one>", 1, tmp_path, text_encoder=768, text_encoder_2=1280)
    taught = ours.with_embeddings([replace(word, unused=("clip_l_out", "t5"))])
    said = f"{word.path} also holds 'clip_l_out', 't5', which is not used"
    assert taught.notes == [said, f"{word.path} is meant by '<one>'"]


def test_words_that_cannot_be_taught(teachable, tmp_path):
    ours, _ = teachable
    with pytest.raises(ModelError, match="1 numbers for the text_encoder"):
        ours.with_embeddings([embedding("<one>", 1, tmp_path, text_encoder=1)])
    widths = {"text_encoder": 768, "text_encoder_2": 1280}
    same = [embedding("<one>", 1, tmp_path, **widths)] * 2
    with pytest.raises(RequestError, match="'<one>'"):
        ours.with_embeddings(same)


def test_a_file_gets_the_tokenizers_of_its_encoders(tmp_path):
    both = {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G}
    configs = MappingProxyType({"unet": XL, **both})
    model = replace(PICTOGRAM, path=tmp_path / "model.safetensors", configs=configs)
    tokenizers = load_tokenizers(model)
    assert {name: t.pad_token_id for name, t in tokenizers.items()} == {
        "text_encoder": 49407,
        "text_encoder_2": 0,
    }
    only = replace(model, configs=MappingProxyType({"unet": XL, "text_encoder": CLIP_H}))
    assert load_tokenizers(only)["text_encoder"].pad_token_id == 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"vocab_size": 1000}, "knows 49408 tokens and its text_encoder 1000"),
        ({"max_position_embeddings": 32}, "rows of 77 tokens and its text_encoder takes 32"),
    ],
)
def test_a_tokenizer_of_another_encoder(fields, said):
    configs = MappingProxyType({"unet": XL, "text_encoder": replace(CLIP_L, **fields)})
    model = replace(PICTOGRAM, configs=configs)
    with pytest.raises(ModelError, match=said):
        check_tokenizers(model, {"text_encoder": TOKENIZERS["text_encoder"]})
