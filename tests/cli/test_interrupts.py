import os
import signal
import subprocess
import sys

import pytest

from llama_jax.cli import interrupts
from tests.helpers import ROOT

COMMANDS = ("train", "prepare", "generate", "evaluate", "convert", "checkpoint", "data", "plan")
# Stands in for a library that swallows a Ctrl-C during its import.
LIBRARY = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(600)
except BaseException:
    pass
raise SystemExit("went on")
"""


def python(folder, *arguments):
    """Runs Python with an `absl` that raises Ctrl-C; `folder` comes before installed packages."""
    (folder / "absl.py").write_text(LIBRARY)
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_during_the_imports_of_a_command(command, tmp_path):
    process = python(tmp_path, "-m", f"llama_jax.{command}", "--help")
    assert (process.returncode, process.stderr) == (130, "\ninterrupted\n")
    assert process.stdout == ""


def test_ctrl_c_while_the_config_is_read_is_the_same(tmp_path):
    flags = (f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run")
    code = (
        "import sys, runpy; sys.argv = ['llama_jax.train', *sys.argv[1:]];"
        "runpy.run_module('llama_jax.train', run_name='__main__', alter_sys=True)"
    )
    (tmp_path / "mine.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *flags]
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert (process.returncode, process.stderr) == (130, "\ninterrupted\n")


def test_an_import_by_a_program_touches_no_signal(tmp_path):
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("import llama_jax.cli.command, llama_jax.config\n")
    (package / "run.py").write_text(
        "import signal\nassert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "mine.run"]
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupts.end_quietly()
        interrupts.raise_again()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupts.end_quietly()
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        interrupts.raise_again()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
