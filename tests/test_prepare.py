import json
import shutil

import numpy as np
import pytest

from llama_jax.data import prepare as prepare_lib
from llama_jax.data import shards as shards_lib
from llama_jax.data.prepare import prepare
from llama_jax.data.shards import TokenDataset, read_manifest, verify
from llama_jax.errors import UserError
from tests.helpers import replace, text_config


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
    report = prepare(text_config(corpus), tmp_path / "out", log=lines.append)
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
    with pytest.raises(UserError, match="has 300 ids, but model.vocab_size is 301"):
        prepare(replace(config, model__vocab_size=301), tmp_path / "other", log=quiet)


def test_large_vocabularies_take_four_bytes():
    assert shards_lib.token_dtype(65_536) == np.dtype("<u2")
    assert shards_lib.token_dtype(65_537) == np.dtype("<u4")


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


def test_a_full_disk_leaves_nothing_behind(corpus, tmp_path, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_lib.shards.ShardWriter, "_close_shard", full)
    with pytest.raises(UserError, match="the disk is full"):
        prepare(text_config(corpus), tmp_path / "out", log=quiet)
    assert list(tmp_path.iterdir()) == []


def test_verify_names_what_changed(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    assert verify(folder) == []
    path = folder / "train-00001.bin"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    (folder / "train-00000.idx").unlink()
    assert verify(folder) == ["train-00000.idx", "train-00001.bin"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "train-00001.bin").unlink(), "train-00001.bin is missing"),
        (
            lambda f: (f / "train-00000.bin").write_bytes(b"\0\0"),
            "train-00000.bin has 2 bytes, the manifest says",
        ),
        (lambda f: (f / "train-00000.idx").write_bytes(b""), "train-00000.idx has 0 bytes"),
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
    path = folder / "train-00000.bin"
    tokens = np.fromfile(path, "<u2")
    tokens[5] = 300
    tokens.tofile(path)
    with pytest.raises(UserError, match=r"train-00000.bin holds ids beyond the vocabulary of 300"):
        TokenDataset.open(folder, "train").tokens(0, 20)


def test_the_fingerprint_is_of_the_tokens(shards, corpus, tmp_path):
    first = TokenDataset.open(shards, "train").fingerprint
    prepare(text_config(corpus), tmp_path / "same", log=quiet)
    assert TokenDataset.open(tmp_path / "same", "train").fingerprint == first
    prepare(text_config(corpus, data__validation_fraction=0.5), tmp_path / "split", log=quiet)
    assert TokenDataset.open(tmp_path / "split", "train").fingerprint != first
