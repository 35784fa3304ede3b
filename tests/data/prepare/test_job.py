import concurrent.futures
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data.prepare import report as report_lib
from llama_jax.data.prepare import workers
from llama_jax.data.prepare.job import prepare
from llama_jax.data.shards import reader
from llama_jax.data.shards.layout import read_manifest, token_dtype, verify
from llama_jax.data.shards.packing import pack_documents
from llama_jax.data.shards.reader import TokenDataset
from llama_jax.errors import UserError
from tests.helpers import ROOT, replace, text_config, until


def quiet(line):
    """Logs nothing."""


def documents_of(folder, split):
    """Texts of a split, read back through the index."""
    manifest = read_manifest(folder)
    tokenizer = TokenDataset.open(folder, split).tokenizer()
    texts = []
    for shard in manifest["splits"][split]["shards"]:
        tokens = np.fromfile(folder / f"{shard['name']}.bin", "<u2")
        starts = np.fromfile(folder / f"{shard['name']}.idx", "<i8")
        assert len(tokens) == shard["tokens"] and len(starts) == shard["documents"]
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
            ids = tokens[start:stop].tolist()
            assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
            texts.append(tokenizer.decode(ids[1:-1]))
    return texts


def test_shards_hold_every_document_once_in_order(corpus, shards):
    train, validation = documents_of(shards, "train"), documents_of(shards, "validation")
    everything = [path.read_text() for path in sorted(corpus.iterdir())]
    assert len(read_manifest(shards)["splits"]["train"]["shards"]) > 3
    assert sorted(train + validation) == sorted(everything)
    assert [text for text in everything if text in train] == train
    assert 2 <= len(validation) <= 16


def test_the_report(corpus, shards, tmp_path):
    lines = []
    report = prepare(text_config(corpus), tmp_path / "out", log=lines.append)[0]
    assert report.splits["train"]["documents"] == len(documents_of(shards, "train"))
    text = [path.read_text() for path in sorted(corpus.iterdir())]
    assert sum(s["text_bytes"] for s in report.splits.values()) == sum(map(len, text))
    assert any("train" in line and "bytes/token" in line for line in lines)
    assert "training a tokenizer of 300 ids" in lines[0]


def test_the_same_bytes_again(corpus, shards, tmp_path):
    prepare(text_config(corpus), tmp_path / "again", log=quiet)
    for path in shards.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_copies_of_a_document_go_to_the_same_split(tmp_path):
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"text {number % 20} " * 30)
    config = text_config(tmp_path, data__validation_fraction=0.5, model__vocab_size=276)
    prepare(config, tmp_path.parent / "copies", log=quiet)
    train = documents_of(tmp_path.parent / "copies", "train")
    validation = documents_of(tmp_path.parent / "copies", "validation")
    assert not set(train) & set(validation)
    assert len(train) % 3 == len(validation) % 3 == 0 and validation


def test_a_given_tokenizer_is_used(corpus, shards, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.model")
    config = text_config(corpus, data__tokenizer=str(tmp_path / "t.model"))
    prepare(config, tmp_path / "out", log=quiet)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == tokenizer.model_bytes
    with pytest.raises(UserError, match="has 300 ids, but model.vocab_size is 299; raise model"):
        prepare(replace(config, model__vocab_size=299), tmp_path / "other", log=quiet)


def test_large_vocabularies_take_four_bytes():
    assert token_dtype(65_536) == np.dtype("<u2")
    assert token_dtype(65_537) == np.dtype("<u4")


def test_what_is_prepared_already_is_kept(corpus, shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    lines = []
    prepare(text_config(corpus), folder, log=lines.append)
    assert lines == [f"{folder} is prepared already"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data__source", "stdlib"),
        ("data__text_field", "body"),
        ("data__validation_fraction", 0.3),
        ("data__max_document_bytes", 999),
        ("model__vocab_size", 310),
    ],
)
def test_shards_of_other_settings_are_not_touched(corpus, shards, tmp_path, field, value):
    folder = shutil.copytree(shards, tmp_path / "shards")
    with pytest.raises(UserError, match=f"made with another {field.split('__')[1]}"):
        prepare(text_config(corpus, **{field: value}), folder, log=quiet)
    assert verify(folder) == []


def test_a_folder_of_something_else_is_not_touched(corpus, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty and holds no token shards"):
        prepare(text_config(corpus), tmp_path, log=quiet)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_no_usable_text_leaves_nothing_behind(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        prepare(text_config(source), tmp_path / "out", log=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_all_documents_skipped_says_why(tmp_path, tokenizer):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_bytes(b"\xff\xfe")
    (source / "b.txt").write_text(" ")
    tokenizer.save(tmp_path / "t.model")
    config = text_config(source, data__tokenizer=str(tmp_path / "t.model"))
    with pytest.raises(UserError, match=r"no text to train on \(1 invalid UTF-8, 1 empty\)"):
        prepare(config, tmp_path / "out", log=quiet)


def test_a_full_disk_keeps_what_is_done(corpus, shards, tmp_path, monkeypatch):
    config = text_config(corpus, data__part_bytes=1000, data__workers=1)
    prepare(config, tmp_path / "expected", log=quiet)
    write_part, done = workers.write_part, []

    def fills_up(*arguments):
        if len(done) == 3:
            raise OSError(28, "No space left on device")
        done.append(arguments[3])
        return write_part(*arguments)

    monkeypatch.setattr(workers, "write_part", fills_up)
    with pytest.raises(UserError, match="the disk is full.*continues where it"):
        prepare(config, tmp_path / "out", log=quiet)
    with pytest.raises(UserError, match="are unfinished: run the same prepare command again"):
        TokenDataset.open(tmp_path / "out", "train")
    assert done == [0, 1, 2]

    def remember(*arguments):
        done.append(arguments[3])
        return write_part(*arguments)

    monkeypatch.setattr(workers, "write_part", remember)
    lines = []
    prepare(config, tmp_path / "out", log=lines.append)
    assert "3 of" in lines[0] and "parts are done" in lines[0]
    assert done == list(range(len(done)))  # no part twice
    assert_same_folder(tmp_path / "out", tmp_path / "expected")


def test_an_unreadable_file_keeps_what_is_done(corpus, tmp_path, monkeypatch):
    """An error of the file server after days of work must not lose that work."""
    config = text_config(corpus, data__part_bytes=1000, data__workers=1)
    write_part = workers.write_part

    def stumble(*arguments):
        if arguments[3] == 3:
            raise UserError("cannot read 003.txt: Stale file handle")
        return write_part(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(workers, "write_part", stumble)
        with pytest.raises(UserError, match="Stale file handle"):
            prepare(config, tmp_path / "out", log=quiet)
    lines = []
    prepare(config, tmp_path / "out", log=lines.append)
    assert "3 of" in lines[0] and "parts are done" in lines[0]


def assert_same_folder(left, right):
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir())
    for name in names:
        assert (left / name).read_bytes() == (right / name).read_bytes(), name


def test_unfinished_work_of_other_settings_is_not_used(corpus, tmp_path, monkeypatch):
    config = text_config(corpus, data__part_bytes=1000, data__workers=1)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(workers, "write_part", fail)
        with pytest.raises(UserError):
            prepare(config, tmp_path / "out", log=quiet)
    lines = []
    prepare(replace(config, data__validation_fraction=0.5), tmp_path / "out", log=lines.append)
    assert not any("going on" in line for line in lines)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_many_processes_write_the_same_bytes(corpus, tmp_path, packing):
    config = text_config(corpus, data__part_bytes=1000, data__packing=packing)
    prepare(replace(config, data__workers=1), tmp_path / "one", log=quiet)
    prepare(replace(config, data__workers=3), tmp_path / "three", log=quiet)
    assert len(list((tmp_path / "one").glob("train-*-000.bin"))) > 5
    assert_same_folder(tmp_path / "one", tmp_path / "three")


def test_the_size_of_parts_changes_no_token(corpus, shards, tmp_path):
    config = text_config(corpus, data__part_bytes=1000)
    prepare(config, tmp_path / "parts", log=quiet)
    assert documents_of(tmp_path / "parts", "train") == documents_of(shards, "train")
    assert documents_of(tmp_path / "parts", "validation") == documents_of(shards, "validation")


@pytest.mark.beam
def test_beam_writes_the_same_bytes(corpus, tmp_path):
    config = text_config(corpus, data__part_bytes=1000)
    prepare(config, tmp_path / "here", log=quiet)
    prepare(config, tmp_path / "beam", beam_options="--runner=DirectRunner", log=quiet)
    assert_same_folder(tmp_path / "here", tmp_path / "beam")


def test_beam_that_is_not_installed(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install 'llama_jax\[beam\]'"):
        prepare(text_config(corpus), tmp_path / "out", beam_options="", log=quiet)


def test_skips_are_reported_with_the_place_of_the_first(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    good = json.dumps({"text": "some words to learn from " * 20})
    (source / "a.jsonl").write_text(f'{good}\n{{"text": "x\n{{broken\n{good}\n')
    report = prepare(
        text_config(
            source,
            model__vocab_size=276,
            data__validation_fraction=0.0,
            data__part_bytes=len(good) + 5,  # one broken line in each of two parts
            data__workers=1,
        ),
        tmp_path / "out",
        log=quiet,
    )[0]
    assert report.skipped == {"broken JSON line": [2, f"{source}/a.jsonl at byte {len(good) + 1}"]}
    assert f"2  broken JSON line; the first: {source}/a.jsonl" in str(report)


def test_named_sources_get_a_folder_each_and_share_a_tokenizer(corpus, tmp_path):
    first = f"a={corpus}/00*.txt; b={corpus}/01*.txt,{corpus}/02*.txt"
    lines = []
    reports = prepare(text_config(first), tmp_path / "out", log=lines.append)
    a, b = (TokenDataset.open(tmp_path / "out" / name, "train") for name in "ab")
    assert a.tokenizer_sha256 == b.tokenizer_sha256 and a.fingerprint != b.fingerprint
    assert [sum(s["documents"] for s in r.splits.values()) for r in reports] == [10, 20]
    assert sum("training a tokenizer" in line for line in lines) == 1
    assert any(line.startswith("b ") and "% of all" in line for line in lines)
    # A source that is added later uses the tokenizer of the others.
    later = prepare(text_config(f"{first}; c={corpus}/03*.txt"), tmp_path / "out", log=quiet)
    c = TokenDataset.open(tmp_path / "out" / "c", "train")
    assert c.tokenizer_sha256 == a.tokenizer_sha256 and len(later) == 3


def test_a_misspelt_glob_costs_no_work_on_the_other_sources(corpus, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.model")
    source = f"a={corpus}/00*.txt; b={tmp_path}/no*.txt"
    config = text_config(source, data__tokenizer=str(tmp_path / "t.model"))
    with pytest.raises(UserError, match="no\\*.txt matches no file"):
        prepare(config, tmp_path / "out", log=quiet)
    assert not (tmp_path / "out").exists()


def test_shares_of_an_unknown_source_are_refused_before_any_work(corpus, tmp_path):
    source = f"a={corpus}/00*.txt; b={corpus}/01*.txt"
    for mixture, message in (("a=0.5,d=0.5", "names d, but the sources are a, b"), ("a=2", "sum")):
        with pytest.raises(UserError, match=message):
            prepare(text_config(source, data__mixture=mixture), tmp_path / "out", log=quiet)
    assert list(tmp_path.iterdir()) == []
    prepare(text_config(source, data__mixture="a=1"), tmp_path / "out", log=quiet)  # b gets none


@pytest.mark.parametrize("terminal", [False, True])
def test_the_progress_says_how_fast_and_how_long(monkeypatch, capsys, terminal):
    now = iter([100.0, 100.1, 180.0, 180.2])
    monkeypatch.setattr(report_lib.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    bar = report_lib.Progress(400_000_000)
    bar.add(10_000_000, 3_000_000)  # too early for an estimate
    assert capsys.readouterr().err == ""
    bar.add(70_000_000, 17_000_000)
    shown = capsys.readouterr().err
    assert shown.strip() == "20.0%  80 of 400 MB  1.0 MB/s  250,000 tokens/s  ETA 5m20s"
    assert shown.startswith("\r") == terminal != shown.endswith("\n")
    bar.add(1, 1)
    assert capsys.readouterr().err == ""
    bar.close()
    assert capsys.readouterr().err == ("\r" + " " * 90 + "\r" if terminal else "")


KILLED = """
import sys, time
from llama_jax.data.prepare import job
from tests.helpers import text_config
corpus, output = sys.argv[1:]
if __name__ == "__main__":
    config = text_config(corpus, data__part_bytes=1000, data__workers=2)
    job.merge_reports = lambda *_: time.sleep(3600)  # it is killed before that
    job.prepare(config, output)
"""


def test_killed_and_started_again(corpus, tmp_path):
    """After SIGKILL, the next call keeps the finished parts, and the shards have the same bytes."""
    command = [sys.executable, "-c", KILLED, str(corpus), str(tmp_path / "out")]
    out = tmp_path / "out"
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    until(lambda: list(out.glob("part-*.json")))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    done = {path: path.stat().st_mtime_ns for path in out.glob("part-*.json")}
    shards = {path.name: path.stat().st_mtime_ns for path in out.glob("*-00000-*.bin")}
    config = text_config(corpus, data__part_bytes=1000, data__workers=1)
    lines = []
    prepare(config, out, log=lines.append)
    assert f"{len(done)} of" in lines[0]
    if out / "part-00000.json" in done:
        for name, modified in shards.items():
            assert (out / name).stat().st_mtime_ns == modified
    prepare(config, tmp_path / "expected", log=quiet)
    assert_same_folder(out, tmp_path / "expected")


@settings(deadline=None)
@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=60), seq_len=st.integers(1, 20))
def test_packing_loses_and_repeats_nothing(lengths, seq_len):
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    flat, count = pack_documents(starts.tolist(), sum(lengths), seq_len)
    n_pieces = int(flat[count])
    first, inputs = flat[count + 1 :][:n_pieces], flat[count + 1 + n_pieces :]
    assert len(inputs) == n_pieces and flat[0] == 0
    used = []
    for sequence in range(count):
        pieces = range(int(flat[sequence]), int(flat[sequence + 1]))
        assert 0 < sum(int(inputs[p]) for p in pieces) <= seq_len
        for p in pieces:
            document = np.searchsorted(starts, first[p], side="right") - 1
            end = starts[document] + lengths[document]
            assert first[p] + inputs[p] < end  # the last target is in the document
            if lengths[document] - 1 <= seq_len:
                assert inputs[p] == lengths[document] - 1  # not cut
            used += range(int(first[p]), int(first[p] + inputs[p]))
    expected = [t for s, n in zip(starts, lengths, strict=True) for t in range(s, s + n - 1)]
    assert sorted(used) == expected


def test_packing_pads_little():
    rng = np.random.default_rng(0)
    lengths = rng.geometric(1 / 400, 5000) + 1
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    _, count = pack_documents(starts.tolist(), int(lengths.sum()), 2048)
    padding = 1 - (lengths - 1).sum() / (count * 2048)
    assert padding < 0.002


def test_the_padding_is_reported(corpus, tmp_path):
    config = text_config(corpus, data__packing="best_fit", train__seq_len=64)
    report = prepare(config, tmp_path / "out", log=quiet)[0]
    train = report.splits["train"]
    used = train["tokens"] - train["documents"]
    assert f"{1 - used / (train['sequences'] * 64):.2%}" in str(report)
    dataset = TokenDataset.open(tmp_path / "out", "train")
    assert sum(len(c) for s in range(dataset.n_sequences) for _, c in dataset.pieces(s)) == used


def test_a_damaged_pack_file(corpus, tmp_path):
    config = text_config(corpus, data__packing="best_fit", data__shard_tokens=10**9)
    prepare(config, tmp_path / "out", log=quiet)
    path = tmp_path / "out" / "train-00000-000.pack"
    dataset = TokenDataset.open(tmp_path / "out", "train")
    path.write_bytes(path.read_bytes()[:-8])
    assert verify(tmp_path / "out") == ["train-00000-000.pack"]
    with pytest.raises(UserError, match="pack is inconsistent: it is damaged"):
        dataset.pieces(0)
    with pytest.raises(UserError, match="pack is not the file in the manifest"):
        TokenDataset.open(tmp_path / "out", "train")
    path.unlink()
    with pytest.raises(UserError, match="pack is missing"):
        TokenDataset.open(tmp_path / "out", "train")


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_files_are_read_by_ranges(shards, monkeypatch, scheme):
    """Reads from disk, and as from an object store, whose paths only `epath` can open."""
    from etils import epath

    path = shards / "train-00000-000.bin"
    expected = np.fromfile(path, "<u2")
    local = epath.Path(path)
    monkeypatch.setattr(reader.epath, "Path", lambda name: local)
    array = reader._FileArray(scheme + str(path), "<u2")
    assert array._local == (not scheme)
    assert len(array) == len(expected)
    np.testing.assert_array_equal(array[5:50], expected[5:50])
    np.testing.assert_array_equal(array[len(expected) - 3 : len(expected) + 9], expected[-3:])
    assert array[7] == expected[7] and len(array[9:3]) == 0


def test_threads_share_a_file_of_an_object_store(shards, monkeypatch):
    """Several threads make batches; each must get the range that it requested."""
    from etils import epath

    path = shards / "train-00000-000.bin"
    expected, local = np.fromfile(path, "<u2"), epath.Path(path)
    monkeypatch.setattr(reader.epath, "Path", lambda name: local)
    array = reader._FileArray(f"memory://{path}", "<u2")
    file = array._file

    class Slow:
        def seek(self, offset):
            file.seek(offset)
            time.sleep(0.01)  # lets another thread run

        def read(self, size):
            return file.read(size)

    array._file = Slow()
    starts = range(0, 200, 10)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda start: array[start : start + 10], starts))
    np.testing.assert_array_equal(np.concatenate(found), expected[:200])


def test_verify_names_what_changed(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    assert verify(folder) == []
    path = folder / "train-00000-001.bin"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    (folder / "train-00000-000.idx").unlink()
    assert verify(folder) == ["train-00000-000.idx", "train-00000-001.bin"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "train-00000-001.bin").unlink(), "train-00000-001.bin is missing"),
        (
            lambda f: (f / "train-00000-000.bin").write_bytes(b"\0\0"),
            "train-00000-000.bin has 2 bytes, the manifest says",
        ),
        (lambda f: (f / "train-00000-000.idx").write_bytes(b""), "train-00000-000.idx has 0 bytes"),
        (lambda f: (f / "manifest.json").write_text("{"), "cannot read .*manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{}"), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").unlink(), "no token shards in"),
        (lambda f: (f / "tokenizer.model").write_bytes(b"other"), "not the tokenizer that made"),
        (lambda f: (f / "tokenizer.model").unlink(), "not the tokenizer that made"),
    ],
)
def test_damage_is_found_when_opening(shards, tmp_path, damage, message):
    folder = shutil.copytree(shards, tmp_path / "shards")
    damage(folder)
    with pytest.raises(UserError, match=message):
        TokenDataset.open(folder, "train")


def test_a_manifest_may_not_name_files_elsewhere(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["name"] = "../../secret"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="outside its folder"):
        TokenDataset.open(folder, "train")


def test_shards_of_a_newer_format_are_refused(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["format_version"] = 99
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="has format 99"):
        TokenDataset.open(folder, "train")


def test_reading_crosses_shard_borders(shards):
    dataset = TokenDataset.open(shards, "train")
    names = [shard["name"] for shard in read_manifest(shards)["splits"]["train"]["shards"]]
    whole = np.concatenate([np.fromfile(shards / f"{name}.bin", "<u2") for name in names])
    assert dataset.n_tokens == len(whole)
    rng = np.random.default_rng(0)
    for start, stop in rng.integers(0, len(whole) + 50, (50, 2)):
        np.testing.assert_array_equal(dataset.tokens(start, stop), whole[start:stop])


def test_a_token_beyond_the_vocabulary_is_damage(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    path = folder / "train-00000-000.bin"
    dataset = TokenDataset.open(folder, "train")
    tokens = np.fromfile(path, "<u2")
    tokens[5] = 300
    tokens.tofile(path)
    with pytest.raises(
        UserError, match=r"train-00000-000.bin holds ids beyond the vocabulary of 300"
    ):
        dataset.tokens(0, 20)


def test_the_fingerprint_is_of_the_tokens(shards, corpus, tmp_path):
    first = TokenDataset.open(shards, "train").fingerprint
    prepare(text_config(corpus), tmp_path / "same", log=quiet)
    assert TokenDataset.open(tmp_path / "same", "train").fingerprint == first
    one_letter = shutil.copytree(corpus, tmp_path / "corpus")
    text = (one_letter / "007.txt").read_text()
    (one_letter / "007.txt").write_text(text[:-2] + "z\n")
    same_tokenizer = text_config(one_letter, data__tokenizer=str(shards / "tokenizer.model"))
    prepare(same_tokenizer, tmp_path / "letter", log=quiet)
    assert TokenDataset.open(tmp_path / "letter", "train").fingerprint != first
    prepare(text_config(corpus, data__validation_fraction=0.5), tmp_path / "split", log=quiet)
    assert TokenDataset.open(tmp_path / "split", "train").fingerprint != first
