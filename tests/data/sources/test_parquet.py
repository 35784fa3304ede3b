"""Parquet files of unknown origin: gigantic values and pages, damage, nested fields."""

import itertools
import random
import types

import pytest

from llama_jax.config import DataConfig
from llama_jax.data.sources.documents import list_parts, read_source
from llama_jax.data.sources.parquet_pages import pages
from llama_jax.data.sources.part import Tally
from llama_jax.errors import UserError
from tests.helpers import one_line_error, run_command

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

LIMIT = 500_000  # `max_document_bytes` where memory is measured
# Bound on pyarrow's memory: a batch has 4 times the limit; a page and its packed bytes come on top.
MOST = 12 * LIMIT + (1 << 20)
CODECS = ("zstd", "gzip", "brotli", "none")
PAGES = (
    *((False, "1.0", "zstd"), (True, "2.0", "zstd"), (True, "1.0", "gzip"), (False, "2.0", "gzip")),
    *((False, "1.0", "brotli"), (True, "2.0", "brotli"), (True, "1.0", "none")),
    (False, "2.0", "none"),
)
POOLS = []  # kept alive as long as their arrays


def read(path, **fields):
    tally = Tally()
    texts = list(read_source(str(path), DataConfig(**fields), tally))
    return texts, dict(tally.skipped)


def read_in_memory(path, **fields):
    """Returns the texts, the skips, and the peak of pyarrow's memory in bytes."""
    usual = pyarrow.default_memory_pool()
    pool = pyarrow.proxy_memory_pool(usual)
    POOLS.append(pool)
    pyarrow.set_memory_pool(pool)
    try:
        texts, skipped = read(path, max_document_bytes=LIMIT, **fields)
    finally:
        pyarrow.set_memory_pool(usual)
    print(f"{path.name}: {path.stat().st_size:,} bytes, peak {pool.max_memory():,}; {skipped}")
    return texts, skipped, pool.max_memory()


def write(path, texts, **options):
    """Writes a Parquet file with the columns `text` and `id`."""
    table = pyarrow.table({"text": texts, "id": range(len(texts))})
    parquet.write_table(table, path, **options)
    return path


@pytest.mark.parametrize("compression", ["zstd", "snappy", "none"])
@pytest.mark.parametrize("page_version", ["1.0", "2.0"])
def test_equal_texts_of_a_dictionary(tmp_path, compression, page_version):
    """All 256 texts are read, although together they take 128 MB."""
    text = "word " * 100_000
    options = {"compression": compression, "data_page_version": page_version}
    path = write(tmp_path / "x.parquet", [text] * 256, **options)
    texts, skipped, peak = read_in_memory(path)
    assert texts == [text] * 256 and skipped == {}
    assert peak < MOST


def test_a_dictionary_of_values_that_are_too_long(tmp_path):
    path = write(tmp_path / "x.parquet", [*["x" * 1_000_000] * 200, "good"], compression="zstd")
    texts, skipped, peak = read_in_memory(path)
    assert texts == ["good"] and skipped == {"longer than 500,000 bytes": 200}
    assert peak < MOST


def test_a_column_that_was_a_dictionary_in_memory(tmp_path):
    """pyarrow returns the dictionary with each batch; many batches would take minutes."""
    texts = [f"document {n} " * 100 for n in range(20_000)] * 2
    column = pyarrow.array(texts).dictionary_encode()
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    found, skipped, peak = read_in_memory(tmp_path / "x.parquet")
    assert found == texts and skipped == {}
    assert peak < 6 * sum(map(len, texts[:20_000]))  # pyarrow copies it a few times


def test_a_few_large_values_among_many_small_ones(tmp_path):
    """The average size is misleading here: 90 values of 400 KB are next to each other."""
    texts = [*["small"] * 50_000, *[f"{n}" * 200_000 for n in range(10, 100)], *["small"] * 50_000]
    path = write(tmp_path / "x.parquet", texts, use_dictionary=False, write_batch_size=1)
    found, skipped, peak = read_in_memory(path)
    assert found == texts and skipped == {}
    assert peak < MOST


@pytest.mark.parametrize(
    ("nested", "page_version", "compression"),
    [
        # The fast cases cover each codec, each page version and each kind of column.
        case if case in PAGES else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product([False, True], ["1.0", "2.0"], CODECS)
    ],
)
def test_a_page_that_unpacks_to_a_hundred_megabytes(tmp_path, compression, page_version, nested):
    """Its values are read one by one, and those that are too long are skipped."""
    texts = [f"document {n}" for n in range(700)]
    texts += [None, "y" * 400_000, "", "y" * 600_000, *["kä" * 130_000] * 300, None, None, "last"]
    field = "meta.text" if nested else "text"
    table = pyarrow.table({"text": texts})
    if nested:
        inner = [{"text": text} if number % 2 else None for number, text in enumerate(texts)]
        texts = [text if number % 2 else None for number, text in enumerate(texts)]
        table = pyarrow.table({"meta": inner})
    options = {"compression": compression, "data_page_version": page_version}
    path = tmp_path / "x.parquet"
    parquet.write_table(table, path, use_dictionary=False, data_page_size=10**9, **options)
    found, skipped, peak = read_in_memory(path, text_field=field)
    assert found == [text for text in texts if text and len(text) < 600_000]
    assert skipped == {
        f"no text in field {field!r}": texts.count(None),
        "longer than 500,000 bytes": sum(len(text or "") == 600_000 for text in texts),
        **({"empty": texts.count("")} if "" in texts else {}),
    }
    assert peak < MOST


def test_a_required_column_has_no_levels(tmp_path):
    schema = pyarrow.schema([pyarrow.field("text", pyarrow.string(), nullable=False)])
    table = pyarrow.table({"text": ["z" * 400_000] * 100}, schema=schema)
    options = {"use_dictionary": False, "data_page_size": 10**9, "compression": "zstd"}
    parquet.write_table(table, tmp_path / "x.parquet", **options)
    found, skipped, peak = read_in_memory(tmp_path / "x.parquet")
    assert found == ["z" * 400_000] * 100 and skipped == {} and peak < MOST


def test_rows_from_a_page_on_that_cannot_be_read_in_little_memory(tmp_path):
    """LZ4 cannot be unpacked in pieces: such rows are counted as skipped; those before are read."""
    small, text = [f"document {n}" for n in range(1024)], "y" * 400_000
    groups = [[*small, *[text] * 300], ["last"]]
    path = tmp_path / "x.parquet"
    with parquet.ParquetWriter(
        path,
        pyarrow.schema([("text", pyarrow.string())]),
        use_dictionary=False,
        compression="lz4",
        data_page_size=1000,
    ) as writer:
        for some in groups:
            writer.write_table(pyarrow.table({"text": some}))
    found, skipped, peak = read_in_memory(path)
    reason = "in a Parquet page that unpacks to more than 33,554,432 bytes and 32 times its size"
    assert found == [*small, "last"] and skipped == {reason: 300}
    assert peak < MOST


@pytest.mark.parametrize("page_version", ["1.0", "2.0"])
def test_a_large_page_that_is_damaged(tmp_path, page_version):
    """Damage anywhere in the page loses at most its row group, and never ends in a traceback."""
    texts = [f"{n}" * 200_000 if n % 3 else None for n in range(100, 200)]
    options = {"use_dictionary": False, "data_page_size": 10**9, "compression": "zstd"}
    path = write(tmp_path / "x.parquet", texts, data_page_version=page_version, **options)
    good, draw = path.read_bytes(), random.Random(4)
    for _ in range(60):
        data = bytearray(good)
        data[draw.randrange(4, len(data) * 3 // 4)] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            found, _ = read(path, max_document_bytes=1_000_000)
        except UserError:
            continue
        assert len(found) <= 67


def test_large_values_that_do_not_pack_are_all_read(tmp_path):
    """A page that is large in the file as well is read: it is not a decompression bomb."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefghijklmnop", k=300_000)) for _ in range(12)]
    path = write(tmp_path / "x.parquet", texts, use_dictionary=False, compression="zstd")
    assert read(path, max_document_bytes=LIMIT) == (texts, {})


def test_a_row_group_streams(tmp_path):
    """A row group with 40 MB of small rows is not read at once."""
    lines = [f"document {number} " + "of some words " * 70 for number in range(40_000)]
    path = write(tmp_path / "x.parquet", lines, row_group_size=10**9, use_dictionary=False)
    texts, skipped, peak = read_in_memory(path)
    assert texts == lines and skipped == {}
    assert peak < MOST


@pytest.mark.parametrize("compression", ["zstd", "snappy", "gzip", "lz4", "none"])
@pytest.mark.parametrize("page_version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_the_sizes_of_pages_are_what_pyarrow_counts(
    tmp_path, compression, page_version, dictionary
):
    """The pages and their headers add up to the column sizes in the metadata."""
    texts = [None if n % 7 == 0 else f"{n % 900} " * 40 for n in range(20_000)]
    options = {"data_page_version": page_version, "use_dictionary": dictionary}
    path = write(
        tmp_path / "x.parquet",
        texts,
        compression=compression,
        data_page_size=10_000,
        write_page_checksum=True,
        **options,
    )
    column = parquet.ParquetFile(path).metadata.row_group(0).column(0)
    with path.open("rb") as file:
        found = list(pages(file, column))
    data = [page for page in found if not page.is_dictionary]
    assert sum(page.values for page in data) == column.num_values == len(texts)
    headers = column.total_compressed_size - sum(page.packed for page in found)
    assert headers == column.total_uncompressed_size - sum(page.size for page in found)
    assert 15 * len(found) <= headers <= 1000 * len(found)
    assert (
        len(found) - len(data) == dictionary and any(page.numbered for page in data) == dictionary
    )


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"\xff" * 100, b"\x15\x00", b"\x1c" * 50, b"\x19\xf5"]
)
def test_a_header_of_nonsense(tmp_path, data):
    path = tmp_path / "x"
    path.write_bytes(data)
    column = types.SimpleNamespace(data_page_offset=0, has_dictionary_page=False, num_values=9)
    with path.open("rb") as file, pytest.raises(ValueError, match="the header of a page"):
        list(pages(file, column))


def test_every_flipped_byte_of_headers_and_pages(tmp_path):
    """No damage to a file gives a traceback, or more documents than the file had."""
    texts = [f"document {number}" for number in range(300)]
    path = write(tmp_path / "x.parquet", texts, row_group_size=100, data_page_size=200)
    good, draw = path.read_bytes(), random.Random(3)
    for _ in range(300):
        data = bytearray(good)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            found, _ = read(path)
        except UserError:
            continue
        assert len(found) <= 300


NESTED = {
    "meta": [
        {"text": "first", "lang": "en", "in": {"body": "deep 1"}},
        None,
        {"text": None, "lang": "de", "in": None},
        {"text": "last", "lang": "fr", "in": {"body": "deep 2"}},
    ],
    "tags": [["a"], [], None, ["b", "c"]],
    "id": [1, 2, 3, 4],
}


@pytest.mark.parametrize("dictionary", [True, False])
def test_nested_columns(tmp_path, dictionary):
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table(NESTED), path, use_dictionary=dictionary)
    reason = "no text in field 'meta.text'"
    assert read(path, text_field="meta.text") == (["first", "last"], {reason: 2})
    reason = "no text in field 'meta.in.body'"
    assert read(path, text_field="meta.in.body") == (["deep 1", "deep 2"], {reason: 2})


def test_a_column_whose_name_has_a_dot_goes_first(tmp_path):
    table = pyarrow.table({**NESTED, "meta.text": ["a", "b", "c", "d"]})
    parquet.write_table(table, tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet", text_field="meta.text") == (["a", "b", "c", "d"], {})
    table = pyarrow.table({"a.b": [{"c.d": "x"}, {"c.d": "y"}]})
    parquet.write_table(table, tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet", text_field="a.b.c.d") == (["x", "y"], {})


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (
            "meta",
            r"column 'meta' of .*x.parquet holds struct<.*>, not text; name one of its fields: "
            r"meta.text, meta.lang, meta.in.body",
        ),
        ("meta.in", r"not text; name one of its fields: meta.in.body$"),
        (
            "meta.title",
            r"has no column 'meta.title'; it has meta.text, meta.lang, meta.in.body, "
            r"tags, id$",
        ),
        ("text", r"has no column 'text'; it has meta.text"),
        ("tags", r"column 'tags' of .* holds list<.*: string>, not text$"),
        ("tags.element", r"has no column 'tags.element'"),
        ("id", r"column 'id' of .*x.parquet holds int64, not text$"),
        ("meta.", r"has no column 'meta.'"),
        (".", r"has no column '.'"),
    ],
)
def test_columns_that_hold_no_text(tmp_path, field, message):
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table(NESTED), path)
    with pytest.raises(UserError, match=message):
        list_parts(str(path), DataConfig(text_field=field))


def test_the_command_says_it_in_one_line(tmp_path):
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table(NESTED), path)
    flags = ("--config=configs/tiny.py", f"--config.data.source={path}", f"--output={tmp_path}/o")
    line = one_line_error(run_command("prepare", *flags, "--config.data.text_field=tags"))
    assert "column 'tags' of" in line and "not text" in line
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("kind", ["binary", "large_binary", "large_string", "string_view", "null"])
def test_columns_that_may_hold_text(tmp_path, kind):
    values = [None, None] if kind == "null" else ["käse", None]
    column = pyarrow.array(values, getattr(pyarrow, kind)())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    found, skipped = read(tmp_path / "x.parquet")
    assert found == ([] if kind == "null" else ["käse"])
    assert skipped == {"no text in field 'text'": 2 - len(found)}
