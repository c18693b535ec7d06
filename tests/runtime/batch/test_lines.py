"""Files of requests: what is read of each format, and which lines are bad and why."""

import json
import sys

import pytest

from engine.errors import BackendError, RequestError
from runtime.batch.lines import MAX_BYTES, read_lines


def read(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(line.number, line.error or line.fields) for line in read_lines(path)]


def test_json_lines_are_objects_and_texts(tmp_path):
    content = '\ufeff{"prompt": "a", "seed": 7}\r\n\n "b\u2028c" \n{"hires": {"scale": 2}}'
    assert read(tmp_path / "a.jsonl", content) == [
        (1, {"prompt": "a", "seed": 7}),
        (3, {"prompt": "b\u2028c"}),
        (4, {"hires": {"scale": 2}}),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "it is no JSON"),
        (b"{'prompt': 'a'}", "it is no JSON"),
        (b"7", "neither an object nor a text"),
        (b'["a"]', "neither an object nor a text"),
        (b"null", "neither an object nor a text"),
        (b"[" * 100_000, "it is no JSON"),
        (b'{"seed": ' + b"9" * 10_000 + b"}", "it is no JSON"),
        (b'{"prompt": "\xff"}', "not written in UTF-8"),
        (b'{"prompt": "' + b"a" * MAX_BYTES + b'"}', "longer than"),
        (b'"' + b"a" * (5 * MAX_BYTES) + b'"', "longer than"),
        (b"\0\0\0", "it is no JSON"),
    ],
)
def test_a_bad_line_is_named_and_the_others_count(tmp_path, line, said):
    before, (number, error), after = read(tmp_path / "a.jsonl", b'"a"\n' + line + b'\n"b"\n')
    assert (before, after) == ((1, {"prompt": "a"}), (3, {"prompt": "b"}))
    assert number == 2
    assert said in error


def test_a_text_has_a_prompt_on_each_line(tmp_path):
    content = '# a "red" apple, {old|new}\n\n  a hat \r\n\xe9'
    assert read(tmp_path / "a.txt", content) == [
        (1, {"prompt": '# a "red" apple, {old|new}'}),
        (3, {"prompt": "a hat"}),
        (4, {"prompt": "\xe9"}),
    ]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_has_fields_by_its_columns(tmp_path, separator):
    rows = [
        ("prompt", "seed", "guidance_scale", "clean_prompt", "hires_scale", "sampler", "image"),
        ('"a, ""b""; c\td\ne"', "7", "5.5", "TRUE", "", "", "7"),
        ("12", '"[1, 2]"', "x", "false", "2", "euler_a", ""),
        ("", "", "", "", "", "", ""),
        ("short",),
    ]
    content = "\ufeff" + "\r\n".join(separator.join(row) for row in rows)
    assert read(tmp_path / "a.CSV", content) == [
        (2, {"prompt": 'a, "b"; c\td\ne', "seed": 7, "guidance_scale": 5.5, "clean_prompt": True}
            | {"image": "7"}),
        (4, {"prompt": "12", "seed": [1, 2], "guidance_scale": "x", "clean_prompt": False}
            | {"hires_scale": 2, "sampler": "euler_a"}),
        (6, {"prompt": "short"}),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (b"a,1,2", "3 cells for 2 columns"),
        (b"a\xff,1", "not written in UTF-8"),
        (b"a" * 200_000 + b",1", "it is no CSV"),
        (b"a\xed\xa0\x80,1", "not written in UTF-8"),
    ],
)
def test_a_bad_row_is_named_and_the_others_count(tmp_path, row, said):
    content = b"prompt,seed\na,1\n" + row + b"\nb,2\n"
    before, (number, error), after = read(tmp_path / "a.csv", content)
    assert (before, after) == ((2, {"prompt": "a", "seed": 1}), (4, {"prompt": "b", "seed": 2}))
    assert number == 3
    assert said in error


def test_a_quote_that_is_not_closed_takes_what_is_behind_it_and_no_more_memory(tmp_path):
    content = b'prompt\na\n"' + b"b\n" * 150_000
    lines = read(tmp_path / "a.csv", content)
    assert lines[0] == (2, {"prompt": "a"})
    assert "it is no CSV" in lines[1][1]
    assert lines[1][0] == 3
    assert lines[-1][1] == {"prompt": "b"}, "reading goes on behind it"


@pytest.fixture
def parquet():
    return pytest.importorskip("pyarrow.parquet")


def test_parquet_has_a_request_in_each_row(tmp_path, parquet):
    from pyarrow import table

    columns = {
        "prompt": ["a", "b", None],
        "seed": [1, None, 3],
        "hires": [None, {"scale": 2.0}] * 1,
    }
    columns["hires"].append(None)
    path = tmp_path / "a.parquet"
    parquet.write_table(table(columns), path, row_group_size=2)
    assert [(line.number, line.fields) for line in read_lines(path)] == [
        (1, {"prompt": "a", "seed": 1}),
        (2, {"prompt": "b", "hires": {"scale": 2.0}}),
        (3, {"seed": 3}),
    ]


def test_what_is_no_parquet_is_one_sentence(tmp_path, parquet):
    from pyarrow import table

    with pytest.raises(RequestError, match="cannot be read as Parquet"):
        read(tmp_path / "a.parquet", b"PAR1 nothing")
    path = tmp_path / "b.parquet"
    parquet.write_table(table({"text": ["a"]}), path)
    with pytest.raises(RequestError, match="no column prompt"):
        list(read_lines(path))
    parquet.write_table(table({"prompt": ["a" * 1000] * 5000}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:20] + bytes(200) + whole[220:])
    with pytest.raises(RequestError, match="cannot be read as Parquet"):
        list(read_lines(path))


def test_parquet_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BackendError, match=r"pip install '\.\[parquet\]'"):
        read(tmp_path / "a.parquet", b"")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '"a"\n'.encode("utf-16"), "UTF-16"),
        ("a.csv", "prompt\na\n".encode("utf-16"), "UTF-16"),
        ("a.txt", "a\n".encode("utf-16"), "UTF-16"),
        ("a.json", json.dumps([{"prompt": "a"}]), "one JSON array"),
        ("a.csv", "text,seed\na,1\n", "prompt among them"),
        ("a.csv", "prompt,seed,seed\na,1,2\n", "of its own"),
        ("a.xlsx", "a", "no file of requests"),
        ("requests", "a", "no file of requests"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name, content, said):
    with pytest.raises(RequestError, match=said):
        read(tmp_path / name, content)


def test_a_path_without_a_file_is_refused(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("folder.jsonl", "missing.jsonl"):
        with pytest.raises(RequestError, match="is not a file"):
            list(read_lines(tmp_path / name))
