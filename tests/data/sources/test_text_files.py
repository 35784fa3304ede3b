"""Plain text becomes documents, checked by `str.split`, by joining them, and by hand."""

import gzip
import io
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama_jax.config import DataConfig
from llama_jax.data.prepare.job import prepare
from llama_jax.data.sources import text_files
from llama_jax.data.sources.documents import list_parts, read_source
from llama_jax.data.sources.documents import read_documents as read_part
from llama_jax.data.sources.part import Tally
from llama_jax.data.sources.text_files import separator_of, text_documents
from llama_jax.errors import UserError
from tests.helpers import text_config

# Few characters, so that blank lines, long lines and characters of several bytes are common.
PIECES = ["\n", "\n", "\n\n", "\r\n", "\r\n\r\n", " \t\n", "a", "bc", "é", "語", "🦙", "word " * 5]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=80).map("".join)


def cut(data, size, limit=10**7, step=100_000, chunk=1 << 20, **fields):
    """Reads `data` in ranges of `size` bytes (0: at once); returns the documents and the tally."""
    config = DataConfig(source="x", max_document_bytes=limit, **fields)
    tally, found = Tally(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "STEP", step)
        patch.setattr(text_files, "CHUNK", chunk)
        ranges = [(at, at + size) for at in range(0, len(data), size)] if size else [(0, -1)]
        for start, stop in ranges:
            file = io.BytesIO(data)
            found += text_documents(file, start, stop, "x", config, tally)
    return found, tally


@settings(deadline=None, max_examples=300)
@given(
    text=TEXTS,
    limit=st.integers(8, 60),
    step=st.integers(1, 40),
    size=st.integers(1, 50),
    chunk=st.integers(1, 20),
)
@example(text="a" * 300, limit=100, step=40, size=7, chunk=3)
@example(text="\n" * 400, limit=300, step=10, size=50, chunk=20)
def test_a_large_text_is_cut_and_nothing_is_lost(text, limit, step, size, chunk):
    """Reading at once or in ranges gives the same documents, which join to the text."""
    data = text.encode()
    whole, tally = cut(data, 0, limit, step, chunk)
    ranges, counted = cut(data, size, limit, step, chunk)
    if len(data) > limit:  # only such files are read in ranges
        assert ranges == whole and counted.skipped == tally.skipped
        assert counted.changed == tally.changed
        assert sum(tally.changed.values()) == len(whole)
    elif text.strip():
        assert whole == [text] and not tally.changed
    assert all(len(document.encode()) <= limit for document in whole)
    blanks = tally.skipped.pop("empty", 0)
    assert not tally.skipped
    if not blanks:
        assert "".join(whole) == (text if text.strip() else "")
    else:  # blank documents are skipped and counted
        assert "".join("".join(whole).split()) == "".join(text.split())


@settings(deadline=None, max_examples=300)
@given(
    text=TEXTS,
    separator=st.sampled_from(
        ["\n\n", "\n", "a", "aba", "\r\n\r\n", "é", "<|x|>", "\n\n\n", "bcb"]
    ),
    size=st.integers(1, 50),
    chunk=st.integers(1, 20),
)
@example(text="\n" * 101 + "a", separator="\n\n", size=10, chunk=3)
@example(text="abababa" * 9, separator="aba", size=5, chunk=2)
def test_a_separator_cuts_as_split_does(text, separator, size, chunk):
    if separator in ("<|x|>", "bcb"):
        text = text.replace("a", separator)
    pieces = text.split(separator)
    expected = [piece for piece in pieces if piece.strip()]
    for found, tally in (
        cut(text.encode(), 0, chunk=chunk, separator=separator),
        cut(text.encode(), size, chunk=chunk, separator=separator),
    ):
        assert found == expected
        # A blank piece before a separator is counted; after the last one, it is no document.
        blank = [p for p in pieces[:-1] if p and not p.strip()]
        if len(pieces) > 1:
            assert tally.skipped["empty"] == len(blank)


def test_where_a_large_text_is_cut_by_hand():
    paragraphs = [f"paragraph {n}\nof two lines\n\n" for n in range(10)]  # 27 bytes each
    found, tally = cut("".join(paragraphs).encode(), 0, limit=200, step=50)
    # The first blank line after bytes 50, 100, 150, 200 and 250 ends at 54, 108, 162, 216, 270.
    assert found == ["".join(paragraphs[at : at + 2]) for at in range(0, 10, 2)]
    assert tally.changed == {text_files.BLANK_LINE: 5}
    assert tally.first[text_files.BLANK_LINE] == "x at byte 0"
    lines = "".join(f"line {n:04}\n" for n in range(100))  # 10 bytes each, no blank line
    found, tally = cut(lines.encode(), 0, limit=200, step=75)
    # Cuts at the first line end after 75, 150, 225, .. 900; after 975 too little is left.
    assert [len(document) for document in found] == [80, *[80, 70] * 5, 80, 90]
    assert tally.changed == {text_files.LINE_END: 13}
    found, tally = cut("語".encode() * 100, 0, limit=50, step=25)  # no line end
    # Cuts at the first multiple of 3 from 25, 50, .. 250 on; after 275 too little is left.
    assert [len(document) for document in found] == [9, 8, 8] * 3 + [9, 16]
    assert tally.changed == {text_files.LETTER: 11}


def test_windows_line_ends_and_spaces_make_a_blank_line():
    for blank in ("\r\n\r\n", "\n \t\n", "\n\n\n\n"):
        text = blank.join(["x" * 40] * 4) + blank
        found, tally = cut(text.encode(), 0, limit=100, step=30)
        assert found == ["x" * 40 + blank] * 4
        assert tally.changed == {text_files.BLANK_LINE: 4}


def test_damage_in_a_large_text_costs_one_document():
    text = b"\n\n".join([b"x" * 50, b"y" * 50, b"\xff" * 50, b"z" * 50])
    found, tally = cut(text, 0, limit=100, step=40)
    assert found == ["x" * 50 + "\n\n", "y" * 50 + "\n\n", "z" * 50]
    assert tally.skipped == {"invalid UTF-8": 1}
    assert tally.first["invalid UTF-8"] == "x at byte 104"


def test_a_document_between_separators_that_is_too_long():
    text = "first|" + "x" * 5000 + "|last|"
    for size in (0, 700):
        found, tally = cut(text.encode(), size, limit=100, chunk=64, separator="|")
        assert found == ["first", "last"]
        assert tally.skipped == {"longer than 100 bytes": 1}
        assert tally.first["longer than 100 bytes"] == "x at byte 6"
    assert tally.changed == {text_files.SEPARATOR: 2}


def test_a_separator_that_is_not_there_is_reported():
    found, tally = cut(b"one story", 0, separator="<|end|>")
    assert found == ["one story"] and tally.changed == {text_files.NO_SEPARATOR: 1}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"\n\n", "\n\n"),
        ("\n\n", "\n\n"),
        (r"\t", "\t"),
        (r"\r\n", "\r\n"),
        (r"\f", "\f"),
        (r"\x1e", "\x1e"),
        (r"\u2029", "\u2029"),
        (r"\\n", r"\n"),
        ("<|endoftext|>", "<|endoftext|>"),
        (r"\section", r"\section"),
    ],
)
def test_how_a_separator_is_written(written, meant):
    assert separator_of(DataConfig(separator=written)) == meant


@pytest.mark.parametrize("zipped", [False, True])
def test_a_large_file_takes_little_memory(tmp_path, zipped):
    data = b"some words to learn from\n\n" * 2_000_000  # 52 MB
    path = tmp_path / "x.txt"
    path.write_bytes(gzip.compress(data, 1) if zipped else data)
    size = len(data)
    del data
    config = DataConfig(source=str(path), max_document_bytes=1_000_000, part_bytes=10_000_000)
    tally = Tally()
    tracemalloc.start()
    parts = list_parts(str(path), config, tally=tally)
    found = sum(len(text) for part in parts for text in read_part(part, config, tally))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == size and peak < 12e6
    assert len(parts) == (1 if zipped else 6)
    assert tally.files == {"plain text": 1}  # counted once, not per part
    assert sum(tally.changed.values()) == 520


def test_several_workers_share_a_large_file(tmp_path, tokenizer):
    """Validation gets documents of it, and the report is the same as with one worker."""
    words = [f"{number} apples and {number % 7} pears\n\n" for number in range(30_000)]
    (tmp_path / "all.txt").write_text("".join(words))
    tokenizer.save(tmp_path / "t.model")
    shown = []
    for name, workers, size in (("one", 1, 10**9), ("three", 3, 200_000)):
        config = text_config(
            tmp_path / "all.txt",
            data__tokenizer=str(tmp_path / "t.model"),
            data__max_document_bytes=300_000,
            data__shard_tokens=10**9,
            data__part_bytes=size,
            data__workers=workers,
        )
        report = prepare(config, tmp_path / name, log=lambda line: None)[0]
        counts = {split: values["documents"] for split, values in report.splits.items()}
        shown.append((counts, report.files, {key: n for key, (n, _) in report.changed.items()}))
        text = str(report)
    assert shown[0] == shown[1]
    size = (tmp_path / "all.txt").stat().st_size
    counts, files, changed = shown[0]
    assert sum(counts.values()) == -(-size // text_files.STEP) == sum(changed.values())
    assert min(counts.values()) > 0 and files == {"plain text": 1}
    assert "files                    1  plain text" in text
    assert f"{text_files.BLANK_LINE}; the first: {tmp_path}/all.txt at byte 0" in text


def test_shards_of_another_separator_are_refused(tmp_path, corpus, tokenizer):
    tokenizer.save(tmp_path / "t.model")
    config = text_config(corpus, data__tokenizer=str(tmp_path / "t.model"))
    prepare(config, tmp_path / "out", log=lambda line: None)
    other = text_config(corpus, data=config.data, data__separator=r"\n")
    with pytest.raises(UserError, match=r"made with another separator \(was not set, is '\\n'\)"):
        prepare(other, tmp_path / "out", log=lambda line: None)


def test_a_hint_at_a_separator(tmp_path):
    (tmp_path / "stories.txt").write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>\n")
    tally = Tally()
    assert len(list(read_source(str(tmp_path), DataConfig(), tally))) == 1
    (kind,) = tally.files
    assert kind.startswith("plain text with <|endoftext|> in it") and "data.separator" in kind
    tally, config = Tally(), DataConfig(separator=r"\n<|endoftext|>\n")
    assert list(read_source(str(tmp_path), config, tally)) == ["one", "two"]
    assert tally.files == {"plain text": 1} and not tally.skipped
