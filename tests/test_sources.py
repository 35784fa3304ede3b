import collections
import gzip
import json

import pytest

from llama_jax.config import DataConfig
from llama_jax.data.sources import documents, list_files
from llama_jax.errors import UserError


def read(source, **fields):
    skipped = collections.Counter()
    found = list(documents(DataConfig(source=str(source), **fields), skipped))
    return [document.text for document in found], dict(skipped)


def test_a_folder_is_read_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.txt").write_text("two\r\nlines\n")
    (tmp_path / "a.md").write_text("one")
    (tmp_path / "c.txt").write_text("three")
    assert read(tmp_path) == (["one", "two\r\nlines\n", "three"], {})


def test_globs_and_lists_name_each_file_once(tmp_path):
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / name).write_text(name)
    source = f"{tmp_path}/*.txt, {tmp_path}/c.md,{tmp_path}/a.txt"
    assert [path.name for path in list_files(source)] == ["a.txt", "b.txt", "c.md"]


@pytest.mark.parametrize("zipped", [False, True])
def test_json_lines(tmp_path, zipped):
    lines = [
        json.dumps({"text": "first\nline", "id": 1}),
        "",
        json.dumps({"text": "z\u00e9ro \U0001f999"}),
        "{broken",
        json.dumps({"body": "no text"}),
        json.dumps({"text": 3}),
        json.dumps([1, 2]),
        json.dumps({"text": "   "}),
        '{"text": "half \\ud800 pair"}',
        json.dumps({"text": "last"}),
    ]
    data = "\n".join(lines).encode() + b'\n{"text": "\xff"}'
    path = tmp_path / ("x.jsonl.gz" if zipped else "x.jsonl")
    path.write_bytes(gzip.compress(data) if zipped else data)
    texts, skipped = read(path)
    assert texts == ["first\nline", "zéro 🦙", "last"]
    assert skipped == {
        "broken JSON line": 1,
        "no text in field 'text'": 3,
        "empty": 1,
        "invalid UTF-8": 2,
    }


def test_another_text_field(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"content": "hello"}\n')
    assert read(tmp_path, text_field="content") == (["hello"], {})


def test_unusable_files_are_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"latin \xe9 text")
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "c.txt").write_text(" \n\t")
    (tmp_path / "d.txt").write_text("x" * 101)
    (tmp_path / "e.txt").write_text("x" * 100)
    texts, skipped = read(tmp_path, max_document_bytes=100)
    assert texts == ["x" * 100]
    assert skipped == {"invalid UTF-8": 1, "empty": 2, "longer than 100 bytes": 1}


def test_an_endless_json_line_is_skipped_in_little_memory(tmp_path):
    long = json.dumps({"text": "x" * 5000})
    (tmp_path / "x.jsonl").write_text(f'{long}\n{{"text": "after"}}\n{long}')
    texts, skipped = read(tmp_path, max_document_bytes=100)
    assert texts == ["after"]
    assert skipped == {"longer than 100 bytes": 2}


def test_a_damaged_gzip_keeps_what_came_before(tmp_path):
    lines = "".join(json.dumps({"text": f"document {n} " * 50}) + "\n" for n in range(2000))
    data = gzip.compress(lines.encode())
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    (tmp_path / "b.txt").write_text("next file")
    texts, skipped = read(tmp_path)
    assert skipped.pop("damaged gzip") == 1
    assert texts[-1] == "next file" and len(texts) > 100


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing.txt", "does not exist"), ("*.nothing", "matches no file"), ("empty", "no file")],
)
def test_a_source_that_is_not_there(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_the_standard_library_is_found():
    files = list_files("stdlib")
    names = {path.name for path in files}
    assert len(files) > 300
    assert {"argparse.py", "dataclasses.py"} <= names
    assert not any("site-packages" in str(path) or "/test/" in str(path) for path in files)
