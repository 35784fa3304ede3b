"""`prepare` leaves no process behind, however it is ended, and the same command goes on."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from llama_jax.data.prepare.job import prepare
from tests.data.prepare.test_job import assert_same_folder, quiet
from tests.helpers import ROOT, TINY_FLAGS, text_config, until, write_corpus

SLOW = "tests.faults.slow_prepare"


def with_hangups(handled, *arguments):
    """Returns a Python command that sets this handler of SIGHUP; the tests may run under nohup."""
    code = f"import os, signal, sys; signal.signal(signal.SIGHUP, signal.{handled}); "
    code += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    return [sys.executable, "-c", code, *arguments]


class Session:
    """Runs a command in its own session, so that all of its processes can be found."""

    def __init__(self, module, *arguments, **environment):
        self.process = subprocess.Popen(
            with_hangups("SIG_DFL", "-m", module, *map(str, arguments)),
            cwd=ROOT,
            env={**os.environ, **environment},
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def until(self, what):
        """Waits until `what()` is true, while the command runs."""
        until(lambda: what() or self.process.poll() is not None)
        assert self.process.poll() is None, self.process.communicate()

    def processes(self):
        """Returns the command lines of the running processes, by process id."""
        found = {}
        for path in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                state, _, _, session = (path / "stat").read_text().rsplit(")", 1)[1].split()[:4]
                if int(session) == self.process.pid and state != "Z":
                    found[int(path.name)] = (path / "cmdline").read_text()
            except (FileNotFoundError, ProcessLookupError):
                pass  # the process has ended
        return found

    def of(self, what):
        """Returns the ids of the processes with `what` in their command lines."""
        return [pid for pid, command in self.processes().items() if what in command]

    def end(self):
        """Returns status, stdout and stderr when all processes have ended."""
        out, errors = self.process.communicate(timeout=600)
        until(lambda: not self.processes())
        return self.process.returncode, out, errors

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.process.communicate()


def flags(source, out):
    settings = ("part_bytes=1000", "workers=2", f"source={source}", "shard_tokens=1000")
    return (*TINY_FLAGS, *(f"--config.data.{one}" for one in settings), f"--output={out}")


def config_of(corpus):
    parts = {"data__part_bytes": 1000, "data__workers": 1, "train__seq_len": 32}
    return text_config(corpus, **parts)


def halfway(corpus, tmp_path, command="llama_jax.prepare", arguments=None):
    """Starts a command that finishes two parts and then waits in two others."""
    gate = tmp_path / "go"
    slow = {"SLOW_FROM": "2", "SLOW_UNTIL": str(gate), "SLOW_COMMAND": command}
    return Session(SLOW, *(arguments or flags(corpus, tmp_path / "out")), **slow)


def is_halfway(tmp_path):
    folder = tmp_path / "out"
    done = [(folder / f"part-0000{index}.json").exists() for index in range(2)]
    return all(done) and (tmp_path / "go2").exists() and (tmp_path / "go3").exists()


def goes_on(corpus, tmp_path):
    """Checks that the same call keeps finished parts and writes what an undisturbed run writes."""
    lines = []
    prepare(config_of(corpus), tmp_path / "out", log=lines.append)
    assert re.search(r": [2-9]\d* of \d+ parts are done", lines[0])
    prepare(config_of(corpus), tmp_path / "expected", log=quiet)
    assert_same_folder(tmp_path / "out", tmp_path / "expected")


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.mark.parametrize(
    ("number", "send"),
    [
        *((number, os.killpg) for number in SIGNALS),
        (signal.SIGTERM, os.kill),
        *(pytest.param(n, os.kill, marks=pytest.mark.slow) for n in SIGNALS[1:]),
    ],
)
def test_a_signal_ends_all_with_one_line(corpus, tmp_path, number, send):
    with halfway(corpus, tmp_path) as session:
        session.until(lambda: is_halfway(tmp_path))
        send(session.process.pid, number)
        status, out, errors = session.end()
    assert status == 128 + number
    assert errors == f"{number.name}: stopped; run the same command again to continue\n"
    assert "2 of " in out.splitlines()[-1]
    goes_on(corpus, tmp_path)


def test_a_signal_while_the_workers_start(corpus, tmp_path):
    """Ctrl-C on a terminal reaches workers that are still importing."""
    with halfway(corpus, tmp_path) as session:
        session.until(lambda: session.of("spawn_main"))
        os.killpg(session.process.pid, signal.SIGINT)
        status, _, errors = session.end()
    assert status == 130
    assert errors == "SIGINT: stopped; run the same command again to continue\n"


def test_nothing_outlives_a_process_that_is_killed(corpus, tmp_path):
    with halfway(corpus, tmp_path) as session:
        session.until(lambda: is_halfway(tmp_path))
        assert len(session.of("spawn_main")) == 2
        session.process.kill()
        assert session.end()[0] == -signal.SIGKILL
    goes_on(corpus, tmp_path)


def test_a_killed_worker_is_named_and_ends_the_others(corpus, tmp_path):
    with halfway(corpus, tmp_path) as session:
        session.until(lambda: is_halfway(tmp_path))
        os.kill(session.of("spawn_main")[0], signal.SIGKILL)
        status, _, errors = session.end()
    assert status == 1
    assert re.fullmatch(r"error: a worker process was killed \(out of memory\?\); .*\n", errors), (
        errors
    )
    goes_on(corpus, tmp_path)


def test_what_is_ignored_stays_so(corpus, tmp_path):
    """`nohup` keeps a command alive when the terminal closes."""
    slow = {"SLOW_FROM": "2", "SLOW_UNTIL": str(tmp_path / "go")}
    command = with_hangups("SIG_IGN", "-m", SLOW, *flags(corpus, tmp_path / "out"))
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **slow, "SLOW_COMMAND": "llama_jax.prepare"},
        start_new_session=True,
    )
    until(lambda: is_halfway(tmp_path))
    os.killpg(process.pid, signal.SIGHUP)
    (tmp_path / "go").touch()
    assert process.wait() == 0


@pytest.mark.parametrize("send", [os.killpg, pytest.param(os.kill, marks=pytest.mark.slow)])
def test_train_that_prepares(corpus, tmp_path, send):
    place = (f"--config.data.source={corpus}", f"--workdir={tmp_path / 'run'}")
    data = ("--config.data.part_bytes=1000", "--config.data.workers=2")
    (tmp_path / "run").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "run" / "data")
    command = ("llama_jax.train", (*TINY_FLAGS, *place, *data))
    with halfway(corpus, tmp_path, *command) as session:
        session.until(lambda: is_halfway(tmp_path))
        send(session.process.pid, signal.SIGTERM)
        status, out, errors = session.end()
    assert status == 0 and errors == ""
    assert "SIGTERM: stopped, nothing to save; run the same command again" in out


def test_the_training_of_a_tokenizer_ends_at_a_signal(corpus, tmp_path):
    """The training is one call of a library, during which Python handles no signal."""
    with Session("llama_jax.prepare", *flags(corpus, tmp_path / "out")) as session:
        session.until(lambda: session.of("tokenizer_process"))
        (child,) = session.of("tokenizer_process")
        os.kill(child, signal.SIGSTOP)  # the training cannot finish before the signal
        os.kill(session.process.pid, signal.SIGTERM)
        status, _, errors = session.end()
    assert status == 128 + signal.SIGTERM
    assert errors == "SIGTERM: stopped; run the same command again to continue\n"
    prepare(config_of(corpus), tmp_path / "out", log=quiet)


def test_the_training_of_a_tokenizer_ends_with_its_parent(tmp_path):
    """The parent is killed during the library's work, which takes minutes here."""
    corpus = write_corpus(tmp_path, 1)
    texts = "".join(chr(0x4E00 + (n * n * 7919 + n) % 20_000) for n in range(1_500_000))
    (corpus / "large.txt").write_text(texts)
    large = "--config.model.vocab_size=30000"
    with Session("llama_jax.prepare", *flags(corpus, tmp_path / "out"), large) as session:
        session.until(lambda: session.of("tokenizer_process"))
        session.process.kill()
        assert session.end()[0] == -signal.SIGKILL


def test_templates_end_with_their_workers(corpus, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.model")
    record = {"instruction": "a?", "output": "b"}
    source = tmp_path / "x.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for _ in range(200)))
    data = (f"tokenizer={tmp_path / 't.model'}", "template=alpaca", "packing=best_fit")
    more = tuple(f"--config.data.{one}" for one in data)
    arguments = (*flags(source, tmp_path / "out"), *more)
    with halfway(corpus, tmp_path, arguments=arguments) as session:
        session.until(lambda: is_halfway(tmp_path))
        assert session.of("jinja_process")
        session.process.kill()
        session.end()
