"""Row 12 of docs/reliability.md: another number of hosts, and what only one of them fails to do."""

import json
import os
import subprocess
import sys

import pytest

from llama_jax import manifest
from tests.faults.failing_child import FAULTS
from tests.faults.test_damage import files_of
from tests.helpers import ROOT, flip_bit, records
from tests.test_processes import free_port

DEVICES = 8


def run(workdir, processes, child="hosts_child", *arguments, timeout=300):
    """Runs a child on so many processes; returns what each said."""
    port = free_port()
    children = []
    for number in range(processes):
        env = {
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // processes}",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        if processes > 1:
            env |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(number),
            }
        started = subprocess.Popen(
            [sys.executable, "-m", f"tests.faults.{child}", workdir, *arguments],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        children.append(started)
    try:
        outputs = [each.communicate(timeout=timeout) for each in children]
    finally:
        for each in children:
            each.kill()
    assert [each.returncode for each in children] == [0] * processes, outputs
    return [out for out, _ in outputs]


def state_in(output):
    line = next(line for line in output.splitlines() if line.startswith("state "))
    return json.loads(line.removeprefix("state "))


@pytest.mark.slow  # five starts of a process
def test_hosts_2_to_1_to_2_and_damage_that_one_of_them_reads(tmp_path):
    first, second = map(state_in, run(tmp_path, 2))
    assert first == second and first[:2] == [0, 2]
    (alone,) = map(state_in, run(tmp_path, 1))
    assert alone == [1, 1, first[2]]
    # Process 1 reads every second file of the manifest.
    files = [path for path in files_of(tmp_path, 2) if path.name != manifest.NAME]
    flip_bit(files[1], 3)
    outputs = run(tmp_path, 2)
    assert [state_in(output) for output in outputs] == [[1, 2, first[2]]] * 2
    name = files[1].relative_to(tmp_path / "checkpoints" / "2").as_posix()
    assert f"damaged checkpoint 2: {name} holds other bytes" in outputs[0]
    assert "damaged" not in outputs[1]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["1", "2", "2.damaged"]


@pytest.mark.slow  # two starts of a process
def test_a_save_that_fails_on_one_of_two(tmp_path):
    """All of them tell it at once, training goes on, and the next save works."""
    outputs = run(tmp_path, 2, "failing_child", timeout=150)
    for output in outputs:
        lines = output.splitlines()
        waits = [float(line.split()[1]) for line in lines if line.startswith("waited ")]
        assert len(waits) == len(FAULTS) and max(waits) < 20
        for step, (process, _) in enumerate(FAULTS.values(), start=2):
            (told,) = (line for line in lines if f"warning: saving step {step} to " in line)
            assert f"{tmp_path}/checkpoints failed: " in told
            # Who has failed tells its own error, the others who it was.
            if f"process {process}: " not in told:
                assert output is outputs[process]
        assert f"trained {len(FAULTS) + 2}" in lines
    print("seconds until it was told:", waits)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "6"]
    assert [line["step"] for line in records(tmp_path)] == [2, 3, 4, 5]
