import gzip
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.config import DataConfig
from llama_jax.data.sources.documents import list_parts, read_source
from llama_jax.data.sources.documents import read_documents as read_part
from llama_jax.data.sources.listing import list_files, named_sources
from llama_jax.data.sources.part import Tally
from llama_jax.errors import UserError


def read(source, **fields):
    """Returns documents and skips; one part and many small parts must give the same."""
    found = []
    for part_bytes in (1 << 30, 100):
        tally = Tally()
        config = DataConfig(source=str(source), part_bytes=part_bytes, **fields)
        found.append((list(read_source(str(source), config, tally)), dict(tally.skipped)))
    assert found[0] == found[1]
    return found[0]


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


def test_wildcards_in_folders(tmp_path):
    for name in ("en/0/a.txt", "en/1/b.txt", "de/0/c.txt", "en/0/d.md", "odd[1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    names = lambda pattern: [path.name for path in list_files(f"{tmp_path}/{pattern}")]  # noqa: E731
    assert names("e?/*/*.txt") == ["a.txt", "b.txt"]
    assert names("*/0/c.txt") == ["c.txt"]
    assert names("odd[1].txt") == ["odd[1].txt"]  # an existing name, not a pattern
    with pytest.raises(UserError, match=r"fr/\*/\*.txt matches no file"):
        names("fr/*/*.txt")
    with pytest.raises(UserError, match=r"has '\*\*'; name the folder"):
        names("**/*.txt")


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
        '{"text": "a number that Python refuses", "id": %s}' % ("1" * 5000),
        '{"text": "too deep", "id": %s}' % ("[" * 9_000 + "]" * 9_000),
        json.dumps({"text": "last"}),
    ]
    data = "\n".join(lines).encode() + b'\n{"text": "\xff"}'
    path = tmp_path / ("x.jsonl.gz" if zipped else "x.jsonl")
    path.write_bytes(gzip.compress(data) if zipped else data)
    texts, skipped = read(path)
    assert texts == ["first\nline", "zéro 🦙", "last"]
    assert skipped == {
        "broken JSON line": 3,
        "no text in field 'text'": 3,
        "empty": 1,
        "invalid UTF-8": 2,
    }


def test_a_json_file_is_never_read_as_its_raw_text(tmp_path):
    (tmp_path / "a.json").write_text('[{"instruction": "x"}, {"text": "y"}]')
    assert read(tmp_path) == (["y"], {"no text in field 'text'": 1})


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
    assert texts == ["x" * 50, "x" * 51, "x" * 100]  # the first text is too long and is cut
    assert skipped == {"invalid UTF-8": 1, "empty": 2}


def test_an_endless_json_line_is_skipped_in_little_memory(tmp_path):
    long = json.dumps({"text": "x" * 5000})
    (tmp_path / "x.jsonl").write_text(f'{long}\n{{"text": "after"}}\n{long}')
    texts, skipped = read(tmp_path, max_document_bytes=100)
    assert texts == ["after"]
    assert skipped == {"longer than 100 bytes": 2}


@pytest.mark.parametrize(
    "kind", ["txt", "jsonl.zst", "parquet", pytest.param("jsonl", marks=pytest.mark.slow)]
)
def test_a_document_of_100_mb_is_read_in_bounded_memory(tmp_path, kind):
    """A plain text of that length is cut; a record is skipped."""
    import pyarrow
    import zstandard
    from pyarrow import parquet

    path, text = tmp_path / f"a.{kind}", "x" * 100_000_000
    if kind == "txt":
        path.write_text(text)
    elif kind == "parquet":
        table = pyarrow.table({"text": [text, "after"]})
        parquet.write_table(table, path, compression="none", use_dictionary=False)
    else:
        data = (json.dumps({"text": text}) + '\n{"text": "after"}\n').encode()
        path.write_bytes(zstandard.compress(data) if kind.endswith("zst") else data)
        del data
    del text
    (tmp_path / "b.txt").write_text("next")
    tally = Tally()
    tracemalloc.start()
    texts = [len(text) for text in read_source(str(tmp_path), DataConfig(), tally)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    if kind == "txt":
        assert sum(texts) == 100_000_004 and max(texts) <= 10_000_000 and not tally.skipped
    else:
        assert texts == [5, 4] and tally.skipped == {"longer than 10,000,000 bytes": 1}
    # Up to 6 times the limit of a line is read, because JSON may escape every byte.
    assert peak < 220e6


def test_a_damaged_gzip_keeps_what_came_before(tmp_path):
    lines = "".join(json.dumps({"text": f"document {n} " * 50}) + "\n" for n in range(2000))
    data = gzip.compress(lines.encode())
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    (tmp_path / "b.txt").write_text("next file")
    texts, skipped = read(tmp_path)
    assert skipped.pop("damaged compressed file") == 1
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


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_zstandard(tmp_path, kind):
    import zstandard

    text = json.dumps({"text": "hello"}) if kind == "jsonl" else "hello"
    # Two frames, as from `cat a.zst b.zst`.
    frames = [zstandard.compress((text + end).encode()) for end in ("\n", "")]
    (tmp_path / f"x.{kind}.zst").write_bytes(b"".join(frames))
    expected = ["hello", "hello"] if kind == "jsonl" else ["hello\nhello"]
    assert read(tmp_path) == (expected, {})
    (tmp_path / f"x.{kind}.zst").write_bytes(b"not zstandard")
    assert read(tmp_path) == ([], {"damaged compressed file": 1})


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(st.text(max_size=30), max_size=20), part_bytes=st.integers(1, 200))
def test_a_line_belongs_to_one_part(tmp_path_factory, texts, part_bytes):
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = DataConfig(source=str(path), part_bytes=part_bytes)
    found = [t for part in list_parts(str(path), config) for t in read_part(part, config, Tally())]
    usable = [t for t in texts if t.strip() and not any("\ud800" <= c <= "\udfff" for c in t)]
    assert found == usable


@pytest.fixture
def parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"document {n}" for n in range(50)] + ["", None, "last"]
    table = pyarrow.table({"text": texts, "id": list(range(53))})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=10)
    return tmp_path / "x.parquet"


def test_parquet(parquet):
    texts, skipped = read(parquet)
    assert texts == [*(f"document {n}" for n in range(50)), "last"]
    assert skipped == {"empty": 1, "no text in field 'text'": 1}
    config = DataConfig(source=str(parquet), part_bytes=100)
    assert len(list_parts(str(parquet), config)) > 2


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_parquet_with_text_that_is_no_utf8(tmp_path, kind):
    """Parquet does not check UTF-8; only the damaged values are skipped."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    values = pyarrow.array([b"first", b"\xff\xfe", b"half \xed\xa0\x80 pair", None, b"last"])
    offsets, text = values.buffers()[1:]
    nulls = pyarrow.py_buffer(b"\x17")  # the fourth is null
    column = pyarrow.Array.from_buffers(pyarrow.string(), 5, [nulls, offsets, text])
    if kind == "dictionary":
        column = column.dictionary_encode()
    elif kind != "string":
        column = column.cast(getattr(pyarrow, kind)())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    texts, skipped = read(tmp_path / "x.parquet")
    assert texts == ["first", "last"]
    assert skipped == {"invalid UTF-8": 2, "no text in field 'text'": 1}


def test_parquet_without_the_column_or_damaged(parquet, tmp_path):
    with pytest.raises(UserError, match="has no column 'body'; it has text, id"):
        read(parquet, text_field="body")
    (tmp_path / "y.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match="y.parquet is not a Parquet file"):
        read(tmp_path / "y.parquet")
    data = bytearray(parquet.read_bytes())
    data[40:400] = bytes(360)
    parquet.write_bytes(data)
    texts, skipped = read(parquet)
    assert 1 <= skipped["damaged Parquet row group"] <= 3
    assert texts[-1] == "last"


def test_named_sources():
    assert named_sources("a/*.txt,b.txt") == {"": "a/*.txt,b.txt"}
    assert named_sources("web=a/*.jsonl,b.jsonl; my-books = c ;") == {
        "web": "a/*.jsonl,b.jsonl",
        "my-books": "c",
    }


@pytest.mark.parametrize(
    ("source", "message"),
    [("a=x;a=y", "names 'a' twice"), ("../a=x", "is not NAME=FILES"), ("a=", "not NAME=FILES")],
)
def test_sources_with_bad_names(source, message):
    with pytest.raises(UserError, match=message):
        named_sources(source)
