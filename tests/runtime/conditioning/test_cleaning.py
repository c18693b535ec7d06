"""Entities and quotes, against the library that CLIP's original tokenizer cleans with."""

import html
from dataclasses import replace

import ftfy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.backends.settings import BackendSettings
from runtime import Pipeline, Request
from runtime.conditioning.cleaning import clean_text
from runtime.conditioning.tokenizer import Tokenizer

TEXTS = [
    "a cat &amp; a dog",
    "&amp;amp; &amp;amp;amp;",
    "&lt;b&gt; &quot;x&quot;",
    "&#8220;quoted&#x201d; &ldquo;too&rdquo;",
    "\u201cdouble\u201d and \u2018single\u2019, it\u2019s",
    "5 &lt; 6 &eacute; &#x1F34E;",
    "&nosuch; &; & &#;",
    "a < b &amp; c",
    "&amp;ldquo; < \u201cx\u201d",
]


def basic_clean(text):
    """Clean as CLIP's simple_tokenizer.py does."""
    return html.unescape(html.unescape(ftfy.fix_text(text)))


@pytest.mark.parametrize("text", TEXTS)
def test_it_is_clips_cleaning(text):
    assert clean_text(text) == basic_clean(text)


@given(st.text(alphabet="&;#ampltquodr038x2c \u201c\u2019", max_size=40))
def test_any_text(text):
    assert clean_text(text) == basic_clean(text)


def test_the_option_reaches_the_tokens():
    plain = Tokenizer.clip("<|endoftext|>")
    cleaning = replace(plain, cleans=True)
    for text, cleaned in (("a &amp; b", "a & b"), ("\u201ca\u201d", '"a"')):
        assert cleaning.words_of(text) == plain.words_of(cleaned)
        assert plain.words_of(text) != plain.words_of(cleaned)


def test_a_request_asks_for_it():
    pipeline = Pipeline.load("pictogram", settings=BackendSettings(backend="cpu", threads=1))

    def context(prompt, **fields):
        request = Request(prompt=prompt, num_inference_steps=1, seed=1, **fields)
        return pipeline.plan(request).conditioning[0]["context"].tobytes()

    cleaned = context("a (&amp;:1.2) b", clean_prompt=True)
    assert cleaned == context("a (&:1.2) b")
    assert cleaned != context("a (&amp;:1.2) b")
