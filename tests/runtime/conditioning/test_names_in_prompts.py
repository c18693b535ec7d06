"""Names in prompts: what Automatic1111's parser of extra networks reads, and what loads nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ModelError, RequestError
from runtime import Pipeline, Request
from runtime.conditioning.names import named_adapters, take_names
from runtime.conditioning.syntax import escape, parse

WORDS = {"easynegative": "EasyNegative", "<cat-toy>": "<cat-toy>"}


# By `ExtraNetworkLora.activate`: the first weight is the text encoder's, the second the UNet's.
@pytest.mark.parametrize(
    ("text", "left", "adapters"),
    [
        ("a cat <lora:foo:0.8>", "a cat ", [("foo", 0.8, 0.8)]),
        ("<lora:foo>, cat", ", cat", [("foo", 1.0, 1.0)]),
        ("<lora:foo:0.5:0.9>", "", [("foo", 0.9, 0.5)]),
        ("<lora:foo:te=0.5:unet=.9>", "", [("foo", 0.9, 0.5)]),
        ("<lora:foo:0.5:unet=0.9>", "", [("foo", 0.9, 0.5)]),
        ("<lora:foo:unet=0.9>", "", [("foo", 0.9, 1.0)]),
        ("<lyco:foo:-1>", "", [("foo", -1.0, -1.0)]),
        ("<LoRA: my style v1.2 :1e-1>", "", [("my style v1.2", 0.1, 0.1)]),
        ("(a<lora:x:1>:1.2) AND [b<lora:y:1>|c]", "(a:1.2) AND [b|c]", [("x", 1, 1), ("y", 1, 1)]),
        ("<lora:x:1><lora:x:1>", "", [("x", 1, 1), ("x", 1, 1)]),
        (r"\<lora:x:1>", r"\<lora:x:1>", []),
        ("a < b > c <3 <- <1>", "a < b > c <3 <- <1>", []),
        ("<lora:x:1", "<lora:x:1", []),
    ],
)
def test_adapters(text, left, adapters):
    named = take_names(text, {})
    assert named.text == left
    assert [(tag.name, tag.unet, tag.text_encoder) for tag in named.adapters] == adapters
    assert named.notes == ()


@pytest.mark.parametrize(
    ("text", "left", "said"),
    [
        ("a <lora:foo:strong>", "a ", "'strong' is no weight"),
        ("a <lora:foo:1e9>", "a ", "'1e9' is no weight"),
        ("a <lora:foo:nan>", "a ", "'nan' is no weight"),
        ("a <lora::1>", "a ", "names no adapter"),
        ("a <lora:foo:1:lbw=MIDD>", "a ", "'lbw' cannot be set"),
        ("a <hypernet:foo:1>", "a ", "hypernetworks are not supported"),
        ("a embedding:bad, b", "a , b", "embedding:bad is left out"),
        ("(embedding:bad:1.2) b", "(:1.2) b", "embedding:bad is left out"),
        ("a <other-toy> b", "a  b", "<other-toy> is left out"),
    ],
)
def test_what_loads_nothing_is_left_out_and_named(text, left, said):
    named = take_names(text, WORDS)
    assert (named.text, named.adapters) == (left, ())
    (note,) = named.notes
    assert said in note


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("embedding:EasyNegative", "EasyNegative"),
        ("(embedding:easynegative.pt:1.2), x", "(EasyNegative:1.2), x"),
        ("by embedding:easynegative.", "by EasyNegative."),
        ("a <cat-toy> <CAT-TOY>", "a <cat-toy> <cat-toy>"),
        ("reembedding:easynegative", "reembedding:easynegative"),
    ],
)
def test_words_that_the_model_was_taught(text, left):
    assert take_names(text, WORDS) == (left, (), ())


@given(st.text(alphabet="<>:\\lora embding.1-", max_size=60))
def test_plain_text_names_nothing(text):
    plain = escape(text)
    assert take_names(plain, {}) == (plain, (), ())
    assert "".join(piece.text for stretch in parse(plain) for piece in stretch) == text


def test_prompts_that_share_a_call_share_their_adapters():
    with pytest.raises(RequestError, match="different adapters"):
        named_adapters(["<lora:a:1>", "<lora:b:1>"], [""], words={}, folder=None)


def test_a_negative_prompt_loads_nothing():
    adapters, notes = named_adapters(["a"], ["<lora:a:1>"], words={}, folder=None)
    assert adapters == []
    assert "in a negative prompt" in notes[0]


def test_without_syntax_a_tag_is_text():
    request = Request(prompt="<lora:a:1>", prompt_syntax=False)
    assert request.adapters == ()
    (pieces,) = parse(request.written(request.prompts)[0])
    assert [piece.text for piece in pieces] == ["<lora:a:1>"]


def test_names_find_files(tmp_path):
    (tmp_path / "Styles").mkdir()
    for name in ("ink.safetensors", "Styles/ink.pt", "Styles/Oil v2.safetensors", "notes.txt"):
        (tmp_path / name).touch()
    for name, path in {
        "INK": "ink.safetensors",
        "ink.safetensors": "ink.safetensors",
        "styles/ink": "Styles/ink.pt",
        "oil v2": "Styles/Oil v2.safetensors",
    }.items():
        (choice,), notes = named_adapters([f"<lora:{name}:1>"], [], words={}, folder=tmp_path)
        assert (choice.path, notes) == (tmp_path / path, [])
    for name in ("notes", "../ink", "/etc/passwd", "oil v3", "x" * 5000):
        adapters, (note,) = named_adapters([f"<lora:{name}:1>"], [], words={}, folder=tmp_path)
        assert adapters == []
        assert "there is no adapter" in note
        assert ("did you mean 'Oil v2'" in note) == (name == "oil v3")


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ModelError, match="is no folder"):
        Pipeline.load("pictogram", lora_dir=str(tmp_path / "none"))
