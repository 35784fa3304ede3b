"""The number of hosts changes, or one host fails to save, as docs/reliability.md promises."""

import hashlib
import json

import jax
import numpy as np
import pytest
from etils import epath

from llama_jax.checkpoint.checkpointer import Checkpointer
from llama_jax.data.training_data import open_data
from llama_jax.text.saved_tokenizer import MANIFEST
from llama_jax.train.step import jit_step
from tests.faults.failing_child import FAULTS
from tests.faults.test_damage import files_of
from tests.helpers import flip_bit, mesh_of, outputs_of, records, restored_state, start, text_config

DEVICES = 8


def run(workdir, processes, child="hosts_child", *arguments):
    """Runs a child in this many processes; returns the output of each."""
    devices = DEVICES // processes
    children = start(
        f"tests.faults.{child}", workdir, *arguments, processes=processes, devices=devices
    )
    outputs = outputs_of(children)
    assert [each.returncode for each in children] == [0] * processes, outputs
    return [out for out, _ in outputs]


def said(output, name):
    line = next(line for line in output.splitlines() if line.startswith(f"{name} "))
    return json.loads(line.removeprefix(f"{name} "))


def state_in(output):
    return said(output, "state")


@pytest.fixture(scope="module")
def hashes(shards, corpus):
    """Returns the sha256 of the first batches by step, as one host reads them."""
    config = text_config(corpus, data__path=str(shards))
    data, found = open_data(config, epath.Path("unused")).train, {}
    for step in range(8):
        batch = data.rows(step, range(config.train.global_batch))
        text = b"".join(batch[name].tobytes() for name in sorted(batch))
        found[str(step)] = hashlib.sha256(text).hexdigest()
    return found


@pytest.mark.parametrize(
    "counts",
    [
        (2, 1),
        pytest.param((1, 2), marks=pytest.mark.slow),
        pytest.param((2, 1, 4, 2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_number_of_hosts_changes(shards, hashes, tmp_path, counts):
    """State and batches are those of one host, to the last bit."""
    states, compared = [], 0
    for step, processes in enumerate(counts):
        outputs = run(tmp_path, processes, "hosts_child", shards)
        for output in outputs:
            assert state_in(output)[:2] == [step, processes]
            batches = said(output, "batches")
            assert list(batches) == [str(step + n) for n in range(3)]
            assert batches == {number: hashes[number] for number in batches}
            compared += len(batches)
            states.append(state_in(output)[2])
    assert all(state == states[0] for state in states) and len(set(hashes.values())) == 8
    print(f"{compared} of {compared} batches are equal by sha256")


@pytest.mark.slow  # it starts seven processes
def test_weights_after_training_on_another_number_of_hosts(shards, tmp_path):
    """9 steps on 2, 1 and 2 hosts with the same devices in all give the weights of a run on one."""
    weights = {}
    for counts in ((2, 1, 2), (1, 1, 1)):
        workdir = tmp_path / str(counts)
        for processes in counts:
            run(workdir, processes, "hosts_child", shards, "train")
        config = text_config("unused", data__path=str(shards))
        mesh = mesh_of((1, 1, 1, 1))
        with jax.set_mesh(mesh), Checkpointer(workdir, config) as saver:
            assert saver.newest_good_step() == 9
            state = restored_state(saver, 9, config, jit_step(config, mesh).state_shardings)
        weights[counts] = np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.params)])
    changed, one = weights.values()
    apart = np.abs(changed - one)
    ulps = apart / np.spacing(np.maximum(np.abs(changed), np.abs(one)))
    print(
        f"{np.mean(apart == 0):.0%} of {one.size} weights are equal; the median differs by "
        f"{np.median(ulps):.0f} ulp, the most by {apart.max():.2g} (of {np.abs(one).max():.2g})"
    )
    # Between hosts, gradients are summed in another order than within one process.
    assert np.abs(one).max() > 0.5 and apart.max() < 1e-5


@pytest.mark.slow  # it starts five processes
def test_damage_that_one_of_two_reads(shards, tmp_path):
    first, second = map(state_in, run(tmp_path, 2, "hosts_child", shards))
    assert first == second and first[:2] == [0, 2]
    (alone,) = map(state_in, run(tmp_path, 1, "hosts_child", shards))
    assert alone == [1, 1, first[2]]
    # Process 1 reads every second file of the manifest.
    files = [path for path in files_of(tmp_path, 2) if path.name != MANIFEST]
    flip_bit(files[1], 3)
    outputs = run(tmp_path, 2, "hosts_child", shards)
    assert [state_in(output) for output in outputs] == [[1, 2, first[2]]] * 2
    name = files[1].relative_to(tmp_path / "checkpoints" / "2").as_posix()
    assert f"damaged checkpoint 2: {name} holds other bytes" in outputs[0]
    assert "damaged" not in outputs[1]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["1", "2", "2.damaged"]


@pytest.mark.slow  # it starts two processes
def test_a_save_that_fails_on_one_of_two(tmp_path):
    """All processes report the failure at once, training goes on, and the next save works."""
    outputs = run(tmp_path, 2, "failing_child")
    for output in outputs:
        lines = output.splitlines()
        waits = [float(line.split()[1]) for line in lines if line.startswith("waited ")]
        assert len(waits) == len(FAULTS)
        for step, (process, _) in enumerate(FAULTS.values(), start=2):
            (told,) = (line for line in lines if f"warning: saving step {step} to " in line)
            assert f"{tmp_path}/checkpoints failed: " in told
            # The process that failed reports its own error, the others name the process.
            if f"process {process}: " not in told:
                assert output is outputs[process]
        assert f"trained {len(FAULTS) + 2}" in lines
    print("seconds until it was told:", waits)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "6"]
    assert [line["step"] for line in records(tmp_path)] == [2, 3, 4, 5]
