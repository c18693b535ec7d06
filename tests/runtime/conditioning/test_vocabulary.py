"""Tokenizer folders that are incomplete, damaged or odd."""

import contextlib
import json
import random
import re

import pytest
from transformers import CLIPTokenizer

from engine.errors import ModelError
from runtime.conditioning.tokenizer import Tokenizer
from training.vocabulary import cut_vocabulary, write_tokenizer

MERGES = [("h", "o"), ("ho", "r"), ("hor", "s"), ("hors", "e</w>")]
CONFIG, VOCAB, OLDER = "tokenizer_config.json", "vocab.json", "special_tokens_map.json"


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path, *cut_vocabulary(["a horse"], 518, MERGES), 77)
    return tmp_path


def change(path, fields):
    """Set fields of a JSON file; a value of None removes the field."""
    content = json.loads(path.read_text("utf-8")) | fields
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), "utf-8")


def test_the_folder_is_good_before_it_is_damaged(folder):
    assert Tokenizer.load(folder)(["a horse"]).input_ids[0, :4].tolist() == [516, 320, 515, 517]


@pytest.mark.parametrize("name", [CONFIG, VOCAB, "merges.txt"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelError, match=f"{re.escape(str(folder))} has no {name}"):
        Tokenizer.load(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ModelError, match=f"nowhere has no {CONFIG}"):
        Tokenizer.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [CONFIG, VOCAB, OLDER, "tokenizer.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "list", "binary", "nested", "folder"])
def test_a_broken_file_is_named(folder, name, damage):
    path = folder / name
    if name == "tokenizer.json":
        CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        broken = {"truncated": content[:-9], "list": b"[]", "binary": b"\xff{}", "empty": b""}
        path.write_bytes(broken.get(damage, b"[" * 100_000))
    with pytest.raises(ModelError, match=re.escape(str(path))):
        Tokenizer.load(folder)


@pytest.mark.parametrize("line", ["photograph", "a b c", "a  b", " a b"])
def test_a_line_that_is_no_merge_is_named(folder, line):
    path = folder / "merges.txt"
    path.write_text(f"#version: 0.2\nh o\n{line}\n")
    with pytest.raises(ModelError, match=f"Line 3 of {re.escape(str(path))} is '{line}'"):
        Tokenizer.load(folder)


def test_merges_may_end_lines_as_on_windows(folder):
    path = folder / "merges.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert Tokenizer.load(folder)(["horse"]).input_ids[0, 1] == 515


BAD_FIELDS = [
    (VOCAB, {"horse</w>": None}, r"do not fit together .*horse</w>"),
    (VOCAB, {"horse</w>": "515"}, "do not fit together"),
    (VOCAB, {"horse</w>": -1}, "do not fit together"),
    (VOCAB, {"horse</w>": 2**40}, "do not fit together"),
    (VOCAB, {"horse</w>": 1.5}, "do not fit together"),
    (VOCAB, {"\ud800": 518}, "do not fit together"),
    (VOCAB, {"<|endoftext|>": None}, r"eos_token '<\|endoftext\|>' is not among its 517 tokens"),
    (OLDER, {"pad_token": "<pad>"}, "pad_token '<pad>' is not among its 518 tokens"),
    (OLDER, {"pad_token": 3}, "3 is not a token"),
    (OLDER, {"pad_token": ["!"]}, "is not a token"),
    (OLDER, {"pad_token": {"lstrip": True}}, "is not a token"),
    (OLDER, {"pad_token": {"content": "!", "lstrip": "yes"}}, "do not fit together"),
    (CONFIG, {"added_tokens_decoder": []}, r"special tokens in .* cannot be read"),
    (CONFIG, {"added_tokens_decoder": {"0": 3}}, r"special tokens in .* cannot be read"),
    (CONFIG, {"added_tokens_decoder": {"x": "!"}}, r"special tokens in .* cannot be read"),
    (CONFIG, {"added_tokens_decoder": {"5": "!"}}, "'!' cannot have the id 5"),
    (CONFIG, {"added_tokens_decoder": {"999": "<new>"}}, "'<new>' cannot have the id 999"),
    (CONFIG, {"added_tokens_decoder": {"518": ""}}, "'' cannot have the id 518"),
    *[
        (CONFIG, {"model_max_length": length}, "must be an integer of 3 or more")
        for length in (2, 0, -1, "77", 7.5, float("nan"), True, [77])
    ],
]


@pytest.mark.parametrize(("name", "fields", "message"), BAD_FIELDS)
def test_fields_that_do_not_fit_are_refused(folder, name, fields, message):
    change(folder / name, fields)
    with pytest.raises(ModelError, match=message):
        Tokenizer.load(folder)


@pytest.mark.parametrize("model", [None, [], {}, {"vocab": {}, "merges": ["a"]}, {"merges": [3]}])
def test_a_tokenizer_json_of_another_kind_is_refused(folder, model):
    (folder / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(ModelError, match=r"tokenizer\.json holds no byte-pair vocabulary"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("length", [None, 10**30, 1e30])
def test_an_unstated_length_is_clips(folder, length):
    change(folder / CONFIG, {"model_max_length": length})
    assert Tokenizer.load(folder).max_length == 77


def test_random_damage_gives_a_model_error_or_loads(folder):
    generator = random.Random(0)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for _ in range(80):
            damaged = bytearray(whole)
            for _ in range(generator.choice([1, 3])):
                damaged[generator.randrange(len(whole))] = generator.choice(b'\0 "{}[],:9a\n\xff')
            path.write_bytes(damaged)
            with contextlib.suppress(ModelError):
                Tokenizer.load(folder)(["a horse \0 日本"])
        path.write_bytes(whole)
