"""The average of several steps is that of their weights, and bad input is an error in one line."""

import pathlib
import shutil
import weakref

import jax
import numpy as np
import pytest
from etils import epath

from llama_jax.checkpoint import manifest, saved_step
from llama_jax.checkpoint.saved_step import DamagedCheckpoint
from llama_jax.config import LoraConfig
from llama_jax.errors import UserError
from llama_jax.inference.loaded_model import open_model
from llama_jax.interchange import formats
from llama_jax.interchange.averaged import AveragedSource, open_average
from llama_jax.interchange.hf import HfSource
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.transfer import convert
from tests.helpers import (
    TINY,
    flip_bit,
    one_line_error,
    random_adapters,
    random_params,
    replace,
    run_command,
    save_checkpoint,
)
from tests.interchange.test_transfer import Memory, assert_same

CONFIG = replace(TINY, model__vocab_size=300, train__keep_checkpoints=9, train__steps=12)
STEPS = (4, 8, 12)
PARAMS = {step: random_params(CONFIG.model, seed=step) for step in STEPS}


def mean(trees):
    """Returns the mean that NumPy computes in float64."""
    return jax.tree.map(
        lambda *leaves: np.mean(leaves, axis=0, dtype=np.float64).astype(np.float32), *trees
    )


def mean_of(*steps):
    return mean([PARAMS[step] for step in steps])


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    """Returns a work directory with three saved steps; tests must not change it."""
    folder = epath.Path(tmp_path_factory.mktemp("run"))
    for step in STEPS:
        save_checkpoint(folder, CONFIG, PARAMS[step], tokenizer.model_bytes, step)
    return folder


@pytest.fixture
def copy(run, tmp_path):
    """Returns a copy of the work directory."""
    return epath.Path(shutil.copytree(run, tmp_path / "copy"))


# The average.


@pytest.mark.parametrize(
    ("average", "steps"),
    [("2", (8, 12)), ("3", STEPS), ("4,12", (4, 12)), ("12,4", (4, 12))],
)
def test_the_average_is_that_of_numpy(run, average, steps):
    source = open_average(run, average)
    assert source.steps == steps
    assert_same(source, mean_of(*steps))
    assert source.description.step == steps[-1]


@pytest.mark.parametrize("steps", [(4, 8), (4, 8, 12)])
def test_the_average_of_equal_weights_has_their_bits(steps):
    params = random_params(TINY.model)
    params["final_norm"][:3] = -0.0, 1e-45, 3e38  # their float32 sum is 0, or overflows
    assert_same(AveragedSource({step: Memory(TINY, params) for step in steps}), params)


def test_one_array_is_in_memory_besides_the_sum():
    """Each array is freed before the next one is read."""
    given = []

    class Counted(Memory):
        def read(self, path, layer):
            assert [array for array in given if array() is not None] == []
            array = super().read(path, layer).copy()
            given.append(weakref.ref(array))
            return array

    params = random_params(TINY.model)
    source = AveragedSource({step: Counted(TINY, params) for step in STEPS})
    for path, layer in formats.paths_and_layers(TINY.model):
        source.read(path, layer)
    assert len(given) == 3 * len(list(formats.paths_and_layers(TINY.model)))


def test_adapters_are_merged_before_they_are_averaged(tmp_path):
    save_checkpoint(tmp_path / "base", TINY, random_params(TINY.model), b"")
    lora = LoraConfig(rank=2)
    config = replace(TINY, init_from=f"ckpt:{tmp_path / 'gone'}", lora=lora)
    for step in (4, 8):
        save_checkpoint(tmp_path / "run", config, random_adapters(config, seed=step), b"", step)
    place = epath.Path(tmp_path / "run")
    base = f"ckpt:{tmp_path / 'base'}"
    average = open_average(place, "2", base)
    merged = [open_source("ckpt", place / "checkpoints" / str(n), base=base) for n in (4, 8)]
    for path, layer in formats.paths_and_layers(TINY.model):
        want = np.mean([one.read(path, layer) for one in merged], axis=0, dtype=np.float64)
        np.testing.assert_array_equal(average.read(path, layer), want.astype(np.float32))
    assert average.description.config.lora == LoraConfig()
    with pytest.raises(UserError, match="gone, the base of .*/4, does not exist"):
        open_average(place, "2")


def test_the_command_writes_the_average(run, tmp_path):
    """The folder of the steps will do; the model card names the steps."""
    process = run_command(
        *("convert", f"--source=ckpt:{run}/checkpoints", f"--target=hf:{tmp_path}/hf"),
        "--average=3",
    )
    assert process.returncode == 0, process.stderr
    first, second, *_ = process.stdout.splitlines()
    assert first == "average of steps 4, 8, 12" and second.startswith(f"wrote {tmp_path}/hf: ")
    assert_same(HfSource(epath.Path(tmp_path / "hf")), mean_of(*STEPS))
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "## Training\n\nThe weights are the average of steps 4, 8, 12. The table" in card
    assert "up to step 12; " in card and "| steps | 12 of 12 |" in card


def test_a_checkpoint_of_the_average_is_one_like_others(run, tmp_path):
    """The step is complete, and what `generate` and `evaluate` open."""
    convert(open_average(run, "4,8"), "ckpt", tmp_path / "average")
    assert_same(open_source("ckpt", epath.Path(tmp_path / "average")), mean_of(4, 8))
    assert [reason for _, reason in saved_step.check_steps(epath.Path(tmp_path / "average"))] == [
        ""
    ]
    opened = open_model(tmp_path / "average", "tensor=1")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(opened.params), mean_of(4, 8))
    assert opened.encode("abc")


# Meta's pickles need torch.
@pytest.mark.parametrize("target", ["hf", pytest.param("meta", marks=pytest.mark.parity)])
def test_other_targets_have_the_dtype_that_is_asked_for(run, tmp_path, target):
    convert(open_average(run, "2"), target, tmp_path / "out", "bfloat16")
    wanted = jax.tree.map(lambda x: x.astype("bfloat16"), mean_of(8, 12))
    assert_same(open_source(target, epath.Path(tmp_path / "out"), context=16), wanted)


# Errors.


BAD = "--average must be a number of steps, at least 2, such as 5, or a list of steps, such as 400,"
HELD = "/checkpoints holds steps 4, 8, 12"


@pytest.mark.parametrize(
    ("average", "message"),
    [
        *[(text, f"{BAD}500,600; got {text!r}") for text in ("", "0", "1", "x", "-2", "4,", "2.5")],
        ("٣", BAD),
        ("9" * 5000, BAD),
        ("4,8,4", "--average names step 4 twice"),
        ("4,8,08", "--average names step 8 twice"),
        ("4", "--average=4 needs 4 saved steps; "),
        ("4", f"{HELD}; a run keeps the newest train.keep_checkpoints steps"),
        ("4,5,12,13", "--average names steps that are not saved: 5, 13; "),
        ("4,5", HELD),
    ],
)
def test_steps_that_cannot_be_averaged(run, average, message):
    with pytest.raises(UserError) as error:
        open_average(run, average)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--source=hf:{run}", "--target=hf:{out}"), "--average reads steps of a run"),
        (("--source=ckpt:{run}", "--target=peft:{out}"), "--target must be hf, meta or ckpt"),
        (
            ("--source=ckpt:{run}/checkpoints/8", "--target=hf:{out}"),
            "reads several steps of a work directory, but {run}/checkpoints/8 is a single step",
        ),
        (("--source=ckpt:{run}/gone", "--target=hf:{out}"), "{run}/gone does not exist"),
        (
            ("--source=ckpt:{out}", "--target=hf:{out}/target"),
            "{out}/checkpoints holds no step; a run keeps the newest train.keep_checkpoints",
        ),
    ],
)
def test_places_that_cannot_be_averaged(run, tmp_path, flags, message):
    out = tmp_path / "out"
    if "ckpt:{out}" in flags[0]:
        out.mkdir()
    before = sorted(tmp_path.rglob("*"))
    flags = [flag.format(run=run, out=out) for flag in flags]
    process = run_command("convert", *flags, "--average=2")
    assert message.format(run=run, out=out) in one_line_error(process)
    assert sorted(tmp_path.rglob("*")) == before


def test_different_models_are_refused(copy, tokenizer):
    """What only says how the model computes may differ."""
    same = replace(CONFIG, model__compute_dtype="bfloat16")
    save_checkpoint(copy, same, PARAMS[12], tokenizer.model_bytes, 16)
    assert open_average(copy, "2").steps == (12, 16)
    other = replace(CONFIG, model__rope_theta=5e5)
    save_checkpoint(copy, other, PARAMS[12], tokenizer.model_bytes, 20)
    with pytest.raises(
        UserError,
        match=r"steps 8 and 20 hold different models: model.rope_theta is 10000.0 and 500000.0$",
    ):
        open_average(copy, "8,20")


def test_weights_that_are_not_those_of_their_step_are_refused(copy, tmp_path):
    """The files are whole, but the fingerprints are those of other weights."""
    step = copy / "checkpoints" / "8"
    shutil.rmtree(step / "params")
    shutil.copytree(copy / "checkpoints" / "4" / "params", step / "params")
    manifest.write(step)
    with pytest.raises(DamagedCheckpoint, match=r"checkpoints/8 .*embed \(fingerprint\)"):
        convert(open_average(copy, "3"), "hf", tmp_path / "hf")
    assert not list(tmp_path.glob("hf*"))


def test_one_damaged_step_spoils_the_average(copy, tmp_path):
    """A bit of the weights is found when they are read, the others are before."""
    step = copy / "checkpoints" / "8"
    file = max(pathlib.Path(step / "params").rglob("*"), key=lambda path: path.stat().st_size)
    flip_bit(file, file.stat().st_size * 4)
    with pytest.raises(DamagedCheckpoint, match="checkpoints/8"):
        convert(open_average(copy, "3"), "hf", tmp_path / "hf")
    assert not list(tmp_path.glob("hf*"))
    assert open_average(copy, "4,12").steps == (4, 12)
    file.unlink()
    with pytest.raises(DamagedCheckpoint, match="checkpoints/8 differs from what was saved"):
        open_average(copy, "3")
