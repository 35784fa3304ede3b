"""If random choice holds out no document, the last tokens are held out, or a log says why not."""

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.config import DataConfig
from llama_jax.data.prepare import hold_out, job
from llama_jax.data.prepare.job import prepare
from llama_jax.data.shards.layout import encode_manifest, read_manifest, verify
from llama_jax.data.shards.reader import TokenDataset
from llama_jax.data.sources.documents import list_parts
from llama_jax.data.training_data import open_data
from llama_jax.errors import UserError
from llama_jax.train.overview import no_evaluation
from tests.data.prepare.test_job import assert_same_folder, quiet
from tests.helpers import TINY, TINY_FLAGS, records, replace, run_command, text_config

UNLUCKY = 0.02  # chooses none of the documents below


def large_texts(folder, count=5, letters="abcdefghij"):
    """Writes `count` documents of some thousand characters each, and returns the folder."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        words = ("".join(rng.choice(list(letters), rng.integers(2, 7))) for _ in range(600))
        (folder / f"{number}.txt").write_text(" ".join(words) + "\n")
    return folder


@pytest.fixture
def config(shards, tmp_path):
    """Returns a config of five large documents, one a part; random choice holds out none."""
    return text_config(
        large_texts(tmp_path / "text"),
        data__tokenizer=str(shards / "tokenizer.model"),
        data__validation_fraction=UNLUCKY,
        data__part_bytes=1000,
        data__workers=1,
    )


def tokens_of(folder, split):
    dataset = TokenDataset.open(folder, split)
    return dataset.tokens(0, dataset.n_tokens)


def listed(folder):
    """Returns the names of the files that a manifest lists."""
    shards = [s for split in read_manifest(folder)["splits"].values() for s in split["shards"]]
    kinds = {"mask_sha256": "mask", "pack_sha256": "pack"}
    names = {"manifest.json", "tokenizer.model"}
    for shard in shards:
        names |= {f"{shard['name']}.bin", f"{shard['name']}.idx"}
        names |= {f"{shard['name']}.{kind}" for key, kind in kinds.items() if key in shard}
    return names


def test_the_last_tokens_are_held_out(config, tmp_path):
    lines = []
    report = prepare(config, tmp_path / "out", log=lines.append)[0]
    prepare(replace(config, data__validation_fraction=0.0), tmp_path / "whole", log=quiet)
    whole = tokens_of(tmp_path / "whole", "train")
    train, held_out = (tokens_of(tmp_path / "out", split) for split in ("train", "validation"))
    np.testing.assert_array_equal(np.concatenate([train, held_out]), whole)
    count = round(UNLUCKY * len(whole))
    assert len(held_out) == count > 100
    assert report.held_out[0] == count
    assert (
        f"{count:>14,}  tokens at the end of the source: data.validation_fraction=0.02 chose none "
        "or all of its documents" in lines[-1]
    )
    assert read_manifest(tmp_path / "out")["held_out"]["tokens"] == count
    # The cut document is in both splits; its text is counted once.
    assert [report.splits[name]["documents"] for name in ("train", "validation")] == [5, 1]
    sizes = sum(path.stat().st_size for path in (tmp_path / "text").iterdir())
    assert sum(split["text_bytes"] for split in report.splits.values()) == sizes
    tail = (tmp_path / "text" / "4.txt").read_text().encode()
    tokenizer = TokenDataset.open(tmp_path / "out", "train").tokenizer()
    assert tail.endswith(tokenizer.decode(held_out.tolist()).encode())
    assert report.splits["validation"]["text_bytes"] == len(tokenizer.decode(held_out.tolist()))
    assert verify(tmp_path / "out") == []
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {name for name in names if not name.endswith(".crc.json")} == listed(tmp_path / "out")


@pytest.mark.parametrize(
    "changes", [{"workers": 2}, {"shard_tokens": 300}, {"packing": "best_fit"}]
)
def test_in_every_way_that_shards_are_written(config, tmp_path, changes):
    config = replace(config, **{f"data__{name}": value for name, value in changes.items()})
    prepare(config, tmp_path / "out", log=quiet)
    held_out = tokens_of(tmp_path / "out", "validation")
    assert len(held_out) == round(
        UNLUCKY * (len(tokens_of(tmp_path / "out", "train")) + len(held_out))
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {name for name in names if not name.endswith(".crc.json")} == listed(tmp_path / "out")
    assert verify(tmp_path / "out") == []
    prepare(config, tmp_path / "again", log=quiet)
    assert_same_folder(tmp_path / "out", tmp_path / "again")
    data = open_data(replace(config, data__path=str(tmp_path / "out")), tmp_path / "unused")
    weights = data.validation.rows(0, range(config.train.global_batch))["weights"]
    pieces = len(held_out) - 1
    assert data.validation.n_sequences == -(-pieces // config.train.seq_len)
    assert weights.sum() == min(pieces, weights.size)
    assert no_evaluation(data) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_chance_that_holds_out_everything(config, tmp_path, workers):
    """All five hashes are below 0.6: without the rule, nothing would be left to train on."""
    config = replace(config, data__validation_fraction=0.6, data__workers=workers)
    prepare(config, tmp_path / "out", log=quiet)
    prepare(replace(config, data__validation_fraction=0.0), tmp_path / "whole", log=quiet)
    whole = tokens_of(tmp_path / "whole", "train")
    train, held_out = (tokens_of(tmp_path / "out", split) for split in ("train", "validation"))
    np.testing.assert_array_equal(np.concatenate([train, held_out]), whole)
    assert len(held_out) == round(0.6 * len(whole))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {name for name in names if not name.endswith(".crc.json")} == listed(tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_small_parts_at_the_end_are_held_out_whole(config, tmp_path, workers):
    for number in range(5, 8):
        (tmp_path / "text" / f"{number}.txt").write_text("the end " * 150)
    config = replace(config, data__validation_fraction=0.1, data__workers=workers)
    assert len(list_parts(config.data.source, config.data)) == 8
    report = prepare(config, tmp_path / "out", log=quiet)[0]
    prepare(replace(config, data__validation_fraction=0.0), tmp_path / "whole", log=quiet)
    whole = tokens_of(tmp_path / "whole", "train")
    train, held_out = (tokens_of(tmp_path / "out", split) for split in ("train", "validation"))
    np.testing.assert_array_equal(np.concatenate([train, held_out]), whole)
    assert len(held_out) == report.held_out[0] == round(0.1 * len(whole))


def test_a_part_that_is_just_enough_is_all_that_is_held_out(config, tmp_path):
    """Random choice holds out none of ten equal texts; then the last text, a tenth, is held out."""
    source = tmp_path / "alike"
    source.mkdir()
    for number in range(10):
        (source / f"{number}.txt").write_text("the end " * 150)
    config = replace(config, data__source=str(source), data__validation_fraction=0.1)
    report = prepare(config, tmp_path / "out", log=quiet)[0]
    assert [report.splits[name]["documents"] for name in ("train", "validation")] == [9, 1]


@pytest.mark.parametrize("at", range(6))
def test_killed_while_everything_is_written_again(config, tmp_path, monkeypatch, at):
    config = replace(config, data__validation_fraction=0.6)
    prepare(config, tmp_path / "twin", log=quiet)
    write_part, calls = hold_out.write_part, []

    def kills(*arguments, **options):
        calls.append(arguments)
        if len(calls) > at:
            raise Killed
        write_part(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(hold_out, "write_part", kills)
        with contextlib.suppress(Killed):
            prepare(config, tmp_path / "out", log=quiet)
    prepare(config, tmp_path / "out", log=quiet)
    assert_same_folder(tmp_path / "out", tmp_path / "twin")


def test_a_single_document_is_cut(config, tmp_path):
    source = tmp_path / "text" / "0.txt"
    for fraction, share in ((0.01, 0.01), (0.3, 0.3), (0.9, 0.5)):  # at most half
        out = tmp_path / f"out{fraction}"
        here = replace(config, data__source=str(source), data__validation_fraction=fraction)
        prepare(here, out, log=quiet)
        train, held_out = (tokens_of(out, split) for split in ("train", "validation"))
        total = len(train) + len(held_out)
        assert len(held_out) == int(share * total) or len(held_out) == round(share * total)


class Killed(BaseException):
    """Simulates the end of the process."""


@pytest.mark.parametrize("at", ["begin", "shard", "report", "manifest"])
def test_killed_while_the_tail_is_held_out(config, tmp_path, monkeypatch, at):
    config = replace(config, data__shard_tokens=300)
    prepare(config, tmp_path / "twin", log=quiet)
    write_part = hold_out.write_part

    def killed(*arguments, **options):
        raise Killed

    def writes(*arguments, **options):
        from llama_jax.data.prepare import tokenize

        if at == "shard":
            monkeypatch.setattr(tokenize.ShardWriter, "finish", killed)
        if at == "report":
            monkeypatch.setattr(tokenize, "write_atomically", killed)
        write_part(*arguments, **options)

    with monkeypatch.context() as patch:
        if at == "manifest":
            patch.setattr(job, "merge_reports", killed)
        else:
            patch.setattr(hold_out, "write_part", killed if at == "begin" else writes)
        with pytest.raises(Killed):
            prepare(config, tmp_path / "out", log=quiet)
    monkeypatch.undo()
    prepare(config, tmp_path / "out", log=quiet)
    assert_same_folder(tmp_path / "out", tmp_path / "twin")


def test_letters_of_several_tokens_are_counted_once(config, tmp_path):
    """A cut may fall inside a character that the tokenizer encodes as several bytes."""
    source = large_texts(tmp_path / "bytes", 1, "éß日本🦙")
    for fraction in (0.01, 0.0101, 0.0102, 0.0103):
        here = replace(config, data__source=str(source), data__validation_fraction=fraction)
        report = prepare(here, tmp_path / f"out{fraction}", log=quiet)[0]
        size = (source / "0.txt").stat().st_size
        assert sum(split["text_bytes"] for split in report.splits.values()) == size


def instructions(path, count, tokenizer):
    """Writes `count` conversations, and returns the config that reads them."""
    lines = (
        json.dumps({"instruction": f"spell {n}?", "output": f"it is {n} " * (22 - n)})
        for n in range(count)
    )
    path.write_text("".join(line + "\n" for line in lines))
    tokenizer.save(path.parent / "t.model")
    data = DataConfig(
        source=str(path),
        tokenizer=str(path.parent / "t.model"),
        template="alpaca",
        packing="best_fit",
        validation_fraction=0.001,
    )
    return text_config(path, data=data, train__seq_len=512)


def documents_of(folder, split):
    return [tuple(ids.tolist()) for ids in TokenDataset.open(folder, split).documents()]


@pytest.mark.parametrize(("fraction", "count"), [(0.001, 1), (0.09, 2)])
def test_conversations_stay_whole(tokenizer, tmp_path, fraction, count):
    config = instructions(tmp_path / "x.jsonl", 20, tokenizer)
    config = replace(config, data__validation_fraction=fraction)
    report = prepare(config, tmp_path / "out", log=quiet)[0]
    prepare(replace(config, data__validation_fraction=0.0), tmp_path / "whole", log=quiet)
    whole = documents_of(tmp_path / "whole", "train")
    held_out = documents_of(tmp_path / "out", "validation")
    assert held_out == whole[-len(held_out) :]
    assert documents_of(tmp_path / "out", "train") == whole[: -len(held_out)]
    # As many conversations at the end as fit into the requested number of tokens, but at least one.
    wanted, taken = round(fraction * sum(map(len, whole))), 0
    fitting = 0
    for ids in reversed(whole):
        taken += len(ids)
        fitting += taken <= wanted
    assert len(held_out) == max(1, fitting) == count
    assert report.held_out[0] == sum(map(len, held_out))
    assert report.splits["validation"]["answers"] == len(held_out)
    assert report.splits["train"]["answers"] == len(whole) - len(held_out)
    assert verify(tmp_path / "out") == []


def one_conversation(tokenizer, tmp_path):
    return instructions(tmp_path / "x.jsonl", 1, tokenizer)


def few_tokens(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    tokenizer.save(tmp_path / "t.model")
    changes = {"data__tokenizer": str(tmp_path / "t.model"), "data__validation_fraction": 0.01}
    return text_config(tmp_path / "a.txt", **changes)


def nothing_asked(tokenizer, tmp_path):
    return replace(few_tokens(tokenizer, tmp_path), data__validation_fraction=0.0)


def test_the_only_conversation_is_trained_on(tokenizer, tmp_path):
    """The only conversation is not held out, although random choice would hold it out."""
    config = replace(one_conversation(tokenizer, tmp_path), data__validation_fraction=0.99)
    report = prepare(config, tmp_path / "out", log=quiet)[0]
    assert [report.splits[name]["documents"] for name in ("train", "validation")] == [1, 0]
    assert "it has only one conversation to train on" in str(report)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (
            one_conversation,
            "chose none or all of its documents, and it has only one conversation to",
        ),
        (
            few_tokens,
            "chose none or all of its documents, and it has only a few tokens to train on",
        ),
        (nothing_asked, "data.validation_fraction is 0"),
    ],
)
def test_what_cannot_be_held_out_is_said(tokenizer, tmp_path, made, reason):
    config, lines = made(tokenizer, tmp_path), []
    report = prepare(config, tmp_path / "out", log=lines.append)[0]
    assert "held out instead" not in "".join(lines)
    assert report.splits["validation"]["documents"] == 0
    assert f"held out                 0  tokens: {'' if made is nothing_asked else 'data'}" in str(
        report
    )
    assert reason in str(report)
    data = open_data(replace(config, data__path=str(tmp_path / "out")), tmp_path / "unused")
    assert data.validation is None
    (line,) = no_evaluation(data)
    assert reason in line and "eval_loss is not logged" in line
    assert "keep_best has no losses" in line


@pytest.mark.parametrize("kind", ["synthetic", "streaming", "before"])
def test_a_run_without_validation_says_so(shards, corpus, tmp_path, kind):
    if kind == "synthetic":
        config, reason = TINY, "random tokens have no held-out part"
    elif kind == "streaming":
        config, reason = (
            text_config(corpus, data__streaming=True),
            "data.streaming holds out no documents",
        )
    else:  # shards of an earlier version
        config = text_config(corpus, data__validation_fraction=0.0, data__workers=1)
        prepare(config, tmp_path / "out", log=quiet)
        manifest = read_manifest(tmp_path / "out")
        del manifest["held_out"], manifest["sha256"]
        (tmp_path / "out" / "manifest.json").write_bytes(encode_manifest(manifest))
        config = replace(config, data__path=str(tmp_path / "out"))
        reason = "none of its documents was chosen by data.validation_fraction=0.0"
    (line,) = no_evaluation(open_data(config, tmp_path / "data"))
    assert line.startswith("eval    none, because there is no validation data (") and reason in line


def test_a_source_of_several_that_is_not_evaluated_is_named(config, shards, tmp_path):
    (tmp_path / "few.txt").write_text("a")
    source = f"web={config.data.source}; few={tmp_path / 'few.txt'}"
    config = replace(config, data__source=source, data__path=str(tmp_path / "out"))
    prepare(config, tmp_path / "out", log=quiet)
    (line,) = no_evaluation(open_data(config, tmp_path / "unused"))
    assert line.startswith("eval    without some sources (few: data.validation_fraction=0.02 chose")


def test_train_on_one_file_has_an_eval_loss(tmp_path):
    large_texts(tmp_path / "text", 1)
    flags = ("--config.train.steps=4", "--config.data.validation_fraction=0.01")
    place = (f"--config.data.source={tmp_path / 'text'}", f"--workdir={tmp_path / 'run'}")
    done = run_command("train", *TINY_FLAGS, *flags, *place)
    assert done.returncode == 0, done.stderr
    assert "held out" in done.stdout and "eval    none" not in done.stdout
    assert [line for line in records(tmp_path / "run") if "eval_loss" in line]
    done = run_command(
        "train",
        *TINY_FLAGS,
        "--config.data.source=synthetic",
        "--config.train.steps=4",
        f"--workdir={tmp_path / 'random'}",
    )
    assert done.returncode == 0 and "eval    none, because" in done.stdout


def test_a_manifest_with_a_damaged_note(config, tmp_path):
    prepare(config, tmp_path / "out", log=quiet)
    good = read_manifest(tmp_path / "out")
    for note in (3, [], {}, {"tokens": -1, "why": ""}, {"tokens": 1, "why": "a\nb"}, {"tokens": 1}):
        manifest = {**good, "held_out": note}
        (tmp_path / "out" / "manifest.json").write_bytes(encode_manifest(manifest))
        with pytest.raises(UserError, match="is damaged"):
            read_manifest(tmp_path / "out")


@given(
    lengths=st.lists(st.integers(2, 30), max_size=20),
    wanted=st.integers(2, 400),
    whole=st.booleans(),
    others=st.booleans(),
)
def test_the_border(lengths, wanted, whole, others):
    starts = np.cumsum([0, *lengths])
    border, end = hold_out._border(starts, wanted, whole, others), sum(lengths)
    if whole:
        if border is None:
            assert len(lengths) < (1 if others else 2)
            return
        assert border in starts[:-1]
        after = end - border
        assert after <= min(wanted, end // 2) or border == starts[-2]
        earlier = starts[:-1][starts[:-1] < border]
        if len(earlier) and after <= min(wanted, end // 2):  # one more would not fit
            assert end - earlier[-1] > min(wanted, end // 2)
        assert border or others
        return
    if border is None:
        assert end < 4
        return
    assert 2 <= border <= end - 2
    assert abs(end - border - min(wanted, end // 2)) <= 1
    cut = {border, *starts.tolist()}
    assert min(np.diff(sorted(cut))) >= 2  # each piece has a target
