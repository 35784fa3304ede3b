"""A flipped bit in a folder of shards is noticed before it is used, or it is never read."""

import json
import os
import random
import shutil
import types

import numpy as np
import pytest

from llama_jax.data.batches import Batches, ValidationBatches
from llama_jax.data.shards import reader as shards_lib
from llama_jax.data.shards.block_checksums import BLOCK_BYTES
from llama_jax.data.shards.layout import SPLITS, encode_manifest, read_manifest, verify
from llama_jax.data.shards.reader import TokenDataset
from llama_jax.data.shards.writer import ShardWriter
from llama_jax.data.show import summary
from llama_jax.data.sources.part import Example
from llama_jax.data.training_data import open_data
from llama_jax.errors import UserError
from llama_jax.inference.perplexity import read_shards
from llama_jax.train.overview import unchecked
from tests.helpers import (
    TINY_FLAGS,
    flip_bit,
    one_line_error,
    run_command,
    text_config,
    write_manifest,
)

T, BATCH = 2048, 4
KINDS = ("concat", "best_fit", "template")
FLIPS = 60  # per kind of shards


def write(folder, tokenizer, kind, seed=0):
    """Writes shards of random documents; their files have several blocks."""
    folder.mkdir()
    pack_len, rng = 0 if kind == "concat" else T, np.random.default_rng(seed)
    splits = {}
    for split, documents in (("train", 140), ("validation", 30)):
        writer = ShardWriter(folder, f"{split}-00000", tokenizer.vocab_size, 120_000, pack_len)
        for length in rng.integers(200, 3000, documents):
            ids = rng.integers(3, tokenizer.vocab_size, length, dtype=np.int32)
            counts = rng.integers(0, 2, length) if kind == "template" else None
            writer.add(Example(ids, 1, b"", counts))
        splits[split] = writer.finish()
    write_manifest(folder, tokenizer, pack_len, **splits)
    return folder


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("bits")
    return {kind: write(root / kind, tokenizer, kind) for kind in KINDS}


def as_of_an_earlier_version(folder):
    """Removes the checksums of blocks."""
    manifest = read_manifest(folder)
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            (folder / f"{shard['name']}.crc.json").unlink()
            del shard["crc_sha256"]
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))
    return folder


def read_everything(folder):
    """Returns all rows of an epoch, all rows of validation and all documents."""
    found = []
    for split in SPLITS:
        dataset = TokenDataset.open(folder, split)
        if split == "train":
            batches = Batches({"": dataset}, T, BATCH, 0)
        else:
            batches = ValidationBatches({"": dataset}, T, BATCH)
        steps = -(-batches.n_sequences // BATCH)
        found += [batches.rows(step, range(BATCH)) for step in range(steps)]
        found += list(dataset.documents())
    return found


def assert_equal(found, expected):
    """Compares the results of `read_everything` for two folders."""
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, other)
        else:
            assert one.keys() == other.keys()
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_is_found_before_it_is_used(folders, tmp_path, kind):
    folder = shutil.copytree(folders[kind], tmp_path / "shards")
    files = sorted(folder.iterdir())
    assert (folder / "train-00000-001.bin").stat().st_size > 2 * BLOCK_BYTES
    choose, missed = random.Random(19), []
    for number in range(FLIPS):
        path = files[number % len(files)]
        position = choose.randrange(8 * path.stat().st_size)
        flip_bit(path, position)
        try:
            read_everything(folder)
            missed.append((path.name, position))
        except UserError as error:
            text = str(error)
            assert path.name in text or path.name == "manifest.json", (path.name, text)
            assert "--verify" in text or "prepare the data again" in text, text
        flip_bit(path, position)
    print(f"{kind}: found {FLIPS - len(missed)} of {FLIPS} flipped bits, over {len(files)} files")
    assert missed == []
    read_everything(folder)


@pytest.mark.parametrize("file", ["bin", "mask"])
def test_a_block_that_was_damaged_is_read_again_when_it_is_mended(folders, tmp_path, file):
    folder = shutil.copytree(folders["template"], tmp_path / "shards")
    dataset = TokenDataset.open(folder, "train")
    path = folder / f"train-00000-000.{file}"
    position = 8 * (path.stat().st_size // 2)
    sequences = range(dataset.n_sequences // 2)
    flip_bit(path, position)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{path.name} is not as it was written, from byte"):
            for sequence in sequences:
                dataset.pieces(sequence)
    flip_bit(path, position)
    expected = TokenDataset.open(folders["template"], "train")
    for sequence in sequences:
        for found, right in zip(dataset.pieces(sequence), expected.pieces(sequence), strict=True):
            np.testing.assert_array_equal(found[0], right[0])
            np.testing.assert_array_equal(found[1], right[1])


def test_a_block_is_read_once_to_be_checked(folders, monkeypatch):
    """After the check of a block, only the requested bytes are read."""
    dataset, read, pread = TokenDataset.open(folders["concat"], "train"), [], os.pread

    def recorded(file, size, offset):
        read.append((offset, size))
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", recorded)
    whole = np.fromfile(folders["concat"] / "train-00000-000.bin", "<u2")
    block = BLOCK_BYTES
    for start in (40_000, 40_000, 32_768, 32_700):  # in tokens of 2 bytes
        np.testing.assert_array_equal(dataset.tokens(start, start + 100), whole[start:][:100])
    assert read == [
        (block, block),
        (80_000, 200),
        (65_536, 200),
        (0, 2 * block),  # The first block is new; the second one is read in the same call.
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_shards_of_an_earlier_version_give_the_same_rows(folders, tmp_path, kind):
    earlier = as_of_an_earlier_version(shutil.copytree(folders[kind], tmp_path / "shards"))
    assert_equal(read_everything(earlier), read_everything(folders[kind]))
    assert verify(earlier) == []
    new, old = (TokenDataset.open(folder, "train") for folder in (folders[kind], earlier))
    assert new.fingerprint == old.fingerprint  # a run goes on with shards that are made again
    assert (new.unchecked, old.unchecked) == (False, True)


@pytest.mark.parametrize("file", ["pack", "idx"])
def test_what_earlier_versions_hashed_is_found_in_their_shards_too(folders, tmp_path, file):
    folder = as_of_an_earlier_version(shutil.copytree(folders["best_fit"], tmp_path / "shards"))
    path = folder / f"train-00000-000.{file}"
    flip_bit(path, 4 * path.stat().st_size)
    with pytest.raises(UserError, match=path.name):
        read_everything(folder)


def test_a_run_says_once_which_shards_it_cannot_check(shards, tmp_path):
    folder = as_of_an_earlier_version(shutil.copytree(shards, tmp_path / "shards"))
    flags = (f"--config.data.path={folder}", "--config.train.steps=4", f"--workdir={tmp_path}/run")
    done = run_command("train", *TINY_FLAGS, "--config.train.eval_every=100", *flags)
    lines = [line for line in done.stdout.splitlines() if "earlier version" in line]
    assert done.returncode == 0 and len(lines) == 1 and lines[0].startswith("warning ")
    assert f"llama_jax.prepare --verify={folder}" in lines[0]
    config = text_config("elsewhere", data__path=str(shards))
    assert unchecked(open_data(config, tmp_path)) == []


def test_evaluate_says_it_too(shards, tmp_path, capsys):
    folder = as_of_an_earlier_version(shutil.copytree(shards, tmp_path / "shards"))
    model = types.SimpleNamespace(tokenizer=TokenDataset.open(shards, "train").tokenizer())
    for where, said in ((shards, 0), (folder, 1)):
        read_shards(str(where), "validation", model)
        assert capsys.readouterr().err.count("warning: an earlier version wrote shards") == said


def test_checksums_of_other_shards_are_refused_at_the_start(folders, tmp_path):
    folder = shutil.copytree(folders["concat"], tmp_path / "shards")
    first, second = (folder / f"train-00000-00{n}.crc.json" for n in range(2))
    good = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match=r"000.crc.json is not the file in the manifest"):
        TokenDataset.open(folder, "train")
    first.unlink()
    with pytest.raises(UserError, match=r"000.crc.json is missing; the manifest lists it"):
        TokenDataset.open(folder, "train")
    assert verify(folder) == [first.name]
    first.write_bytes(good)
    dataset = TokenDataset.open(folder, "train")
    flip_bit(first, 300)
    with pytest.raises(UserError, match=r"000.crc.json is not as it was written.*--verify"):
        dataset.tokens(0, 10)
    first.unlink()
    with pytest.raises(UserError, match=r"cannot read .*000.crc.json: No such file"):
        dataset.tokens(0, 10)
    first.write_bytes(good)
    assert len(dataset.tokens(0, 10)) == 10


def test_a_look_at_the_lengths_checks_the_index(folders, tmp_path):
    folder = shutil.copytree(folders["concat"], tmp_path / "shards")
    path, manifest = folder / "train-00000-000.idx", read_manifest(folder)
    flip_bit(path, 8 * (8 * 30))  # document 30 begins a token earlier or later
    with pytest.raises(UserError, match=rf"{path.name} is damaged; check with .*--verify"):
        summary.document_lengths(folder, manifest)


@pytest.mark.parametrize("file", ["train-00000-001.bin", "train-00000-000.crc.json"])
def test_the_command_names_the_file(folders, tmp_path, file):
    folder = shutil.copytree(folders["concat"], tmp_path / "shards")
    flip_bit(folder / file, 8 * 50_000 if file.endswith("bin") else 200)
    line = one_line_error(run_command("data", f"--show={folder}", "--rows=2000"))
    assert f"{folder}/{file}" in line
    line = one_line_error(run_command("prepare", f"--verify={folder}"))
    assert f"damaged or missing: {folder}/{file}" in line


@pytest.mark.parametrize("remade", ["moved", "deleted", "written over"])
def test_shards_made_anew_at_the_same_path_are_read(tokenizer, tmp_path, remade):
    """They are read in the same process, in which files of the old shards may still be open."""
    folder = write(tmp_path / "shards", tokenizer, "template", seed=1)
    before = TokenDataset.open(folder, "train")
    expected = before.tokens(0, 1000)
    read_everything(folder)
    new = write(tmp_path / "new", tokenizer, "template", seed=2)
    if remade == "moved":
        folder.rename(tmp_path / "old")
    elif remade == "deleted":
        shutil.rmtree(folder)
    if remade == "written over":
        for path in new.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        for path in folder.iterdir():
            if not (new / path.name).exists():
                path.unlink()
    else:
        shutil.copytree(new, folder)
    assert_equal(read_everything(folder), read_everything(new))
    if remade != "written over":  # files that were open then still give their old tokens
        np.testing.assert_array_equal(before.tokens(0, 1000), expected)


def test_a_file_that_is_opened_again_is_checked_again(tokenizer, tmp_path):
    """The least recently used files are closed; later, other files may have their paths."""
    folder = write(tmp_path / "shards", tokenizer, "concat", seed=1)
    dataset = TokenDataset.open(folder, "train")
    expected = dataset.tokens(0, 1000)
    shards_lib._kept_open.cache_clear()
    np.testing.assert_array_equal(dataset.tokens(0, 1000), expected)
    folder.rename(tmp_path / "old")
    write(folder, tokenizer, "concat", seed=2)
    shards_lib._kept_open.cache_clear()
    for _ in range(2):
        with pytest.raises(UserError, match=r"train-00000-000\S* is not as it was .*was replaced"):
            dataset.tokens(0, 1000)
    # Identical files, for example a copy that is put back, are accepted.
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "old", folder)
    shards_lib._kept_open.cache_clear()
    np.testing.assert_array_equal(dataset.tokens(0, 1000), expected)


def test_the_number_of_open_files_is_bounded(folders, tmp_path):
    """Datasets that are opened one after another do not use up the open files of a process."""
    before = len(os.listdir("/proc/self/fd"))
    datasets = [TokenDataset.open(folders["template"], split) for split in SPLITS * 150]
    for dataset in datasets:
        list(dataset.documents())
        dataset.pieces(0)
    assert len(os.listdir("/proc/self/fd")) - before <= 256


def test_the_manifest_of_a_packed_folder_is_json(folders):
    """A reader in another language needs to know only this: eight digits for each block."""
    folder = folders["template"]
    described = json.loads((folder / "train-00000-000.crc.json").read_text())
    assert described.keys() == {"block_bytes", "bin", "mask"}
    for kind in ("bin", "mask"):
        blocks = -(-(folder / f"train-00000-000.{kind}").stat().st_size // BLOCK_BYTES)
        assert len(described[kind]) == 8 * blocks


def test_other_things_in_the_folder_do_not_matter(folders, tmp_path):
    folder = shutil.copytree(folders["concat"], tmp_path / "shards")
    (folder / "a link").symlink_to(tmp_path / "nothing")
    (folder / "a folder").mkdir()
    assert len(TokenDataset.open(folder, "train").tokens(0, 9)) == 9 and verify(folder) == []
    path = folder / "train-00000-000.bin"
    path.unlink()
    path.symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=f"{path.name} is missing"):
        TokenDataset.open(folder, "train")


@pytest.mark.parametrize("bad", [-1, 300, 65_536, 2**31 - 1])
def test_no_shard_is_written_with_ids_beyond_the_vocabulary(tmp_path, bad):
    """Readers do not check that ids are in the vocabulary."""
    writer = ShardWriter(tmp_path, "train-00000", 300, 1000, 0)
    writer.add(Example(np.array([0, 299], np.int32), 1, b""))
    with pytest.raises(ValueError, match=f"{bad}.* of 300"):
        writer.add(Example(np.array([3, bad], np.int32), 1, b""))
