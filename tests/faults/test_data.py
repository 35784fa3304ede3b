"""Damaged token shards and damaged text, as docs/reliability.md promises."""

import collections
import errno
import gzip
import json
import os
import random
import shutil

import jax
import numpy as np
import pytest

from llama_jax.config import DataConfig
from llama_jax.data.prepare.job import prepare
from llama_jax.data.shards.layout import SPLITS, verify
from llama_jax.data.shards.reader import TokenDataset
from llama_jax.data.shards.writer import ShardWriter
from llama_jax.data.sources.part import Example
from llama_jax.errors import UserError
from llama_jax.train import loop
from llama_jax.train.run import train
from tests.faults.test_damage import cut, delete, empty, zero
from tests.helpers import flip_bit, one_line_error, start_train, text_config, until, write_manifest

pytestmark = pytest.mark.usefixtures("shared_steps")

# The run saves at 2, 4, ..; the fault begins when batch 6 was handed out.
STEPS, FAULT = 12, 6
KINDS = ("bin", "idx", "pack", "mask")
FLIPS = 100


def config_on(shards):
    """Returns the config of a short run on prepared shards."""
    changes = {"train__steps": STEPS, "train__checkpoint_every": 2, "train__eval_every": 100}
    return text_config("elsewhere", data__path=str(shards), data__source="stdlib", **changes)


def disk_fault(monkeypatch):
    """Makes every later read from a file fail with an input/output error."""

    def fails(file, size, offset):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fails)


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """Returns the last state of a run without a fault."""
    return jax.device_get(train(config_on(shards), tmp_path_factory.mktemp("twin") / "run"))


@pytest.mark.parametrize("fault", ["cut", pytest.param("EIO", marks=pytest.mark.slow)])
def test_a_shard_is_lost_in_the_middle_of_a_run(shards, undisturbed, tmp_path, monkeypatch, fault):
    """The file is named; once it is repaired, the same command ends like an undisturbed run."""
    folder = shutil.copytree(shards, tmp_path / "shards")
    stream = loop.device_batches

    def disturbed(source, start, *rest):
        for number, batch in enumerate(stream(source, start, *rest), start + 1):
            if number == FAULT and fault == "cut":
                for path in folder.glob("train-*.bin"):
                    cut(path)
            elif number == FAULT:
                disk_fault(patch)
            yield batch

    message = "ends early" if fault == "cut" else "Input/output error; once it can be read again"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "device_batches", disturbed)
        with pytest.raises(UserError, match=rf"train-00000-00\d.bin.*{message}"):
            train(config_on(folder), tmp_path / "run")
    for path in shards.iterdir():
        shutil.copy2(path, folder)
    state = jax.device_get(train(config_on(folder), tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, state, undisturbed)


@pytest.mark.slow
def test_the_command_ends_with_one_line(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    workdir = tmp_path / "run"
    flags = (f"--config.data.path={folder}", "--config.train.steps=100000")
    process = start_train("stdlib", workdir, *flags, devices=1)[0]
    log = workdir / "metrics.jsonl"
    until(lambda: log.exists() and log.stat().st_size)
    for path in folder.glob("train-*.bin"):
        cut(path)
    process.stdout, process.stderr = process.communicate(timeout=600)
    assert "train-00000-00" in (line := one_line_error(process)) and "ends early" in line


@pytest.fixture(scope="module")
def packed(corpus, tokenizer, tmp_path_factory):
    """Writes shards with all kinds of files: packed conversations, with masks and a template."""
    folder = tmp_path_factory.mktemp("packed")
    tokenizer.save(folder / "t.model")
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    records = [{"instruction": f"what is {n}?", "output": text} for n, text in enumerate(texts)]
    (folder / "x.json").write_text(json.dumps(records))
    data = DataConfig(
        source=str(folder / "x.json"),
        tokenizer=str(folder / "t.model"),
        template="alpaca",
        packing="best_fit",
        shard_tokens=3000,
        validation_fraction=0.2,
    )
    config = text_config(corpus, data=data, train__seq_len=512)
    prepare(config, folder / "shards", log=lambda line: None)
    return folder / "shards"


@pytest.fixture(scope="module")
def equals(tokenizer, tmp_path_factory):
    """Writes two shards whose files have equal sizes and different contents."""
    folder, rng = tmp_path_factory.mktemp("equals"), np.random.default_rng(0)
    writer = ShardWriter(folder, "train-00000", tokenizer.vocab_size, 20_000, 1000)
    for lengths in ((900, 800) * 12, (800, 900) * 12):
        for length in lengths[:24]:
            ids = rng.integers(3, tokenizer.vocab_size, length, dtype=np.int32)
            writer.add(Example(ids, 1, b"", rng.integers(0, 2, length)))
    write_manifest(folder, tokenizer, 1000, train=writer.finish())
    return folder


@pytest.mark.parametrize("kinds", [("bin",), ("idx",), ("pack",), ("mask",), KINDS])
def test_swapped_files_of_equal_size_are_refused_at_the_start(equals, tmp_path, kinds):
    folder = shutil.copytree(equals, tmp_path / "shards")
    TokenDataset.open(folder, "train")
    for kind in kinds:
        first, second = (folder / f"train-00000-00{n}.{kind}" for n in range(2))
        data = first.read_bytes(), second.read_bytes()
        assert len(data[0]) == len(data[1]) and data[0] != data[1]
        second.write_bytes(data[0])
        first.write_bytes(data[1])
    name = f"train-00000-000.{kinds[0]}"
    with pytest.raises(UserError, match=f"{name} is not the file in the manifest"):
        TokenDataset.open(folder, "train")


def test_shards_of_a_version_before_are_refused(equals, tmp_path):
    folder = shutil.copytree(equals, tmp_path / "shards")
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["splits"]["train"]["shards"]:
        del shard["ends_sha256"]
    del manifest["sha256"]
    manifest["format_version"] = 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="has format 1, this version reads 2; prepare the data"):
        TokenDataset.open(folder, "train")


def damaged(folder, path):
    """Returns whether `verify` names this file, and no other."""
    try:
        return verify(folder) == [path.name]
    except UserError as error:
        told = path.name in str(error) or "no token shards in" in str(error)
        return path.name == "manifest.json" and told


@pytest.mark.parametrize("name", ["shards", "packed"])
def test_flipped_bits(name, request, tmp_path):
    """Random bits of random files are flipped: `verify` notices each, and names the file."""
    folder = shutil.copytree(request.getfixturevalue(name), tmp_path / "shards")
    files, choose = sorted(path for path in folder.iterdir()), random.Random(15)
    found = collections.Counter()
    for _ in range(FLIPS):
        path = choose.choice(files)
        position = choose.randrange(8 * path.stat().st_size)
        flip_bit(path, position)
        found[damaged(folder, path)] += 1
        flip_bit(path, position)
    kinds = sorted({path.suffix for path in files})
    print(f"flipped bits found: {found[True]} of {FLIPS}, over {len(files)} files, {kinds}")
    assert found == {True: FLIPS}
    assert verify(folder) == []


@pytest.mark.parametrize("harm", [cut, empty, zero, delete])
def test_every_file_cut_emptied_zeroed_or_deleted(packed, tmp_path, harm):
    """`verify` notices each, and so does opening the shards."""
    folder = shutil.copytree(packed, tmp_path / "shards")
    files = sorted(path for path in folder.iterdir())
    assert len({path.suffix for path in files}) == 6
    missed, unseen = [], []
    for path in files:
        good = path.read_bytes()
        harm(path)
        if not damaged(folder, path):
            missed.append(path.name)
        try:
            for split in SPLITS:
                TokenDataset.open(folder, split)
            unseen.append(path.name)
        except UserError as error:
            assert path.name in str(error) or path.name == "manifest.json"
        path.write_bytes(good)
    assert missed == [] and unseen == []


GOOD = "some words to learn from " * 20
BAD_LINES = {
    "invalid UTF-8": [b'{"text": "caf\xe9"}', rb'{"text": "half \ud800 pair"}', b"\0" * 8],
    "empty": [b'{"text": ""}', b'{"text": " \\n "}'],
    "longer than 1,000,000 bytes": [b'{"text": "' + b"x" * n + b'"}' for n in (5_000_000, 10**8)],
    "broken JSON line": [
        b'{"text": "x',
        b'{"text": "x"} {}',
        b'{"text": "x", "id": ' + b"1" * 5000 + b"}",
        b'{"text": "x", "id": ' + b"[" * 99_999 + b"]" * 99_999 + b"}",
    ],
    "no text in field 'text'": [b"{}", b'{"text": null}', b'"x"'],
}
KEPT_LINES = [b'{"text": "a zero \\u0000 in it"}', b'{"text": "\xef\xbf\xbd and \xf0\x9f\xa6\x99"}']


def test_bad_text_is_counted_by_kind_and_ends_nothing(tmp_path, tokenizer):
    source = tmp_path / "text"
    source.mkdir()
    tokenizer.save(tmp_path / "t.model")
    good = json.dumps({"text": GOOD}).encode()
    lines = [line for bad in BAD_LINES.values() for line in bad]
    with (source / "a.jsonl").open("wb") as file:
        file.writelines(piece + b"\n" for line in [*lines, *KEPT_LINES] for piece in (good, line))
    (source / "b.txt").write_bytes(b"caf\xe9")
    (source / "c.txt").write_bytes(b"\0")
    (source / "d.txt").write_bytes(b"")
    (source / "e.txt.gz").write_bytes(gzip.compress(GOOD.encode())[:-9])
    config = text_config(
        source,
        data__tokenizer=str(tmp_path / "t.model"),
        data__validation_fraction=0.0,
        data__max_document_bytes=1_000_000,
        data__part_bytes=10_000_000,
        data__workers=1,
    )
    report = prepare(config, tmp_path / "out", log=lambda line: None)[0]
    expected = {reason: len(bad) for reason, bad in BAD_LINES.items()}
    expected["invalid UTF-8"] += 1
    expected["empty"] += 1
    expected["damaged compressed file"] = 1
    counts = {reason: count for reason, (count, _) in report.skipped.items()}
    print(f"{counts} of {sum(counts.values()) + report.splits['train']['documents']} documents")
    assert counts == expected
    dataset = TokenDataset.open(tmp_path / "out", "train")
    found = [tokenizer.decode(ids[1:-1].tolist()) for ids in dataset.documents()]
    others = [json.loads(line)["text"] for line in KEPT_LINES]
    assert sorted(found) == sorted([GOOD] * (len(lines) + 2) + others + ["\0"])
