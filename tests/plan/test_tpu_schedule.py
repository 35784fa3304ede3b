import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest

from llama_jax.errors import UserError
from llama_jax.hardware.chips import GIB
from llama_jax.hardware.topology import parse_topology
from llama_jax.model.cost import flops_per_token, parameter_count
from llama_jax.plan import tpu_schedule
from llama_jax.plan.tpu_schedule import available, schedule
from tests.helpers import ROOT, TINY, replace
from tests.test_config import load

PYTHON = sys.executable
SLICE = parse_topology("v5p-8")
CONFIG = replace(TINY, train__global_batch=32)


def test_gpus_have_no_schedule(monkeypatch):
    monkeypatch.setattr(tpu_schedule.importlib.util, "find_spec", lambda name: object())
    assert available(SLICE) and not available(parse_topology("h100:1x8"))
    monkeypatch.setattr(tpu_schedule.importlib.util, "find_spec", lambda name: None)
    assert not available(SLICE)


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Returns a function that replaces the compiling process by a script."""

    def make(lines):
        path = tmp_path / "compiler"
        path.write_text(f"#!{PYTHON}\nimport json, os, pathlib, sys, time\n{lines}\n")
        path.chmod(0o755)
        monkeypatch.setattr(tpu_schedule.sys, "executable", str(path))

    return make


def test_what_the_compiler_answers(compiler):
    compiler("print('a library speaks'); print(json.dumps({'total': 97 * 2**30}))")
    found = schedule(CONFIG, SLICE)
    assert (found.total, found.fits, found.seconds) == (97 * GIB, False, None)
    compiler("print(json.dumps({'error': 'too many heads'}))")
    with pytest.raises(UserError, match="^too many heads$"):
        schedule(CONFIG, SLICE)
    compiler("sys.stderr.write('Unknown flag --xla_a\\n\\n'); os.abort()")
    with pytest.raises(UserError, match="ended with status -6: Unknown flag --xla_a$"):
        schedule(CONFIG, SLICE)
    compiler("pass")
    with pytest.raises(UserError, match="ended with status 0: it gives no reason"):
        schedule(CONFIG, SLICE)


def test_the_compiler_is_given_the_flags_of_the_user(compiler, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_own=1")
    compiler(
        "asked = json.load(sys.stdin)\n"
        "assert os.environ['XLA_FLAGS'] == '--xla_own=1'\n"
        "assert asked['config']['model']['dim'] and asked['topology'] == 'v5p:2x2x1'\n"
        f"assert sys.argv[1:] == ['-m', {tpu_schedule.__name__!r}]\n"
        f"assert os.environ['PYTHONPATH'].split(os.pathsep)[0] == {str(ROOT)!r}\n"
        "print(json.dumps({'error': 'as asked'}))"
    )
    with pytest.raises(UserError, match="as asked"):
        schedule(CONFIG, SLICE)


def ended(process_id):
    """Returns whether a process ends within ten seconds."""
    for _ in range(200):
        state = pathlib.Path(f"/proc/{process_id}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def written(path):
    """Returns the content of a file as soon as it has some."""
    for _ in range(600):
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.05)
    raise AssertionError(f"nothing in {path}")


def test_an_interrupt_leaves_no_process_behind(compiler, tmp_path):
    file = tmp_path / "pid"
    compiler(
        f"folder = json.load(sys.stdin)['folder']\n"
        f"pathlib.Path({str(file)!r}).write_text(f'{{os.getpid()}} {{folder}}')\n"
        f"os.kill(os.getppid(), {int(signal.SIGINT)})\n"
        "time.sleep(600)"
    )
    with pytest.raises(KeyboardInterrupt):
        schedule(CONFIG, SLICE)
    process_id, folder = written(file).split()
    assert ended(process_id) and not os.path.exists(folder)


def test_a_compiler_that_does_not_end_is_ended(compiler, tmp_path, monkeypatch):
    file = tmp_path / "pid"
    compiler(f"pathlib.Path({str(file)!r}).write_text(str(os.getpid())); time.sleep(600)")
    monkeypatch.setattr(tpu_schedule, "_PATIENCE", 5)
    with pytest.raises(UserError, match="has not scheduled the step in 5 s"):
        schedule(CONFIG, SLICE)
    assert ended(written(file))


WATCH = """
import os, pathlib, sys
from llama_jax.plan import compilation, tpu_schedule
pathlib.Path(sys.argv[2]).write_text(str(os.getpid()))
tpu_schedule._watch(pathlib.Path(sys.argv[1]), int(sys.argv[3]))
"""


def watcher(folder, file, parent):
    arguments = [sys.executable, "-c", WATCH, str(folder), str(file), str(parent)]
    return subprocess.Popen(arguments, cwd=ROOT)


def test_the_compiler_ends_with_its_schedule(tmp_path):
    folder = tmp_path / "dump"
    folder.mkdir()
    process = watcher(folder, tmp_path / "pid", os.getpid())
    written(tmp_path / "pid")
    (folder / "module_0.jit_train_step.cl_1.after_optimizations.txt").touch()
    time.sleep(0.5)
    assert process.poll() is None  # the last file is still missing
    last = "module_0.jit_train_step.cl_1.after_optimizations_after_buffer_assignment.txt"
    (folder / last).touch()
    assert process.wait(timeout=60) == 0


def test_the_compiler_ends_with_the_process_that_asked(tmp_path):
    """It ends even if that process is killed, and removes the folder."""
    folder = tmp_path / "dump"
    folder.mkdir()
    process = watcher(folder, tmp_path / "pid", os.getpid() + 1)
    assert process.wait(timeout=60) == 1
    assert not folder.exists()


@pytest.mark.tpu
def test_a_schedule_of_the_tpu_compiler():
    """The model has two layers; with all sequences in one microbatch it does not fit."""
    machine = parse_topology("v5e:2x2")
    model = {"n_layers": 2, "n_kv_heads": 8, "n_heads": 8, "ffn_dim": 2048, "dim": 1024}
    config = replace(
        load("7b")[0],
        **{f"model__{name}": size for name, size in model.items()},
        **{"model__vocab_size": 4096, "train__global_batch": 8},
    )
    found = schedule(config, machine)
    assert found.fits and found.seconds > found.exposed >= 0
    assert 12 * parameter_count(config.model) / 4 < found.total < GIB
    tokens = config.train.tokens_per_step / 4
    needed = flops_per_token(config.model, config.lora, config.train.seq_len) * tokens
    assert needed < found.flops < 1.5 * needed
    large = schedule(replace(config, train__global_batch=8192), machine)
    assert not large.fits and large.seconds is None
    assert large.total > machine.chip.hbm_bytes
    with pytest.raises(UserError, match=r"mesh|divide"):
        schedule(replace(config, mesh__data=3), machine)


def test_a_schedule_is_read_without_cycles(monkeypatch, tmp_path):
    """The program is a product at 0.8 of the peak, and a gather that nothing hides."""
    name = "module_0000.jit_train_step.cl_1.after_optimizations"
    (tmp_path / f"{name}-memory-usage-report.txt").write_text(
        "Memory Space: default (color=0)\nTotal bytes: 5169836928 (4.81GiB)\n\n"
        "Memory Space: vmem (color=1)\nTotal bytes: 49741824 (47.44MiB)\n"
    )
    (tmp_path / f"{name}.txt").write_text(
        "HloModule jit_train_step\n\n"
        "ENTRY %main (p: bf16[4096,4096]) -> bf16[4096,4096] {\n"
        "  %p = bf16[4096,4096]{1,0} parameter(0)\n"
        "  %all-gather.1 = bf16[4096,4096]{1,0} all-gather(%p), replica_groups={{0,1,2,3}}\n"
        "  ROOT %dot.1 = bf16[4096,4096]{1,0} dot(%p, %p), lhs_contracting_dims={1}, "
        "rhs_contracting_dims={0}\n}\n"
    )
    monkeypatch.setattr(tpu_schedule, "topology_devices", lambda topology: jax.devices()[:4])
    found = tpu_schedule._read(CONFIG, SLICE, tmp_path)
    assert found.total == 5169836928 and found.fits
    assert found.flops == 2 * 4096**3
    assert found.exposed > 4096**2 * 2 * 3 / 4 / SLICE.chip.link_bandwidth
    product = found.flops / (0.8 * SLICE.chip.peak_flops)
    assert found.seconds == pytest.approx(product + found.exposed)
    small = dataclasses.replace(SLICE, chip=dataclasses.replace(SLICE.chip, hbm_bytes=2**30))
    assert not tpu_schedule._read(CONFIG, small, tmp_path).fits
