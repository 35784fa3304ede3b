"""Shards are made in the target folder, which is checked at the start and locked to the end."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys

import pytest

from llama_jax.data.prepare import job, output_folder, workers
from llama_jax.data.prepare.job import prepare
from llama_jax.data.shards.layout import source_folders, verify
from llama_jax.data.shards.reader import TokenDataset
from llama_jax.data.training_data import open_data
from llama_jax.errors import UserError
from llama_jax.files import locked
from tests.data.prepare.test_job import assert_same_folder, quiet
from tests.helpers import (
    ROOT,
    TINY_FLAGS,
    one_line_error,
    replace,
    run_command,
    text_config,
)


@contextlib.contextmanager
def mounted(place, *arguments):
    """Mounts a file system at `place`; without the right to, makes it a link to another folder."""
    made = subprocess.run(["mount", *arguments, place], capture_output=True).returncode == 0
    if not made:
        other = place.parent / f"{place.name}-elsewhere"
        place.rename(other)
        place.symlink_to(other)
    try:
        yield made
    finally:
        if made:
            subprocess.run(["umount", place], check=True)


def config_of(corpus, **changes):
    return text_config(corpus, **{"data__part_bytes": 1000, "data__workers": 1, **changes})


def until_part(monkeypatch, number, error):
    """Raises `error` in place of writing part `number` and all later parts."""
    write_part = workers.write_part

    def write(*arguments, **options):
        if arguments[3] >= number:
            raise error
        return write_part(*arguments, **options)

    monkeypatch.setattr(workers, "write_part", write)


class Killed(BaseException):
    """Simulates the end of the process: no code handles it."""


def killed_at(monkeypatch, config, output, number=3, **options):
    with monkeypatch.context() as patch:
        until_part(patch, number, Killed)
        with pytest.raises(Killed):
            prepare(config, output, log=quiet, **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def expected(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected") / "out"
    prepare(config_of(corpus), folder, log=quiet)
    return folder


def test_a_volume_is_filled_where_it_is(corpus, tmp_path, expected, monkeypatch):
    """This also holds after a kill, and no file is made next to the volume."""
    out = tmp_path / "volume"
    out.mkdir()
    with mounted(out, "-t", "tmpfs", "tmpfs") as made:
        (out / "lost+found").mkdir()
        (out / ".Trash-1000").mkdir()
        device = out.stat().st_dev
        killed_at(monkeypatch, config_of(corpus), out)
        inode = (out / "train-00000-000.bin").stat().st_ino
        lines = []
        prepare(config_of(corpus), out, log=lines.append)
        assert "3 of " in lines[0]
        assert (out / "train-00000-000.bin").stat().st_ino == inode
        assert out.stat().st_dev == device and (out.is_mount() or not made)
        assert {path.name for path in tmp_path.iterdir()} <= {"volume", "volume-elsewhere"}
        (out / "lost+found").rmdir()
        (out / ".Trash-1000").rmdir()
        assert_same_folder(out, expected)


@pytest.mark.parametrize("kind", ["link", "empty", "new", "deep", "hidden", "bind"])
def test_targets_of_all_kinds(corpus, tmp_path, expected, kind):
    out = tmp_path / "shards"
    if kind == "link":
        (tmp_path / "big").mkdir()
        out.symlink_to("big")
    elif kind in ("empty", "hidden", "bind"):
        out.mkdir()
    elif kind == "deep":
        out = out / "a" / "b"
    with contextlib.ExitStack() as stack:
        if kind == "bind":
            (tmp_path / "big").mkdir()
            stack.enter_context(mounted(out, "--bind", str(tmp_path / "big")))
        if kind == "hidden":
            (out / ".nfs0001").touch()
        prepare(config_of(corpus), out, log=quiet)
        (out / ".nfs0001").unlink(missing_ok=True)
        assert_same_folder(out, expected)
        assert out.is_symlink() == (kind == "link")
        assert not list(tmp_path.glob("*.partial"))


def block(out, kind):
    """Makes a target that cannot hold shards; returns the expected error."""
    if kind == "a file":
        out.write_text("precious")
        return "it is a file"
    if kind == "in a file":
        out.parent.rmdir()
        out.parent.write_text("precious")
        return "cannot be a folder of shards: (it|.*in) is a file"
    if kind == "a dangling link":
        out.symlink_to("nowhere")
        return "is a link to nowhere, which does not exist; make that folder first"
    if kind == "in a dangling link":
        out.parent.rmdir()
        out.parent.symlink_to("nowhere")
        return "is a link to nowhere, which does not exist"
    if kind == "a loop":
        out.symlink_to(out.name)
        return "is a link to"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    return "is not empty and holds no token shards, but thesis.txt"


KINDS = ("a file", "in a file", "a dangling link", "in a dangling link", "a loop", "others")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("named", [False, True])
def test_what_would_fail_at_the_end_is_told_at_the_start(
    corpus, tmp_path, monkeypatch, kind, named
):
    (tmp_path / "in").mkdir()
    out = tmp_path / "in" / "shards"
    source = f"a={corpus}/00*.txt; shards={corpus}/01*.txt" if named else str(corpus)
    message = block(out, kind)
    monkeypatch.setattr(job, "list_parts", lambda *_: pytest.fail("it began"))
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(UserError, match=message):
        prepare(config_of(source), out.parent if named else out, log=quiet)
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_a_read_only_place_is_told_at_the_start(corpus, tmp_path, monkeypatch):
    out = tmp_path / "volume"
    out.mkdir()
    monkeypatch.setattr(job, "list_parts", lambda *_: pytest.fail("it began"))
    with mounted(out, "-t", "tmpfs", "-o", "ro", "tmpfs") as made:
        if not made:
            out.chmod(0o555)
        for target in (out, out / "new"):
            with pytest.raises(UserError, match=rf"cannot write {target}: (Read|Permission)"):
                prepare(config_of(corpus), target, log=quiet)


def test_complete_shards_in_a_read_only_place(corpus, tmp_path, expected):
    """Complete shards are accepted, even with a file that a killed command left behind."""
    out = shutil.copytree(expected, tmp_path / "volume")
    (out / "plan.json").write_text("{}")
    lines = []
    with contextlib.ExitStack() as stack:
        if subprocess.run(["mount", "--bind", out, out], capture_output=True).returncode == 0:
            stack.callback(subprocess.run, ["umount", out], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", out], check=True)
        prepare(config_of(corpus), out, log=lines.append)
    assert lines == [f"{out} is prepared already"]


def test_a_volume_that_is_too_small(corpus, tmp_path, expected):
    """`prepare` warns, keeps finished parts on a full disk, and goes on when there is room."""
    out = tmp_path / "volume"
    out.mkdir()
    large = tmp_path / "large"
    large.mkdir()
    for number in range(8):
        (large / f"{number}.txt").write_text("some words to learn from " * 8000)
    config = replace(
        config_of(large, data__part_bytes=100_000),
        data__tokenizer=str(expected / "tokenizer.model"),
    )
    lines = []
    with mounted(out, "-t", "tmpfs", "-o", "size=512k", "tmpfs") as made:
        if made:
            with pytest.raises(UserError, match="the disk is full.*continues where it"):
                prepare(config, out, log=lines.append)
            (warning,) = [line for line in lines if line.startswith("warning")]
            assert "the shards may take about 0.00 GB" in warning and "free" in warning
            done = len(list(out.glob("part-*.json")))
            assert done
            subprocess.run(["mount", "-o", "remount,size=64m", out], check=True)
            lines.clear()
        prepare(config, out, log=lines.append)
        assert not made or f"{done} of 8 parts are done" in lines[0]
        assert not any("warning" in line for line in lines)
        prepare(config, tmp_path / "twin", log=quiet)
        assert_same_folder(out, tmp_path / "twin")


def test_the_space_that_is_expected(corpus, tmp_path, monkeypatch):
    """The estimate is half a byte of ids per byte of text, and 3 times that if compressed."""
    monkeypatch.setattr(
        output_folder.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0)
    )
    for name, expected in (("a.txt", "2.00"), ("a.txt.gz", "6.00")):
        with (tmp_path / name).open("wb") as file:
            file.truncate(4_000_000_000)
        lines = []
        part = output_folder.Part("files", (str(tmp_path / name),), 0, -1, 4_000_000_000)
        output_folder._warn_of_space(tmp_path, [part], 300, lines.append)
        assert f"may take about {expected} GB" in lines[0]


@pytest.mark.parametrize("call", [1, 2, 3, 5, 8, 13, 21])
def test_killed_while_it_is_completed(corpus, tmp_path, expected, monkeypatch, call):
    """After a kill at any point, the next call finds complete shards and removes the rest.

    Once the manifest is written, the plan and the reports are removed one by one.
    """
    out, calls = tmp_path / "out", []
    unlink = type(out).unlink

    def kills(path, **options):
        calls.append(path)
        if len(calls) == call:
            raise Killed
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(output_folder.epath.Path(out)), "unlink", kills)
        with contextlib.suppress(Killed):
            prepare(config_of(corpus), out, log=quiet)
    assert verify(out) == []
    prepare(config_of(corpus), out, log=quiet)
    assert_same_folder(out, expected)


def test_files_that_come_meanwhile_are_left(corpus, tmp_path, expected, monkeypatch):
    killed_at(monkeypatch, config_of(corpus), tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("precious")
    (tmp_path / "out" / "part-00001.json.tmp-77").write_text("torn")
    prepare(config_of(corpus), tmp_path / "out", log=quiet)
    assert (tmp_path / "out" / "notes.txt").read_text() == "precious"
    (tmp_path / "out" / "notes.txt").unlink()
    assert_same_folder(tmp_path / "out", expected)


@pytest.mark.parametrize("command", ["train", "data", "evaluate", "verify", "sources", "mixture"])
@pytest.mark.parametrize("named", [False, True])
def test_nothing_reads_unfinished_shards(corpus, tmp_path, monkeypatch, command, named):
    source = f"a={corpus}/00*.txt; b={corpus}/01*.txt" if named else str(corpus)
    config = config_of(source)
    if named:
        prepare(config_of(f"a={corpus}/00*.txt"), tmp_path / "out", log=quiet)
        config = replace(config, data__source=source)
    killed_at(monkeypatch, config, tmp_path / "out")
    out = str(tmp_path / "out")
    message = f"{out}{'/b' if named else ''} are unfinished: run the same prepare command again"
    if command == "verify":
        assert message in one_line_error(run_command("prepare", f"--verify={out}"))
    elif command == "data":
        assert message in one_line_error(run_command("data", f"--show={out}"))
    else:
        from llama_jax.inference.perplexity import read_shards

        mixed = replace(config, data__path=out, data__source="stdlib", data__mixture="a=1,b=1")
        with pytest.raises(UserError, match=message):
            if command == "train":
                open_data(replace(config, data__path=out), tmp_path / "unused")
            elif command == "evaluate":
                list(read_shards(out, "validation", None))
            elif command == "sources" or not named:
                source_folders(out)
            else:
                open_data(replace(mixed, data__mixture="a=0.5,b=0.5"), tmp_path / "unused")


def test_shards_of_another_kind_are_not_mixed(corpus, tmp_path, expected):
    one = shutil.copytree(expected, tmp_path / "one")
    named = f"a={corpus}/00*.txt; b={corpus}/01*.txt"
    with pytest.raises(UserError, match="holds the shards of one source without a name"):
        prepare(config_of(named), one, log=quiet)
    prepare(config_of(named), tmp_path / "two", log=quiet)
    with pytest.raises(UserError, match="is not empty and holds no token shards, but a"):
        prepare(config_of(corpus), tmp_path / "two", log=quiet)


def test_unfinished_work_of_an_earlier_version_is_named_and_left(corpus, tmp_path):
    before = tmp_path / "out.partial"
    before.mkdir()
    (before / "plan.json").write_text("[]")
    lines = []
    prepare(config_of(corpus), tmp_path / "out", log=lines.append)
    assert [line for line in lines if f"warning: {before} holds unfinished work" in line]
    assert names(before) == ["plan.json"]


CHANGES = [
    ("data__validation_fraction", 0.5, "validation_fraction (was 0.2, is 0.5)"),
    ("data__text_field", "body", "text_field (was 'text', is 'body')"),
    ("data__max_document_bytes", 999, "max_document_bytes (was 10000000, is 999)"),
    ("data__shard_tokens", 500, "shard_tokens (was 1000, is 500)"),
    ("data__part_bytes", 5000, "part_bytes (was 1000, is 5000)"),
    ("data__packing", "best_fit", "pack_len (was 0, is 16)"),
    ("model__vocab_size", 310, "vocab_size (was 300, is 310)"),
]


@pytest.mark.parametrize(("field", "value", "named"), CHANGES)
def test_changed_settings_drop_no_finished_part(
    corpus, tmp_path, expected, monkeypatch, field, value, named
):
    out, config = tmp_path / "out", config_of(corpus)
    killed_at(monkeypatch, config, out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(UserError) as caught:
        prepare(replace(config, **{field: value}), out, log=quiet)
    assert f"(3 parts are done) with another {named}; set the old value again" in str(caught.value)
    assert "--restart" in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    prepare(config, out, log=quiet)
    assert_same_folder(out, expected)


def test_files_that_changed_are_named(corpus, tmp_path, monkeypatch):
    mine = shutil.copytree(corpus, tmp_path / "corpus")
    killed_at(monkeypatch, config_of(mine), tmp_path / "out")
    (mine / "039.txt").write_text("another text " * 50)
    with pytest.raises(UserError, match="with another list of files, or their sizes"):
        prepare(config_of(mine), tmp_path / "out", log=quiet)


def test_restart_deletes_unfinished_work_only(corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    killed_at(monkeypatch, config_of(corpus), out)
    (out / "notes.txt").write_text("precious")
    other = config_of(corpus, data__validation_fraction=0.5)
    lines = []
    prepare(other, out, restart=True, log=lines.append)
    assert lines[0] == f"the unfinished work in {out} is deleted"
    assert (out / "notes.txt").read_text() == "precious"
    (out / "notes.txt").unlink()
    prepare(other, tmp_path / "twin", log=quiet)
    assert_same_folder(out, tmp_path / "twin")
    with pytest.raises(UserError, match="holds shards made with another validation_fraction"):
        prepare(config_of(corpus), out, restart=True, log=quiet)
    assert verify(out) == []


def test_a_plan_that_is_damaged_drops_nothing(corpus, tmp_path, monkeypatch):
    killed_at(monkeypatch, config_of(corpus), tmp_path / "out")
    before = names(tmp_path / "out")
    for damage in ("", "[]", '{"settings": 3}', '{"parts": 7}', "{}"):
        (tmp_path / "out" / "plan.json").write_text(damage)
        with pytest.raises(UserError, match="restart"):
            prepare(config_of(corpus), tmp_path / "out", log=quiet)
        assert names(tmp_path / "out") == before
    prepare(config_of(corpus), tmp_path / "out", restart=True, log=quiet)


def test_a_report_of_a_part_that_is_damaged(corpus, tmp_path, monkeypatch):
    killed_at(monkeypatch, config_of(corpus), tmp_path / "out")
    for damage in ("", "[]", "{}", '{"splits": {"train": 3}}'):
        (tmp_path / "out" / "part-00001.json").write_text(damage)
        with pytest.raises(UserError, match="part-00001.json is not|--restart begins again"):
            prepare(config_of(corpus), tmp_path / "out", log=quiet)
    prepare(config_of(corpus), tmp_path / "out", restart=True, log=quiet)


def test_killed_before_the_first_part(corpus, tmp_path, monkeypatch):
    """Other settings then lose no work, and need no flag."""
    killed_at(monkeypatch, config_of(corpus), tmp_path / "out", 0)
    other, lines = config_of(corpus, data__validation_fraction=0.5), []
    prepare(other, tmp_path / "out", log=lines.append)
    assert "no part of the work begun in" in lines[0]
    prepare(other, tmp_path / "twin", log=quiet)
    assert_same_folder(tmp_path / "out", tmp_path / "twin")


HOLDS = """
import sys
from llama_jax.data.prepare import workers
from llama_jax.data.prepare.job import prepare
from tests.data.prepare.test_output_folder import config_of
def stands(*arguments):
    print("it holds", flush=True)
    sys.stdin.read()
workers.write_part = stands
prepare(config_of(sys.argv[1]), sys.argv[2], log=lambda line: None)
"""


@contextlib.contextmanager
def another_process(source, out):
    """Runs a process that is preparing `source` in `out`, and kills it at the end."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", HOLDS, str(source), str(out)]
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "it holds\n"
        try:
            yield
        finally:
            process.kill()


def test_two_at_once_exclude_each_other(corpus, tmp_path, expected):
    out = tmp_path / "run" / "data"
    with another_process(corpus, out):
        before = names(out)
        flags = (*TINY_FLAGS, f"--config.data.source={corpus}")
        second = run_command("prepare", *flags, f"--output={out}")
        message = f"another process prepares shards in {out}; wait until it ends"
        assert message in one_line_error(second)
        link = tmp_path / "link"
        link.symlink_to(out)
        with pytest.raises(UserError, match="another process prepares shards in .*link"):
            prepare(config_of(corpus), link, restart=True, log=quiet)
        # `train` prepares in the same folder.
        run = run_command("train", *flags, f"--workdir={tmp_path / 'run'}")
        assert message in one_line_error(run)
        assert names(out) == before
    prepare(config_of(corpus), out, log=quiet)  # the kernel has released the lock
    assert_same_folder(out, expected)


@pytest.mark.parametrize("second", ["all", "one of them", "its folder"])
def test_named_sources_are_held_together(corpus, tmp_path, second):
    source = f"a={corpus}/00*.txt; b={corpus}/01*.txt"
    with another_process(source, tmp_path / "out"):
        target = {"its folder": tmp_path / "out" / "b"}.get(second, tmp_path / "out")
        mine = {"one of them": f"b={corpus}/02*.txt", "its folder": f"{corpus}/01*.txt"}
        with pytest.raises(UserError, match="another process prepares shards in"):
            prepare(config_of(mine.get(second, source)), target, log=quiet)


def test_complete_shards_are_found_by_many_at_once(corpus, tmp_path, expected):
    with locked(expected, "held"):
        lines = []
        prepare(config_of(corpus), expected, log=lines.append)
    assert lines == [f"{expected} is prepared already"]


def test_a_folder_that_was_removed_is_held_anew(tmp_path, monkeypatch):
    """A folder that is removed between open and lock must be made and locked again."""
    folder, flock = tmp_path / "out", fcntl.flock
    handles = []

    def removed(handle, how):
        if not handles:
            folder.rmdir()
        handles.append(os.fstat(handle))
        flock(handle, how)

    monkeypatch.setattr("llama_jax.files.fcntl.flock", removed)
    with locked(folder, "held"):
        assert os.path.samestat(handles[-1], folder.stat())
        monkeypatch.undo()
        with pytest.raises(UserError, match="held"), locked(folder, "held"):
            pass
    assert len(handles) == 2


def test_an_empty_folder_that_was_there_stays(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "there").mkdir()
    for place in ("there", "new", "there/a/b"):
        with pytest.raises(UserError, match="no text to train a tokenizer on"):
            prepare(config_of(source), tmp_path / place, log=quiet)
    assert names(tmp_path) == ["source", "there"] and names(tmp_path / "there") == []


def test_no_usable_text_needs_no_flag_when_it_is_mended(corpus, tmp_path, expected):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"body": f"text {n}"}) + "\n" for n in range(200)))
    config = config_of(source, data__tokenizer=str(expected / "tokenizer.model"))
    with pytest.raises(UserError, match="has no text to train on"):
        prepare(config, tmp_path / "out", log=quiet)
    assert not (tmp_path / "out").exists()
    prepare(replace(config, data__text_field="body"), tmp_path / "out", log=quiet)
    assert TokenDataset.open(tmp_path / "out", "train").n_tokens
