"""Small files and folders of a work directory that are cut off, changed, or of another kind."""

import itertools
import json
import os
import shutil

import pytest
from etils import epath

from llama_jax.checkpoint import retention
from llama_jax.checkpoint.saved_step import load_meta
from llama_jax.data.show.summary import open_prepared
from llama_jax.errors import UserError
from llama_jax.files import read_jsonl
from llama_jax.interchange import model_card
from llama_jax.train import loop
from llama_jax.train import resume as resume_lib
from llama_jax.train import run as run_lib
from llama_jax.train.instruments.goodput import PHASES, Goodput
from llama_jax.train.instruments.metrics import plot_loss
from llama_jax.train.run import train
from tests.helpers import TINY, TINY_FLAGS, one_line_error, records, replace, run_command

pytestmark = pytest.mark.usefixtures("shared_steps")

CONFIG = replace(
    TINY,
    train__steps=12,
    train__checkpoint_every=2,
    train__eval_every=6,
    train__keep_checkpoints=4,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train(CONFIG, workdir)
    return workdir


@pytest.fixture
def run(finished, tmp_path):
    """Copies the work directory of a finished run, with steps 6, 8, 10 and 12."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def cut(run):
    """Returns the same work directory as if the run had been killed after saving step 8."""
    for step in ("10", "12"):
        shutil.rmtree(run / "checkpoints" / step)
    return run


def steps_of(workdir):
    found, damaged = read_jsonl(epath.Path(workdir / "metrics.jsonl"))
    return [record["step"] for record in found if "loss" in record], damaged


@pytest.mark.parametrize("end", [b'{"step": 9, "los', b"\0" * 5000, b'{"step": 9, "loss": 1.0}'])
def test_a_log_that_was_cut_off_loses_no_record(cut, end, capsys):
    lines = (cut / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    kept = b"".join(line for line in lines if json.loads(line)["step"] <= 8)
    (cut / "metrics.jsonl").write_bytes(kept + end)
    whole = end.endswith(b"}")
    train(CONFIG, cut)
    again = [9] * whole
    assert steps_of(cut) == ([*range(1, 9), *again, *range(9, 13)], 1 - whole)
    assert (cut / "metrics.jsonl").read_bytes().startswith(kept + end + b"\n")
    said = capsys.readouterr().out
    assert said.count("1 damaged line(s) of ") == 1 - whole
    assert (cut / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_an_event_begins_on_a_new_line(cut):
    """The log of events and the list of changes both begin a new line after a cut-off one."""
    for name in ("metrics.jsonl", "changes.jsonl"):
        (cut / name).write_bytes(b'{"step": 3, "lo')
    (cut / "checkpoints" / "8" / "meta" / "metadata").write_bytes(b"{}")
    train(replace(CONFIG, train__log_every=2), cut)
    first = records_after_a_cut(cut / "metrics.jsonl")[0]
    assert first["event"] == "checkpoint_damaged" and first["damaged_step"] == 8
    (change,) = records_after_a_cut(cut / "changes.jsonl")
    assert change == {"step": 6, "changes": {"train.log_every": [1, 2]}}


def records_after_a_cut(path):
    _, *lines = path.read_text().splitlines()
    return list(map(json.loads, lines))


def flips(content, every=1):
    """Yields copies of the content with one bit changed, for every n-th bit."""
    for position in range(0, 8 * len(content), every):
        changed = bytearray(content)
        changed[position // 8] ^= 1 << position % 8
        yield bytes(changed)


def told(act):
    """Returns the result of `act`, or None where it raises a `UserError` of one line."""
    try:
        return act()
    except UserError as error:
        assert "\n" not in str(error)
        return None


def test_bits_of_config_json(run):
    path = run / "config.json"
    for number, changed in enumerate(flips(path.read_bytes(), 5)):
        path.write_bytes(changed)
        told(lambda: resume_lib.check_workdir(CONFIG, epath.Path(run)))
        if number % 20 == 0:
            told(lambda: open_prepared(run))


def test_every_bit_of_goodput_json(run, capsys):
    """Each flipped bit is detected: the sums are correct, or counting starts again."""
    path = epath.Path(run / "goodput.json")
    content = path.read_bytes()
    good = Goodput(path)
    same = anew = 0
    for changed in flips(content):
        path.write_bytes(changed)
        now = Goodput(path)
        if now.runs == 1:
            assert not any(now.seconds[name] for name in PHASES if name != "init")
            assert capsys.readouterr().out.count("goodput is counted from zero") == 1
            anew += 1
        else:
            assert (now.seconds, now.runs) == (good.seconds, 2)
            same += 1
        assert now.report()
    # A flip may turn a space into a tab, or change the name of the checksum.
    assert same < 0.05 * anew


def test_every_bit_of_metrics_jsonl(run, tmp_path):
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    content = b"".join(line for line in lines if json.loads(line)["step"] in (6, 7))
    step = epath.Path(run / "checkpoints" / "12")
    meta = load_meta(step)
    count = itertools.count()
    for changed in flips(content):
        path.write_bytes(changed)
        assert "## Training" in model_card.render(meta, step)
        if next(count) % 1000 == 0:
            plot_loss(epath.Path(path), epath.Path(tmp_path / "loss.png"))


def test_numbers_that_cannot_be_are_left_out(run):
    lines = [
        {"step": 4, "loss": 2.5, "tokens_per_second": 100.0, "chip_seconds": 3600.0},
        {"step": 5, "loss": -1.0, "tokens_per_second": -8.0, "chip_seconds": -9.0},
        {"step": -6, "loss": 7.0},
        {"step": 6.5, "loss": 8.0},
        {"step": 10**30, "loss": 9.0},
        ["step"],
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 7, "loss": NaN}\n{"step": 8, "lo'
    (run / "metrics.jsonl").write_text(text)
    step = epath.Path(run / "checkpoints" / "12")
    text = model_card.render(load_meta(step), step)
    assert "| training loss | 2.5000 nats per token |" in text
    assert "| speed | 100 tokens/s (median) |" in text and "| chip-hours | 1.00 of " in text
    assert "| left out below | 5 damaged line(s) of metrics.jsonl |" in text


FILES = ("config.json", "tokenizer.model", "metrics.jsonl", "changes.jsonl", "goodput.json")


def in_the_way(workdir, name, how):
    path = workdir / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if how == "folder":
        path.mkdir()
    elif how == "file":
        path.write_text("mine")
    else:
        path.symlink_to(workdir / "gone" / "there")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, "folder") for name in FILES),
        *(("plots", how) for how in ("file", "link")),
        *(("tensorboard", how) for how in ("file", "link")),
        *(("checkpoints", how) for how in ("file", "link")),
        ("metrics.jsonl", "link"),
    ],
)
def test_what_is_in_the_way_is_told_before_the_first_step(run, name, how, monkeypatch):
    in_the_way(run, name, how)
    monkeypatch.setattr(run_lib, "run_loop", lambda *_: pytest.fail("it started"))
    with pytest.raises(UserError, match=rf"{name} is a {how}.* a run keeps a f") as caught:
        train(CONFIG, run)
    assert "\n" not in str(caught.value)


def test_a_command_tells_it_in_one_line(corpus, tmp_path):
    (tmp_path / "run" / "goodput.json").mkdir(parents=True)
    place = (f"--config.data.source={corpus}", f"--workdir={tmp_path / 'run'}")
    assert "goodput.json is a folder" in one_line_error(run_command("train", *TINY_FLAGS, *place))
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name, kind in (("link", "link"), ("file", "file")):
        (tmp_path / "file").write_text("")
        failed = run_command("train", *TINY_FLAGS, place[0], f"--workdir={tmp_path / name}")
        assert f"cannot be a work directory: it is a {kind}" in one_line_error(failed)


def test_a_log_that_cannot_be_written_to_is_told(run, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: "metrics" not in os.fspath(path))
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written to"):
        train(CONFIG, run)


@pytest.mark.parametrize(
    "changes",
    [
        {"seconds": {**dict.fromkeys(PHASES, 1.0), "step": -5.0}},
        {"seconds": {**dict.fromkeys(PHASES, 1.0), "step": 1e300}},
        {"seconds": {**dict.fromkeys(PHASES, 1.0), "step": float("nan")}},
        {"seconds": {**dict.fromkeys(PHASES, 1.0), "step": float("inf")}},
        {"seconds": {**dict.fromkeys(PHASES, 1.0), "step": 10**400}},
        {"seconds": {**dict.fromkeys(PHASES, 1.0), "step": True}},
        {"seconds": {**dict.fromkeys(PHASES, 1.0), "step": "5"}},
        {"seconds": None},
        {"runs": -3},
        {"runs": 2.5},
        {"runs": 10**20},
        {"time": -1},
        {"time": float("nan")},
        {"time": 0.0},
        {"saved_at_end": "no"},
    ],
)
@pytest.mark.parametrize("version", ["sealed", "before"])
def test_times_that_cannot_be_are_counted_anew(run, changes, version, capsys):
    path = run / "goodput.json"
    record = json.loads(path.read_text()) | changes
    if version == "before":  # without a checksum
        record.pop("crc32", None)
    path.write_text(json.dumps(record))
    goodput = Goodput(epath.Path(path))
    assert goodput.runs == 1 and sum(goodput.seconds.values()) == 0
    assert f"warning: {path}" in capsys.readouterr().out


def test_times_of_a_version_before_are_added_to(run, capsys):
    path = run / "goodput.json"
    record = json.loads(path.read_text())
    record.pop("crc32", None)
    record["time"] += 10**9  # the time of a clock that was ahead
    path.write_text(json.dumps({**record, "saved_at_end": False}))
    goodput = Goodput(epath.Path(path))
    assert (goodput.runs, goodput.seconds) == (2, record["seconds"])
    assert capsys.readouterr().out == ""


def test_small_files_that_become_folders_end_no_run(tmp_path, monkeypatch, capsys):
    """The files become folders during the run; its weights equal those of an undisturbed run."""
    run, stream = tmp_path / "run", loop.device_batches

    def disturbed(source, start, *rest):
        for step, batch in enumerate(stream(source, start, *rest), start=start + 1):
            if step == 5:
                for name in ("metrics.jsonl", "goodput.json"):
                    in_the_way(run, name, "folder")
                in_the_way(run, "plots", "file")
            if step == 10:
                (run / "metrics.jsonl").rmdir()
            yield batch

    monkeypatch.setattr(loop, "device_batches", disturbed)
    assert int(train(CONFIG, run).step) == 12
    said = capsys.readouterr().out
    assert "warning: step 5 could not be logged: " in said
    assert "warning: the loss could not be plotted: " in said and "finished at step 12" in said
    # Records that could not be written at that time are written later.
    steps = [line["step"] for line in records(run) if "loss" in line]
    assert steps[-9:] == list(range(4, 13))[-9:] and set(steps) >= set(range(5, 13))


def test_a_profile_that_cannot_be_kept_ends_no_run(tmp_path, capsys):
    (tmp_path / "run" / "tensorboard").mkdir(parents=True)
    (tmp_path / "run" / "tensorboard" / "plugins").write_text("")
    assert int(train(replace(CONFIG, train__profile_steps="3,4"), tmp_path / "run").step) == 12
    assert "warning: the profile could not be saved: " in capsys.readouterr().out


def link_elsewhere(path, elsewhere):
    """Moves a file or folder to another place and leaves a link; returns the new path."""
    elsewhere.mkdir(exist_ok=True)
    path.rename(elsewhere / path.name)
    path.symlink_to(elsewhere / path.name)
    return elsewhere / path.name


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_goes_on_whatever_lies_beside_its_steps(cut, tmp_path, capsys):
    steps, elsewhere = cut / "checkpoints", tmp_path / "elsewhere"
    old = link_elsewhere(steps / "6", elsewhere)
    left = link_elsewhere(steps / "8" / "skips", elsewhere)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("")
    before = files_of(elsewhere) | files_of(tmp_path / "mine")
    strange = ["0020", "²", "1e3", "lost+found", "tmp", "٣.saving", "9" * 20, "5.savings", "-3"]
    for name in strange:
        (steps / name).mkdir()
    for name in (".DS_Store", "3", "README"):
        (steps / name).write_text("")
    kept = [*strange, ".DS_Store", "3", "README"]
    (steps / "2").symlink_to(tmp_path / "gone")
    (steps / "7.saving").write_text("")
    (steps / "5.deleting").symlink_to(tmp_path / "mine")
    (steps / "4.deleting").symlink_to(tmp_path / "gone")
    (steps / "9.saving").mkdir()
    (steps / "9.saving" / "params").symlink_to(tmp_path / "mine")
    (steps / "10").write_text("no step")  # a file in the way of a save
    (steps / "12").symlink_to(tmp_path / "gone")
    config = replace(CONFIG, train__keep_checkpoints=1)
    assert int(train(config, cut).step) == 12
    said = capsys.readouterr().out
    assert "resume  from step 8" in said and "warning" not in said
    assert "4 unfinished checkpoint folder(s): 4.deleting, 5.deleting, 7.saving, 9.saving" in said
    for step, place in ((2, tmp_path / "gone"), (6, old), (8, left)):
        text = f"checkpoint {step} is deleted, but not the targets of its links: {place}"
        assert text in said
    assert f"{steps}/10 was not a saved step; set aside as {steps}/10.damaged" in said
    nothing = f"it is a link to {tmp_path}/gone, which does not exist"
    assert f"damaged checkpoint 12: {nothing}; set aside as {steps}/12.damaged" in said
    assert files_of(elsewhere) | files_of(tmp_path / "mine") == before
    assert sorted(os.listdir(steps)) == sorted([*kept, "10.damaged", "12.damaged", "12"])
    assert int(train(config, cut).step) == 12  # a second start finds nothing to do
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["checkpoints", ""])
def test_a_folder_that_is_a_link(cut, tmp_path, name):
    place = link_elsewhere(cut / name, tmp_path / "elsewhere")
    assert int(train(CONFIG, cut).step) == 12
    assert (cut / name).is_symlink()
    steps = place if name else place / "checkpoints"
    assert retention.saved_steps(epath.Path(steps)) == [6, 8, 10, 12]


def test_links_within_a_step_that_lead_back(cut, capsys):
    step = cut / "checkpoints" / "8"
    for name in ("self", "params/up", "params/again"):
        (step / name).symlink_to(step)
    link_elsewhere(step / "params", cut / "other")
    assert int(train(CONFIG, cut).step) == 12
    assert "resume  from step 8" in capsys.readouterr().out


def test_steps_on_a_disk_that_is_not_there(cut, tmp_path):
    """The run does not begin anew because of that, and changes nothing."""
    elsewhere = tmp_path / "elsewhere"
    for step in ("6", "8"):
        link_elsewhere(cut / "checkpoints" / step, elsewhere)
    elsewhere.rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"no good .*step 8: it is a link to .* does not exist"):
        train(CONFIG, cut)
    (tmp_path / "away").rename(elsewhere)
    assert int(train(CONFIG, cut).step) == 12
