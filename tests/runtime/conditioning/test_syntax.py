"""The syntax of prompts, against what Automatic1111 documents, and on any text at all."""

import sys
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.conditioning.syntax import MAX_WEIGHT, escape, parse, schedule

# Published with Automatic1111's web UI: what its parser of weights says of these texts.
WEIGHTS = [
    ("normal text", [("normal text", 1.0)]),
    ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
    ("(unbalanced", [("unbalanced", 1.1)]),
    (r"\(literal\]", [("(literal]", 1.0)]),
    ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    (
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
        [
            ("a ", 1.0),
            ("house", 1.573),
            (" ", 1.1),
            ("on", 1.0),
            (" a ", 1.1),
            ("hill", 0.55),
            (", sun, ", 1.1),
            ("sky", 1.4641),
            (".", 1.1),
        ],
    ),
    # By its rules: each bracket multiplies all that it holds, and only what closes is taken away.
    ("[word]", [("word", 1 / 1.1)]),
    ("((word))", [("word", 1.21)]),
    ("([word])", [("word", 1.0)]),
    ("(a [b) c]", [("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1)]),
    ("(word: 1.3 )", [("word", 1.3)]),
    ("(word:.5)", [("word", 0.5)]),
    ("(word:-1)", [("word", -1.0)]),
    ("(word:+2.)", [("word", 2.0)]),
    ("(word:1.2.3)", [("word:1.2.3", 1.1)]),  # no number: the web UI stops with an error
    ("(a:b:1.2)", [("a:b", 1.2)]),
    ("[word:1.3)", [("word:1.3)", 1 / 1.1)]),  # a number belongs to round brackets
    ("a) b]", [("a) b]", 1.0)]),
    (r"\\ \a " + "\\", [(r"\ a ", 1.0)]),
    ("(", []),
    ("", []),
    ("smile :) :( x", [("smile :) :", 1.0), (" x", 1.1)]),
]

# Published with it too: what its parser of schedules says, for 10 steps.
SCHEDULES = [
    ("test", [(10, "test")]),
    ("a [b:3]", [(3, "a "), (10, "a b")]),
    ("a [b: 3]", [(3, "a "), (10, "a b")]),
    ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
    ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
    ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
    ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
    ("a [unbalanced", [(10, "a [unbalanced")]),
    ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
    ("a [{b|d{:.5] c", [(5, "a  c"), (10, "a {b|d{ c")]),
    ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
    ("[a|(b:1.1)]", [(i, "(b:1.1)" if i % 2 == 0 else "a") for i in range(1, 11)]),
    ("[fe|]male", [(i, "male" if i % 2 == 0 else "female") for i in range(1, 11)]),
    (
        "[fe|||]male",
        [(1, "female"), (4, "male"), (5, "female"), (8, "male"), (9, "female"), (10, "male")],
    ),
    # By its rules: a point makes a part of the steps, and the first text is for the steps up to it.
    ("[a:b:0.4]", [(4, "a"), (10, "b")]),
    ("[a:0.4]", [(4, ""), (10, "a")]),
    ("[a::0.4]", [(4, "a"), (10, "")]),
    ("[:a:0.4]", [(4, ""), (10, "a")]),
    ("[a:b:1]", [(1, "a"), (10, "b")]),
    ("[a:b:1.0]", [(10, "a")]),
    ("[a:b:10]", [(10, "a")]),
    ("[a:b:1e9]", [(10, "a")]),
    ("[a:b:1e999]", [(10, "a")]),
    ("[a:b:0]", [(10, "b")]),
    ("[a:b:-3]", [(10, "b")]),
    ("[a|b:c|d:5]", [(5, "a|b"), (10, "c|d")]),
    ("[a:b:c:3]", [(10, "[a:b:c:3]")]),  # three texts are none of its forms
    ("[a:x|b]", [(10, "[a:x|b]")]),
    ("[a ) b:3]", [(10, "[a ) b:3]")]),  # not balanced
    ("[a:(3)]", [(10, "[a:(3)]")]),
    (r"\[a:b:3\]", [(10, r"\[a:b:3\]")]),
    (r"[a\:x:b:3]", [(3, r"a\:x"), (10, "b")]),
    ("[a] [b:c:2]", [(2, "[a] b"), (10, "[a] c")]),
]


@pytest.mark.parametrize(("text", "expected"), WEIGHTS)
def test_weights(text, expected):
    (pieces,) = parse(text)
    assert [piece.text for piece in pieces] == [words for words, _ in expected]
    assert [piece.weight for piece in pieces] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize(
    ("text", "stretches"),
    [
        ("a BREAK b", [["a"], ["b"]]),
        ("a\nBREAK\nb BREAKFAST", [["a"], ["b BREAKFAST"]]),
        ("BREAK", [[], []]),
        ("a BREAK BREAK b", [["a"], [], ["b"]]),
        ("(a BREAK b) c", [["a"], ["b", " c"]]),
        ("aBREAK break", [["aBREAK break"]]),
        # a blank that parts words from a bracket of the same weight stays
        (
            "(masterpiece:1.0) girl, smiling BREAK forest",
            [["masterpiece girl, smiling"], ["forest"]],
        ),
        ("x BREAK cat (dog:1)", [["x"], ["cat dog"]]),
        ("(dog:1) cat BREAK x", [["dog cat"], ["x"]]),
        ("x BREAK red (dog:1.0) house", [["x"], ["red dog house"]]),
        ("x BREAK cat [(dog:1.1)]", [["x"], ["cat dog"]]),
        ("a (b:1.0) c BREAK d", [["a b c"], ["d"]]),
        ("a \n BREAK\t BREAK  b (c:1)", [["a"], [], ["b c"]]),
        (r"a \( BREAK \) b", [["a ("], [") b"]]),
    ],
)
def test_break(text, stretches):
    assert [[piece.text for piece in stretch] for stretch in parse(text)] == stretches


def test_a_break_in_brackets_leaves_the_weight():
    assert parse("(a BREAK b:2)") == [[("a", 2.0)], [("b", 2.0)]]


@pytest.mark.parametrize(("text", "expected"), SCHEDULES)
def test_schedules(text, expected):
    assert schedule(text, 10) == expected


def test_the_published_example_of_a_schedule():
    text = (
        "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75]"
        "[ in foreground::0.6][ in background:0.25] [shoddy:masterful:0.5]"
    )
    start, oak = "fantasy landscape with a", "and an oak"
    assert schedule(text, 100) == [
        (25, f"{start} mountain {oak} in foreground shoddy"),
        (50, f"{start} lake {oak} in foreground in background shoddy"),
        (60, f"{start} lake {oak} in foreground in background masterful"),
        (75, f"{start} lake {oak} in background masterful"),
        (100, f"{start} lake and a christmas tree in background masterful"),
    ]


SYNTAX = st.text(alphabet="()[]:|\\., \nab01.5e-+", max_size=60)
PLAIN = st.text(st.characters(exclude_characters="()[]\\", exclude_categories=["Cs"]), min_size=1)
TEXTS = st.one_of(SYNTAX, st.text(), st.lists(st.sampled_from(["BREAK", " ", "(", "a:1.2)", "["])))


@settings(max_examples=500, deadline=None)
@given(TEXTS, st.integers(1, 30))
def test_any_text_is_a_prompt(text, steps):
    text = "".join(text)
    texts = schedule(text, steps)
    ends = [end for end, _ in texts]
    assert ends == sorted(set(ends))
    assert ends[-1] == steps
    assert ends[0] >= 1
    assert all(one != other for (_, one), (_, other) in pairwise(texts))
    for _, shown in [*texts, (0, text)]:
        for stretch in parse(shown):
            assert all(piece.text for piece in stretch)
            assert all(abs(piece.weight) <= MAX_WEIGHT for piece in stretch)


@settings(deadline=None)
@given(PLAIN)
def test_text_without_syntax_stays_as_it_is(text):
    text = text.replace("BREAK", "")
    assert schedule(text, 5) == [(5, text)]
    assert parse(text) == ([[(text, 1.0)]] if text else [[]])


@settings(deadline=None)
@given(st.one_of(SYNTAX, TEXTS.map("".join)).filter(bool))
def test_what_is_escaped_is_text(text):
    escaped = escape(text)
    assert schedule(escaped, 5) == [(5, escaped)]
    assert parse(escaped) == [[(text, 1.0)]]


@settings(deadline=None)
@given(st.recursive(st.sampled_from("abc"), lambda inner: st.tuples(inner, inner), max_leaves=9))
def test_nested_weights_multiply(tree):
    def write(node):
        return node if isinstance(node, str) else f"({write(node[0])}:2)({write(node[1])}:3)"

    def weigh(node, weight):
        if isinstance(node, str):
            return [(node, weight)]
        return weigh(node[0], 2 * weight) + weigh(node[1], 3 * weight)

    given_pairs = [(c, piece.weight) for piece in parse(write(tree))[0] for c in piece.text]
    assert given_pairs == [(c, min(weight, MAX_WEIGHT)) for c, weight in weigh(tree, 1.0)]


@pytest.mark.parametrize(
    "part", ["(", "[", ")", "]", "\\", ":", "|", " ", "1", "[a:", "[|", "(a:1", "[a|b]", " BREAK "]
)
@pytest.mark.parametrize("end", ["", ":0.5]", ")", "]"])
def test_hostile_texts_take_linear_time(part, end):
    text = part * (10_000 // len(part)) + end
    start = time.process_time()
    assert schedule(text, 2)[-1][0] == 2
    parse(text)
    assert time.process_time() - start < 1


def test_brackets_nest_deeper_than_calls():
    depth = 5 * sys.getrecursionlimit()
    assert schedule("[" * depth + "a" + ":0.5]" * depth, 2) == [(1, ""), (2, "a")]
    assert schedule("[" * depth + "a" + "]" * depth, 2)[0][0] == 2
    assert parse("(" * depth + "a" + ")" * depth) == [[("a", MAX_WEIGHT)]]
    assert parse("(a:" + "9" * 400 + ")") == [[("a", MAX_WEIGHT)]]
