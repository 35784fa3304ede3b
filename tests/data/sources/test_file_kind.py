"""A file's first bytes determine its kind. Python's own writers and PyArrow make the files."""

import bz2
import csv
import dataclasses
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import pyarrow
import pytest
import zstandard
from etils import epath
from pyarrow import parquet

from llama_jax.config import DataConfig
from llama_jax.data.prepare.job import prepare
from llama_jax.data.sources import file_kind
from llama_jax.data.sources.documents import list_parts, read_source
from llama_jax.data.sources.json_files import read_records
from llama_jax.data.sources.nested_fields import field_of
from llama_jax.data.sources.part import Tally
from llama_jax.errors import UserError
from tests.helpers import one_line_error, replace, run_command, text_config

TEXTS = ["first\nline", "zéro 🦙", "last"]
RECORDS = [{"text": text, "id": number} for number, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
LIST = json.dumps(RECORDS, indent=2).encode()


def read(source, **fields):
    tally = Tally()
    config = DataConfig(source=str(source), **fields)
    return list(read_source(str(source), config, tally)), tally


def made(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "zip_", [bytes, gzip.compress, zstandard.compress, lzma.compress, bz2.compress]
)
@pytest.mark.parametrize(
    "name", ["a.json", "a.jsonl", "a.ndjson", "a.txt", "part-00000", "a.json.gz"]
)
def test_json_lines_by_any_name(tmp_path, name, zip_):
    texts, tally = read(made(tmp_path / name, zip_(LINES)))
    assert texts == TEXTS and tally.files == {"JSON lines": 1} and not tally.skipped


@pytest.mark.parametrize("zip_", [bytes, gzip.compress, zstandard.compress])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt", "blob", "a.json.gz"])
def test_a_list_by_any_name(tmp_path, name, zip_):
    texts, tally = read(made(tmp_path / name, zip_(LIST)))
    assert texts == TEXTS and tally.files == {"JSON lists": 1} and not tally.skipped


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("data", [json.dumps(TEXTS), json.dumps(TEXTS, indent=1)])
def test_a_list_of_texts(tmp_path, name, data):
    assert read(made(tmp_path / name, data.encode()))[0] == TEXTS


def test_objects_that_follow_each_other(tmp_path):
    """`jq .` writes such files; a single object is read as well."""
    text = "\n".join(json.dumps(record, indent=2) for record in RECORDS)
    for name in ("a.json", "a.jsonl"):
        texts, tally = read(made(tmp_path / name, text.encode()))
        assert texts == TEXTS and tally.files == {"JSON objects": 1}
    for indent in (None, 2):
        one = json.dumps(RECORDS[0], indent=indent).encode()
        assert read(made(tmp_path / "a.json", one))[0] == TEXTS[:1]


@pytest.mark.parametrize(
    "data", [{"version": 1, "data": RECORDS}, {"text": 3}, {}, {"a": "x" * 10**6}]
)
def test_an_object_that_is_no_record_asks(tmp_path, data):
    made(tmp_path / "b.txt", b"text")
    path = made(tmp_path / "a.json", json.dumps(data, indent=1).encode())
    for source in (tmp_path, path):
        with pytest.raises(
            UserError, match=r"a.json is one JSON object without a text in field"
        ) as e:
            read(source)
        assert "data.text_field" in str(e.value) and "\n" not in str(e.value)


def test_a_json_file_that_is_something_else_asks(tmp_path):
    for data in (b"some words", b"3\n4\n", b'"text"'):
        with pytest.raises(UserError, match=r"a.json is neither JSON lines nor a JSON list"):
            read(made(tmp_path / "a.json", data))
    assert read(made(tmp_path / "a.json", b""))[1].skipped == {"empty": 1}


def test_texts_that_only_begin_like_json(tmp_path):
    for name, data in {
        "a.txt": b"{\\bf bold} words\n{more}\n",
        "b.py": b"{1: 2}\n[x for x in y]\n",
        "c.md": b"[link](there)\n",
        "d.txt": b'{"a": 1}\nand prose\n',
        "e.txt": b'[\n  "a",\n',
        "f": b"{" + b"x" * 100_000,
    }.items():
        texts, tally = read(made(tmp_path / name, data))
        assert texts == [data.decode()] and tally.files == {"plain text": 1}, name


def test_a_first_line_that_is_broken_or_long(tmp_path):
    for name in ("a.json", "a.jsonl"):
        texts, tally = read(made(tmp_path / name, b'{"text": "x\n' + LINES))
        assert texts == TEXTS and tally.skipped == {"broken JSON line": 1}
        assert tally.files == {"JSON lines": 1}
    long = json.dumps({"text": "x" * 300_000}).encode() + b"\n"
    for name in ("a.json", "a.txt", "a.jsonl"):
        texts, tally = read(made(tmp_path / name, long + LINES))
        assert texts == ["x" * 300_000, *TEXTS] and tally.files == {"JSON lines": 1}


def test_a_long_first_line_does_not_make_all_of_a_file_be_looked_at(tmp_path, monkeypatch):
    given = []
    kept = file_kind.open_stream

    class Counted:
        def __init__(self, file):
            self.file = file

        def read(self, size):
            given.append(self.file.read(size))
            return given[-1]

    def opened(raw):
        stream = kept(raw)
        return dataclasses.replace(stream, file=Counted(stream.file))

    monkeypatch.setattr(file_kind, "open_stream", opened)
    long = json.dumps({"text": "x" * 300_000}).encode() + b"\n"
    path = made(tmp_path / "a.json", long + LINES * 100_000)
    assert file_kind.identify_file(epath.Path(path), DataConfig()).kind == "jsonl"
    assert sum(map(len, given)) < 1_000_000 < path.stat().st_size


def test_damaged_lines_are_no_reason_to_train_on_raw_json(tmp_path):
    for first in (b'{"text": "x\n', b"# made by a script\n"):
        for name in ("a.txt", "part-00000", "a.json", "a.jsonl"):
            texts, tally = read(made(tmp_path / name, first + LINES))
            assert texts == TEXTS and tally.skipped == {"broken JSON line": 1}, name
    records = [{"text": "x" * 200_000}, {"text": "y"}]
    texts, tally = read(made(tmp_path / "blob", json.dumps(records).encode()))
    assert texts == ["x" * 200_000, "y"] and tally.files == {"JSON lists": 1}


def test_what_follows_a_list_is_not_lost_silently(tmp_path):
    texts, tally = read(made(tmp_path / "a.json", LIST + LIST))
    assert texts == 2 * TEXTS
    texts, tally = read(made(tmp_path / "a.json", LIST + b"oops"))
    assert texts == TEXTS
    assert tally.skipped == {"broken JSON; the rest of the file is left out": 1}


@pytest.mark.parametrize("name", ["x.parquet", "x", "x.json", "x.txt", "x.parquet.gz"])
def test_parquet_by_any_name(tmp_path, name):
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / name)
    texts, tally = read(tmp_path)
    assert texts == TEXTS and tally.files == {"Parquet": 1}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-be", "utf-32-be"])
@pytest.mark.parametrize("data", [LINES, LIST, "some words é 語 🦙\n".encode()])
@pytest.mark.parametrize("zip_", [bytes, gzip.compress])
def test_byte_order_marks(tmp_path, encoding, data, zip_):
    """Python's codecs ending in -be write no BOM, so the test adds one, as editors do."""
    text = data.decode() if not encoding.endswith("be") else "\ufeff" + data.decode()
    path = made(tmp_path / "a.json", b"")
    expected = TEXTS
    if data[:1] not in b"{[":
        path, expected = tmp_path / "a.txt", [data.decode()]
    texts, tally = read(made(path, zip_(text.encode(encoding))))
    assert texts == expected and not tally.skipped
    (kind,) = tally.files
    assert kind.endswith({"8": "", "1": " in UTF-16", "3": " in UTF-32"}[encoding[4]])


def test_a_bom_in_a_record_and_in_parquet(tmp_path):
    texts, _ = read(made(tmp_path / "a.jsonl", '{"text": "\ufeffx\ufeffy"}\n'.encode()))
    assert texts == ["x\ufeffy"]
    parquet.write_table(pyarrow.table({"text": ["\ufeffx", "y"]}), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet")[0] == ["x", "y"]
    assert read(made(tmp_path / "b.txt", b"\xef\xbb\xbf"))[1].skipped == {"empty": 1}


def test_damaged_utf16_is_counted(tmp_path):
    data = "words\n".encode("utf-16") + b"\x00\xd8" + "more".encode("utf-16-le")
    assert read(made(tmp_path / "a.txt", data))[1].skipped == {"invalid UTF-8": 1}
    assert read(made(tmp_path / "a.txt", "odd".encode("utf-16") + b"x"))[1].skipped


def archive(make):
    buffer = io.BytesIO()
    make(buffer)
    return buffer.getvalue()


def tar(buffer):
    with tarfile.open(fileobj=buffer, mode="w") as file:
        info = tarfile.TarInfo("a.txt")
        info.size = 5
        file.addfile(info, io.BytesIO(b"words"))


def zip_file(buffer):
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.txt", "words")


FOREIGN = [
    (archive(zip_file), "zip archives"),
    (archive(tar), "tar archives"),
    (gzip.compress(archive(tar)), "tar archives"),
    ("plain words".encode("utf-16-le"), "UTF-16 without a byte order mark"),
    ("plain words".encode("utf-16-be"), "UTF-16 without a byte order mark"),
    (bytes(1000), "binary files"),
    (bytes(range(256)) + bytes(30), "binary files"),
    (b"%PDF-1.7\n...", "PDF files"),
    (b"\x89PNG\r\n\x1a\n" + bytes(40), "images"),
]


# Archives contain the time: test ids made of their bytes would differ between workers.
@pytest.mark.parametrize(("data", "kind"), FOREIGN, ids=range(len(FOREIGN)))
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a"])
def test_what_is_no_text_is_named_and_never_read(tmp_path, data, kind, name):
    path = made(tmp_path / name, data)
    texts, tally = read(path)
    assert texts == [] and not tally.files
    ((reason, count),) = tally.left_out.items()
    assert kind in reason and count == 1 and tally.first[reason] == str(path)


def test_a_nul_in_a_text_is_text(tmp_path):
    texts, tally = read(made(tmp_path / "a.jsonl", LINES + bytes(500)))
    assert texts == TEXTS and tally.skipped == {"broken JSON line": 1}
    assert read(made(tmp_path / "a.txt", b"a zero \0 in it"))[0] == ["a zero \0 in it"]


def test_a_table_in_csv_is_plain_text(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], [1, "words, more"]])
    texts, tally = read(tmp_path / "a.csv")
    assert texts == ['id,text\r\n1,"words, more"\r\n'] and tally.files == {"plain text": 1}


def test_a_pointer_of_git_lfs(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 2184\n"
    for name in ("a.txt", "a.jsonl", "a.parquet", "a.json.gz"):
        with pytest.raises(UserError, match=f"{name} is a pointer of Git LFS.*`git lfs pull`"):
            read(made(tmp_path / name, pointer))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.json.zst", "a.xz"])
def test_a_compressed_name_without_a_sign_of_it(tmp_path, name):
    assert read(made(tmp_path / name, b"not compressed"))[1].skipped == {
        "damaged compressed file": 1
    }
    config = DataConfig(template="alpaca", packing="best_fit")
    tally = Tally()
    (part,) = list_parts(str(tmp_path / name), config)
    assert list(read_records(part, config, tally)) == []
    assert tally.skipped == {"damaged compressed file": 1}
    # A file that a web server decompressed in transit keeps its name.
    assert read(made(tmp_path / name, LINES))[0] == TEXTS


@pytest.mark.parametrize("zip_", [gzip.compress, zstandard.compress, lzma.compress, bz2.compress])
def test_damage_keeps_what_came_before(tmp_path, zip_):
    lines = "".join(
        json.dumps({"text": f"document {n * 7919 % 10007} " * 30}) + "\n" for n in range(20_000)
    )
    data = zip_(lines.encode())
    texts, tally = read(made(tmp_path / "a.jsonl", data[: len(data) // 2]))
    assert tally.skipped == {"damaged compressed file": 1}
    assert texts == [json.loads(line)["text"] for line in lines.splitlines()[: len(texts)]]
    assert zip_ in (bz2.compress, lzma.compress) or len(texts) > 1000


@pytest.mark.parametrize(
    ("record", "name", "value"),
    [
        ({"meta": {"text": "x"}}, "meta.text", "x"),
        ({"meta.text": "y", "meta": {"text": "x"}}, "meta.text", "y"),
        ({"a": {"b": {"c": "z"}}}, "a.b.c", "z"),
        ({"a.b": {"c": "z"}, "a": {"b": 1}}, "a.b.c", "z"),
        ({"a": "x"}, "a.b", None),
        ({"a": [{"b": "x"}]}, "a.b", None),
        ({"": {"": "x"}}, ".", "x"),
        ({"a": None}, "a", None),
        ([1], "a", None),
        ("a", "a", None),
    ],
)
def test_nested_fields(record, name, value):
    assert field_of(record, name) == value


def test_nested_fields_of_files(tmp_path):
    records = [{"meta": {"text": text}} for text in TEXTS]
    lines = "\n".join(map(json.dumps, records)).encode()
    assert read(made(tmp_path / "a.jsonl", lines), text_field="meta.text")[0] == TEXTS
    assert (
        read(made(tmp_path / "a.json", json.dumps(records).encode()), text_field="meta.text")[0]
        == TEXTS
    )
    texts, tally = read(made(tmp_path / "a.jsonl", lines))
    assert texts == [] and tally.first["no text in field 'text'"].endswith(": it has 'meta'")
    tally = read(made(tmp_path / "b.jsonl", b'{"text": 5}'))[1]
    assert tally.first["no text in field 'text'"].endswith(": it holds int, not text")


def test_instructions_by_any_name(tmp_path):
    record = {"instruction": "a", "output": "b"}
    config = DataConfig(template="alpaca", packing="best_fit")
    for name, data in {
        "lines.json": f"{json.dumps(record)}\n{json.dumps(record)}\n",
        "lines.txt": f"{json.dumps(record)}\n{json.dumps(record)}\n",
        "list.jsonl": json.dumps([record, record], indent=1),
        "list": json.dumps([record, record]),
        "objects.json": json.dumps(record, indent=1) * 2,
    }.items():
        path = made(tmp_path / name, data.encode())
        (part,) = list_parts(str(path), config)
        found = [found for found, _ in read_records(part, config, Tally())]
        assert found == [record, record], name
    with pytest.raises(UserError, match=r"a.txt is neither .json nor .jsonl.*plain text"):
        list_parts(str(made(tmp_path / "a.txt", b"words")), config)


def test_the_report_says_what_was_read(tmp_path, tokenizer):
    source = tmp_path / "source"
    (source / ".git").mkdir(parents=True)
    made(source / ".git" / "config", b"hidden words")
    made(source / "README.md", b"about")
    for number in range(3):
        made(source / f"{number}.json", LINES)
    made(source / "b.json", LIST)
    made(source / "c.txt", b"some words to learn from")
    made(source / "d.zip", archive(zip_file))
    tokenizer.save(tmp_path / "t.model")
    config = text_config(source, data__tokenizer=str(tmp_path / "t.model"), data__part_bytes=50)
    config = replace(config, data__validation_fraction=0.0)  # a tail would cut a document
    lines = []
    for _ in range(2):  # the second report is from the manifest
        report = prepare(config, tmp_path / "out", log=lines.append)[0]
        assert report.files == {"JSON lines": 3, "JSON lists": 1, "plain text": 1}
        assert {why: count for why, (count, _) in report.left_out.items()} == {
            "hidden files and folders": 1,
            "files about the data, such as README, LICENSE and checksums": 1,
            "zip archives": 1,
        }
        assert sum(split["documents"] for split in report.splits.values()) == 13
    text = "\n".join(lines)
    assert "files                    3  JSON lines" in text
    assert f"left out                 1  zip archives; the first: {source}/d.zip" in text


@pytest.mark.parametrize("command", ["prepare", "train"])
def test_why_there_is_no_text(tmp_path, command):
    """Both commands that train a tokenizer say in one line what they found instead, and where."""
    source = tmp_path / "source"
    source.mkdir()
    made(source / "a.jsonl", b'{"body": "words"}\n' * 3)
    made(source / "b.tar", archive(tar))
    place = {"prepare": "--output", "train": "--workdir"}[command]
    flags = [
        "--config=configs/tiny.py",
        f"--config.data.source={source}",
        f"{place}={tmp_path}/out",
    ]
    if command == "train":
        flags.append("--config.data.streaming=True")
    line = one_line_error(run_command(command, *flags))
    assert "there is no text to train a tokenizer on" in line
    assert (
        f"3 no text in field 'text' (the first: {source}/a.jsonl at byte 0: it has 'body')" in line
    )
    assert f"1 tar archives (the first: {source}/b.tar)" in line
