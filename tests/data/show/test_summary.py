"""The text and the picture of `python -m llama_jax.data --show`."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

from llama_jax.config import default, from_config_dict
from llama_jax.data.prepare.job import prepare
from llama_jax.data.shards.layout import read_manifest
from llama_jax.data.show import plot as plot_lib
from llama_jax.data.show import summary
from llama_jax.data.show.rows import Screen, legend, pieces, show_row, visible
from llama_jax.errors import UserError
from tests.helpers import one_line_error, replace, run_command, text_config

T = 64
PLAIN = Screen(width=80, lines=0)


@pytest.fixture(scope="module")
def sources(corpus, tmp_path_factory):
    """Prepares three sources, concatenated and packed; one of them has skipped documents."""
    folder = tmp_path_factory.mktemp("show")
    lines = [json.dumps({"text": path.read_text()}) for path in sorted(corpus.glob("03*.txt"))]
    (folder / "c.jsonl").write_text("\n".join([*lines, "{broken", '{"body": 1}', "[]"]))
    source = f"a={corpus}/00*.txt; b={corpus}/01*.txt,{corpus}/02*.txt; c={folder}/c.jsonl"
    configs = {}
    for packing in ("concat", "best_fit"):
        config = text_config(source, data__packing=packing, train__seq_len=T)
        prepare(config, folder / packing, log=lambda line: None)
        configs[packing] = config
    return folder, configs


def shares_of(text):
    """Returns the cells of the table by source and column."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("source"))
    header = lines[start].split()
    rows = [line.split() for line in lines[start + 1 : start + 4]]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_the_table_says_what_is_there(sources, packing):
    folder, configs = sources
    config = replace(configs[packing], data__mixture="a=0.1,b=0.7,c=0.2", train__steps=50)
    prepared = summary.open_prepared(folder / packing, config)
    text = summary.summary(prepared, 3, PLAIN)
    table = shares_of(text)
    assert [row["requested"] for row in table.values()] == ["10.00%", "70.00%", "20.00%"]
    # Counts the tokens in 1,000 rows, which are 125 batches.
    tokens = dict.fromkeys("abc", 0)
    for step in range(3, 128):
        weights = prepared.batches.rows(step, range(8))["weights"]
        for (source, _), row in zip(prepared.batches.draws(step, range(8)), weights, strict=True):
            tokens["abc"[source]] += int(row.sum())
    for name, requested in (("a", 0.1), ("b", 0.7), ("c", 0.2)):
        share = tokens[name] / sum(tokens.values())
        assert table[name]["realised"] == f"{share:.2%}"
        assert share == pytest.approx(requested, rel=0.02)
    manifests = {name: read_manifest(folder / packing / name) for name in "abc"}
    total = sum(m["splits"]["train"]["tokens"] for m in manifests.values())
    epochs = prepared.batches.epochs(50)
    for name, manifest in manifests.items():
        split, row = manifest["splits"]["train"], table[name]
        assert row["documents"] == f"{split['documents']:,}"
        assert row["tokens"] == f"{split['tokens']:,}"
        assert row["available"] == f"{split['tokens'] / total:.2%}"
        assert row["bytes/token"] == f"{split['text_bytes'] / split['tokens']:.2f}"
        assert row["epochs"] == f"{epochs[name]:.2f}"
        if packing == "best_fit":
            slots = T * sum(shard["sequences"] for shard in split["shards"])
            used = split["tokens"] - split["documents"]
            assert row["padding"] == f"{1 - used / slots:.2%}"
    assert ("padding" in table["a"]) == (packing == "best_fit")
    assert [row["skipped"] for row in table.values()] == ["0", "0", "3"]
    assert "skipped in c: 1 broken JSON line; the first: " in text
    assert "skipped in c: 2 no text in field 'text'" in text


def test_the_summary_says_which_files_were_read_and_what_is_held_out(tmp_path):
    books = tmp_path / "books"
    books.mkdir()
    (books / "a.txt").write_text("One book of many words. " * 400)
    (books / ".hidden").write_text("not of the book")
    prepare(text_config(books), tmp_path / "shards", log=lambda line: None)
    text = summary.summary(summary.open_prepared(tmp_path / "shards"), 0, PLAIN)
    assert "\nfiles in the source: 1 plain text\n" in text
    assert f"left out in the source: 1 hidden files and folders; the first: {books}/.hidden" in text
    tokens = read_manifest(tmp_path / "shards")["splits"]["validation"]["tokens"]
    assert tokens > 100
    assert f"\nheld out of the source: {tokens:,} tokens at the end of the source: " in text


def test_realised_shares_are_counted_from_the_step_on(sources):
    folder, configs = sources
    config = replace(configs["concat"], data__mixture="a=1/3,b=1/3,c=1/3")
    prepared = summary.open_prepared(folder / "concat", config)
    realised = summary.realised_shares(prepared, 5)
    assert sum(realised.values()) == pytest.approx(1)
    assert all(abs(share - 1 / 3) < 2 / summary.WINDOW for share in realised.values())


def test_rows_are_those_of_the_loader(sources):
    """The printed pieces of a row, joined again, are the row."""
    folder, configs = sources
    prepared = summary.open_prepared(folder / "best_fit", configs["best_fit"])
    batch = configs["best_fit"].train.global_batch
    text = "\n".join(summary.show_rows(prepared, 7, batch + 2, PLAIN))
    assert text.startswith(legend(True, PLAIN))
    blocks = re.split(r"\n\nstep ", text)[1:]
    assert len(blocks) == batch + 2
    assert [b.split(",")[0] for b in blocks] == ["7"] * batch + ["8"] * 2
    for index, block in enumerate(blocks):
        step, row = 7 + index // batch, index % batch
        expected = {k: v[0] for k, v in prepared.batches.rows(step, range(row, row + 1)).items()}
        head, *lines = block.splitlines()
        assert f"row {row}, " in head
        assert f"{int(expected['weights'].sum())} of {T} tokens count" in head
        shown = {}
        for line in lines:
            segment, position, content = re.match(r" *(\d+): *(\d+) [│░] (.*)", line).groups()
            shown.setdefault(int(segment), []).append((int(position), content))
        for segment in range(1, expected["segment_ids"].max() + 1):
            mine = expected["segment_ids"] == segment
            ids = [*expected["inputs"][mine], expected["targets"][mine][-1]]
            marks = {1: "‹BOS›", 2: "‹EOS›"}
            texts = prepared.tokenizer.texts(ids)
            pieces = [marks.get(i, t) for i, t in zip(ids, texts, strict=True)]
            pieces[-1] = "→" + pieces[-1]
            assert "".join(part for _, part in shown[segment]) == visible("".join(pieces))
            assert shown[segment][0][0] == 0  # positions restart
        padding = int((expected["weights"] == 0).sum())
        assert (0 in shown) == (padding > 0)
        if padding:
            assert shown[0] == [(0, f"padding: {padding} positions of weight 0")]


def row_of(tokenizer, inputs, targets, weights=None, segments=None, positions=None):
    row = {"inputs": np.asarray(inputs), "targets": np.asarray(targets)}
    row["weights"] = np.ones(len(inputs)) if weights is None else np.asarray(weights)
    if segments is not None:
        row |= {"segment_ids": np.asarray(segments), "positions": np.asarray(positions)}
    return row


def test_a_row_that_is_cut_from_the_run_of_documents(tokenizer):
    first, second = tokenizer.encode("abc\nde"), tokenizer.encode("fgh ij")
    ids = [*first, 2, 1, *second]
    row = row_of(tokenizer, ids[:-1], ids[1:])
    lines = list(show_row(row, tokenizer, PLAIN))
    texts = [re.sub(r"^ *\d+ │ ", "", line) for line in lines]
    last = tokenizer.texts(ids)[-1]
    assert texts == [" abc↵", "de‹EOS›", "‹BOS›fgh ij"[: -len(last)] + f"→{last}"]
    starts = [int(line.split()[0]) for line in lines]
    assert starts == [0, ids.index(tokenizer.encode("\n")[-1]) + 1, ids.index(1)]


def test_weight_0_is_marked_whether_it_is_padding_or_not(tokenizer):
    words = tokenizer.encode("abc")
    inputs = [1, *words, 2, 0, 0]
    targets = [*words, 2, 0, 0, 0]
    weights = [0, *[1] * len(words), 0, 0, 0]  # a prompt of one token, and nothing after the end
    row = row_of(tokenizer, inputs, targets, weights)
    assert [(p.start, p.stop) for p in pieces(row, 1)] == [
        (0, 1),
        (1, len(words) + 1),
        (len(words) + 1, len(inputs)),
    ]
    assert list(show_row(row, tokenizer, PLAIN)) == [
        "0 ░ ‹BOS›",
        "1 │  abc",
        f"{len(words) + 1} ░ ‹EOS› ⁇  ⁇ ",
    ]
    padded = row_of(tokenizer, [*words, 0, 0], [*words[1:], 2, 0, 0], [*[1] * len(words), 0, 0])
    assert list(show_row(padded, tokenizer, PLAIN)) == [
        "0 │  abc→‹EOS›",
        f"{len(words)} ░ padding: 2 positions of weight 0",
    ]


def test_long_documents_are_cut_in_the_middle(tokenizer):
    ids = tokenizer.encode("".join(f"{n}\n" for n in range(1000, 1030)))
    row = row_of(tokenizer, ids[:-1], ids[1:])
    whole = list(show_row(row, tokenizer, PLAIN))
    assert len(whole) == 30
    short = list(show_row(row, tokenizer, dataclasses.replace(PLAIN, lines=8)))
    assert len(short) == 8
    assert short[:4] == whole[:4] and short[5:] == whole[-3:]
    left_out = len(tokenizer.encode("\n1004")) * 23
    assert (
        short[4].split() == ["⋮", "23", "lines,", f"{left_out}", "tokens"] or "23 lines" in short[4]
    )


def test_lines_fit_the_screen(tokenizer):
    ids = tokenizer.encode("wide 日本語 words " * 40)
    row = row_of(tokenizer, ids[:-1], ids[1:])
    for width in (40, 70):
        lines = list(show_row(row, tokenizer, Screen(width=width, lines=0)))
        columns = [sum(2 if c in "日本語" else 1 for c in line) for line in lines]
        assert max(columns) <= width and min(columns[:-1]) > width - 12


def test_data_cannot_command_the_terminal(tokenizer):
    assert visible("\x1b[31m\r\t\u202e\n") == "\\x1b[31m\\r⇥\\u202e↵"
    ids = [1, *tokenizer.encode("a\x1b[2Jb"), 2]
    text = "".join(show_row(row_of(tokenizer, ids[:-1], ids[1:]), tokenizer, PLAIN))
    assert "\x1b" not in text and "\\x1b[2J" in text


def test_colours_only_where_they_are_wanted(sources):
    folder, configs = sources
    prepared = summary.open_prepared(folder / "concat", configs["concat"])
    plain = [summary.summary(prepared, 0, PLAIN), *summary.show_rows(prepared, 0, 2, PLAIN)]
    screen = dataclasses.replace(PLAIN, colour=True)
    coloured = [summary.summary(prepared, 0, screen), *summary.show_rows(prepared, 0, 2, screen)]
    assert not any("\033" in line for line in plain)
    assert [re.sub(r"\033\[[\d;]*m", "", line) for line in coloured] == plain != coloured


# The choice of the folder and the config.


def test_shards_without_a_config(sources, shards):
    folder, _ = sources
    prepared = summary.open_prepared(folder / "best_fit")
    assert list(prepared.folders) == ["a", "b", "c"]
    assert (prepared.config.train.seq_len, prepared.config.train.global_batch) == (T, summary.BATCH)
    assert "epochs" not in summary.summary(prepared, 0, PLAIN)
    one = summary.open_prepared(shards)
    assert (list(one.folders), one.config.train.seq_len) == ([""], summary.SEQ_LEN)
    assert "(one)" in summary.summary(one, 0, PLAIN)


def test_a_work_directory_has_its_own_config(sources, tmp_path):
    folder, configs = sources
    config = replace(configs["concat"], data__mixture="a=0.5,b=0.25,c=0.25", train__steps=9)
    (tmp_path / "config.json").write_text(config.to_json())
    shutil.copytree(folder / "concat", tmp_path / "data")
    prepared = summary.open_prepared(tmp_path)
    assert prepared.config.train == config.train and prepared.of_a_run
    assert {n: float(s) for n, s in prepared.batches.schedule.shares.items()} == {
        "a": 0.5,
        "b": 0.25,
        "c": 0.25,
    }
    # Shards in another folder.
    shutil.rmtree(tmp_path / "data")
    elsewhere = replace(config, data__path=str(folder / "concat"))
    (tmp_path / "config.json").write_text(elsewhere.to_json())
    assert summary.open_prepared(tmp_path).fingerprint == prepared.fingerprint


def test_a_mixture_that_an_earlier_stage_did_not_have(sources):
    """The sources that the mixture leaves out are in the batches of the earlier stage."""
    folder, configs = sources
    staged = replace(
        configs["concat"], data__mixture="a=1", train__stages="until 5: data.mixture=''"
    )
    prepared = summary.open_prepared(folder / "concat", staged)
    assert shares_of(summary.summary(prepared, 0, PLAIN))["b"]["requested"] != "0.00%"
    assert shares_of(summary.summary(prepared, 5, PLAIN))["b"]["requested"] == "0.00%"


def test_a_config_that_was_written_for_another_source(sources):
    folder, _ = sources
    values = default()
    values.unlock()
    values.model.vocab_size, values.train.seq_len = 300, 32
    config = from_config_dict(values)
    assert list(summary.open_prepared(folder / "concat", config).folders) == ["a", "b", "c"]
    mixed = replace(config, data__mixture="c=0.5,a=0.5")
    assert list(summary.open_prepared(folder / "concat", mixed).folders) == ["c", "a"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("source", "synthetic", "are synthetic: there are no token shards"),
        ("streaming", True, "are streamed: there are no token shards"),
    ],
)
def test_a_run_without_shards(tmp_path, field, value, message):
    config = replace(text_config(tmp_path), **{f"data__{field}": value})
    (tmp_path / "config.json").write_text(config.to_json())
    with pytest.raises(UserError, match=message):
        summary.open_prepared(tmp_path)


def test_a_damaged_config_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: the config is not valid JSON"):
        summary.open_prepared(tmp_path)


def test_nothing_to_show(tmp_path, sources):
    with pytest.raises(UserError, match="nothing is not a folder"):
        summary.open_prepared(tmp_path / "nothing")
    with pytest.raises(UserError, match="no token shards in"):
        summary.open_prepared(tmp_path)
    folder, configs = sources
    shutil.copytree(folder / "concat" / "a", tmp_path / "a.partial")  # left by a killed run
    with pytest.raises(UserError, match="no token shards in"):
        summary.open_prepared(tmp_path)
    with pytest.raises(UserError, match="made with data.packing=best_fit, but now it is concat"):
        summary.open_prepared(folder / "best_fit", configs["concat"])


# The picture.


def test_lengths_of_documents(shards):
    manifest = read_manifest(shards)
    lengths = summary.document_lengths(shards, manifest)
    split = manifest["splits"]["train"]
    assert len(split["shards"]) < summary.SAMPLED_SHARDS
    assert (len(lengths), lengths.sum()) == (split["documents"], split["tokens"])


def test_lengths_are_of_a_few_shards_spread_evenly(shards, monkeypatch):
    manifest = read_manifest(shards)
    listed = manifest["splits"]["train"]["shards"]
    monkeypatch.setattr(summary, "SAMPLED_SHARDS", 3)
    lengths = summary.document_lengths(shards, manifest)
    chosen = [listed[0], listed[round((len(listed) - 1) / 2)], listed[-1]]
    assert (len(lengths), lengths.sum()) == (
        sum(shard["documents"] for shard in chosen),
        sum(shard["tokens"] for shard in chosen),
    )
    np.testing.assert_array_equal(lengths, summary.document_lengths(shards, manifest))


def test_a_damaged_index(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    path = folder / "train-00000-000.idx"
    starts = np.fromfile(path, "<i8")
    starts[1] = starts[2] + 5
    starts.tofile(path)
    with pytest.raises(UserError, match=r"train-00000-000.idx is damaged; check with"):
        summary.document_lengths(folder, read_manifest(folder))
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read .*train-00000-000.idx"):
        summary.document_lengths(folder, read_manifest(folder))


def test_the_picture_shows_every_source(sources, tmp_path, monkeypatch):
    from matplotlib import figure as figure_lib
    from matplotlib import image

    folder, configs = sources
    config = replace(configs["concat"], data__mixture="a=0.1,b=0.7,c=0.2")
    prepared = summary.open_prepared(folder / "concat", config)
    seen = []
    save = figure_lib.Figure.savefig
    monkeypatch.setattr(
        figure_lib.Figure, "savefig", lambda self, *a, **k: (seen.append(self), save(self, *a, **k))
    )
    plot_lib.plot(prepared, summary.epath.Path(tmp_path / "new" / "x.png"))
    assert image.imread(tmp_path / "new" / "x.png").shape[1] == 1320
    *lengths, shares = seen[0].axes
    assert len(lengths) == 3
    for axes in lengths:
        assert sum(bar.get_height() for bar in axes.patches) == pytest.approx(100)  # none outside
    tokens = [m["splits"]["train"]["tokens"] for m in prepared.manifests.values()]
    requested, available = ([bar.get_width() for bar in bars] for bars in shares.containers)
    assert requested == pytest.approx([10, 70, 20])
    assert available == pytest.approx([100 * count / sum(tokens) for count in tokens])


# The command.


def test_the_command(sources, tmp_path):
    folder, _ = sources
    plot = tmp_path / "x.png"
    flags = (f"--show={folder / 'best_fit'}", f"--plot={plot}", "--rows=2", "--step=5")
    process = run_command("data", *flags)
    assert process.returncode == 0 and process.stderr == ""
    assert "step 5, row 1, " in process.stdout and "step 5, row 2" not in process.stdout
    assert process.stdout.splitlines()[-1] == f"histograms  {plot}"
    assert plot.read_bytes().startswith(b"\x89PNG") and "\033" not in process.stdout
    ascii_only = run_command("data", *flags, PYTHONIOENCODING="ascii")
    assert ascii_only.returncode == 0 and "?BOS?" in ascii_only.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--show is missing"),
        (("--show=/nothing",), "/nothing is not a folder"),
        (("--show={shards}", "--step=-1"), "-1 is not an integer in the range"),
        (("--show={shards}", "--plot=/proc/x.png"), "cannot write /proc/x.png"),
        (
            ("--show={shards}", "--config=configs/tiny.py", "--config.model.vocab_size=64"),
            "have a vocabulary of 300, but model.vocab_size is 64",
        ),
    ],
)
def test_the_command_with_bad_input(shards, flags, message):
    flags = [flag.format(shards=shards) for flag in flags]
    assert message in one_line_error(run_command("data", *flags))


def test_a_damaged_shard_is_named(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    path = folder / "train-00000-001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    message = one_line_error(run_command("data", f"--show={folder}"))
    assert "train-00000-001.bin has" in message and "the manifest says" in message
