"""Alternatives and wildcards: what is chosen, how often, and that a seed chooses the same."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import RequestError
from runtime import Request
from runtime.conditioning.alternatives import expand
from runtime.conditioning.syntax import escape, parse
from runtime.conditioning.wildcards import Wildcards
from runtime.templates import expand_request


@pytest.fixture
def wildcards(tmp_path):
    (tmp_path / "animals").mkdir()
    (tmp_path / "void").mkdir()
    files = {
        "colour.txt": "\ufeffred\n# a note\n\n  green  \n",
        "animals/cat.txt": "tabby\n",
        "animals/dog.txt": "poodle\n",
        "nested.txt": "a __colour__ {big|small} thing\n",
        "loop.txt": "__loop__\n",
        "wide.txt": "__wide__ __wide__\n",
        "empty.txt": "# nothing\n",
        "blank.txt": "",
        "void/a.txt": "\n \n",
        "void/b.txt": "#\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return Wildcards(tmp_path)


def texts_of(template, wildcards=None, count=400):
    return Counter(expand(template, Random(seed), wildcards)[0] for seed in range(count))


@pytest.mark.parametrize(
    ("template", "texts"),
    [
        ("a {red|green} hat", {"a red hat", "a green hat"}),
        ("{a|}", {"a", ""}),
        ("{a|{b|c}}", {"a", "b", "c"}),
        ("{a} {b", {"{a} {b"}),
        ("a} | b", {"a} | b"}),
        (r"\{a\|b\} {x\|y|z}", {r"\{a\|b\} x\|y", r"\{a\|b\} z"}),
        ("{[a|b]|c}", {"[a|b]", "c"}),
        ("{(a:1.2)|<lora:x:1>}", {"(a:1.2)", "<lora:x:1>"}),
        ("{2$$a|b}", {"a, b", "b, a"}),
        ("{2$$ and $$a|b|c}", {f"{x} and {y}" for x in "abc" for y in "abc" if x != y}),
        ("{0-1$$a|b}", {"", "a", "b"}),
        ("{1-9$$a|b}", {"a", "b", "a, b", "b, a"}),
        ("{0::a|b}", {"b"}),
        ("{$$a}", {"{$$a}"}),
        ("__init__ {a|b}", {" a", " b"}),
    ],
)
def test_every_text_is_chosen(template, texts):
    assert set(texts_of(template)) == texts


def test_weights_say_how_often():
    counts = texts_of("{3::a|b}", count=4000)
    assert counts["a"] / 4000 == pytest.approx(0.75, abs=0.03)
    counts = texts_of("{a|b|c}", count=4000)
    assert min(counts.values()) / 4000 == pytest.approx(1 / 3, abs=0.03)


def test_wildcards_are_lines_of_files(wildcards):
    assert set(texts_of("__colour__", wildcards)) == {"red", "green"}
    assert set(texts_of("__COLOUR__!", wildcards)) == {"red!", "green!"}
    assert set(texts_of("__animals/*__", wildcards)) == {"tabby", "poodle"}
    nested = {f"a {c} {s} thing" for c in ("red", "green") for s in ("big", "small")}
    assert set(texts_of("__nested__", wildcards)) == nested


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none", "there is no none.txt in the folder {folder}, which --wildcard-dir names"),
        ("colours", "there is no colours.txt in the folder {folder}; did you mean __colour__?"),
        ("../secret", "there is no ../secret.txt in the folder {folder}, which"),
        ("/etc/passwd", "there is no /etc/passwd.txt in the folder"),
        ("animals", "there is no animals.txt in the folder"),
        ("x*", "there is no x*.txt in the folder"),
        ("empty", "there is no line to choose in empty.txt; write one choice a line, without #"),
        ("Blank", "there is no line to choose in blank.txt;"),
        ("void/*", "there is no line to choose in void/a.txt, void/b.txt;"),
    ],
)
def test_a_wildcard_without_lines_is_left_out_and_the_note_says_why(wildcards, name, said):
    text, (note,) = expand(f"a __{name}__ b __{name}__", Random(1), wildcards)
    assert text == "a  b "
    folder = wildcards._folder.name
    assert note.startswith(f"__{name}__ is left out of the text: {said.format(folder=folder)}")


@pytest.mark.parametrize("coding", ["utf-16", "utf-8-sig", "cp1252"])
def test_files_of_windows_editors_are_read(tmp_path, coding):
    (tmp_path / "farbe.txt").write_bytes("grün\r\nweiß\r\n".encode(coding))
    assert set(texts_of("__farbe__", Wildcards(tmp_path))) == {"grün", "weiß"}


@pytest.mark.parametrize("name", ["loop", "wide"])
def test_lines_that_name_each_other_end(wildcards, name):
    with pytest.raises(RequestError, match="without end"):
        expand(f"__{name}__", Random(1), wildcards)


def test_a_text_that_grows_is_refused():
    with pytest.raises(RequestError, match="100000 characters"):
        expand("{a|b}" + "x" * 100_000, Random(1))


@given(st.text(alphabet="{}|[]_\\$:a1 ", max_size=60), st.integers(0, 2**64 - 1))
def test_any_text_is_a_template(text, seed):
    expanded, _ = expand(text, Random(seed))
    assert expanded == expand(text, Random(seed))[0]
    plain = escape(text)
    assert expand(plain, Random(seed)) == (plain, [])
    assert "".join(piece.text for stretch in parse(plain) for piece in stretch) == text


def test_deep_braces_are_read():
    with pytest.raises(RequestError, match="without end"):
        expand("{1$$" * 5000 + "b" + "}" * 5000, Random(3))
    assert expand("{" * 5000, Random(1))[0] == "{" * 5000


def test_every_picture_has_its_own(wildcards):
    request = Request(
        prompt=["a {red|green|blue} hat", "b"],
        negative_prompt="__colour__",
        num_images_per_prompt=8,
        seed=5,
    )
    expanded, notes = expand_request(request, wildcards)
    assert notes == []
    assert expanded.seeds == request.seeds
    assert len(set(expanded.prompts[:8])) == 3
    assert set(expanded.prompts[8:]) == {"b"}
    assert set(expanded.negative_prompts) == {"red", "green"}
    alone, _ = expand_request(Request(prompt=request.prompts[0], seed=7), wildcards)
    assert alone.prompts == expanded.prompts[2:3], "by its seed, whatever is drawn beside it"
    _, notes = expand_request(Request(prompt="__none__", seed=5), None)
    assert notes == [
        "__none__ is left out of the text: no folder of wildcards is given; --wildcard-dir names "
        "the one that holds their files"
    ]
