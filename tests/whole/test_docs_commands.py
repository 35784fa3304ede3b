"""The pages on changing a run: their commands work as printed, and print what the pages show.

Each page runs in a folder of its own, from top to bottom. There `configs/tiny.py` is the shipped
config with a smaller model and a small source, so that steps and learning rates are those of the
page, and losses are not.
"""

import json
import re
import shlex
import subprocess

import pytest

from llama_jax.config import from_json
from llama_jax.train.schedule import make_schedule
from tests.helpers import ROOT, records, run_module, write_corpus

PROGRAM = "python -m "
ERROR = "error: "
SMALLER = """
    config.model.vocab_size = 300
    config.model.dim = 32
    config.model.n_layers = 2
    config.model.ffn_dim = 48
    config.train.seq_len = 32
    config.train.loss_chunk = 32
    config.data.source = {source!r}
    config.data.validation_fraction = 0.2
    config.train.sample_prompt = ""  # a prompt would have the decoder compiled, too
    return config
"""
# What differs between two machines, or between the two configs; in a page, "..." is anything.
VARIES = (
    *(r"(loss |grad_norm )[\d.]+", r"()[\d,]+(?= tokens/s)", r"(ETA )\S+"),
    *(r"(epochs )[\d.]+", r"(fingerprint )\w+", r"()\.\.\."),
)


def blocks(page):
    """Returns the blocks of a page: (line number, commands, the lines that they shall print)."""
    found, text = [], (ROOT / "docs" / page).read_text()
    for block in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.M | re.S):
        language, body = block.groups()
        if language:  # such as a piece of a config
            continue
        if body.startswith((PROGRAM, "cat ", "mv ")):
            commands = body.replace("\\\n", " ").splitlines()
            found.append((text[: block.start()].count("\n") + 2, commands, []))
        else:
            found[-1][2].extend(body.splitlines())
    return found


def pattern_of(line):
    """Returns a pattern for a printed line that ignores what varies."""
    spots = sorted(
        (found.end(1), found.end()) for each in VARIES for found in re.finditer(each, line)
    )
    pattern, at = "", 0
    for begin, end in spots:
        pattern, at = pattern + re.escape(line[at:begin]) + ".+", end
    return re.compile(pattern + re.escape(line[at:]) + r"\s*")


def run_page(page, folder):
    """Runs all commands of a page, and compares what they print."""
    for number, commands, shown in blocks(page):
        place, printed = f"docs/{page}, line {number}", ""
        fails = bool(shown) and shown[0].startswith(ERROR)
        for command in commands:
            words = shlex.split(command, comments=True)
            if command.startswith(PROGRAM):
                done = run_module(*words[2:], cwd=folder)
            else:
                done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
            assert done.returncode == fails, f"{place}: {command}\n{done.stdout}{done.stderr}"
            printed += done.stdout + done.stderr
        lines = iter(printed.splitlines())
        for line in shown:
            pattern = pattern_of(line)
            # `any` reads on from the line after the one that matched last: the order counts, too.
            assert any(pattern.fullmatch(each) for each in lines), f"{place}: {line}\n{printed}"


def changes(workdir):
    return [json.loads(line) for line in (workdir / "changes.jsonl").read_text().splitlines()]


def losses(workdir):
    """Returns the last record of each step that a run has logged."""
    return {each["step"]: each for each in records(workdir) if "loss" in each}


def config_of(workdir):
    return from_json((workdir / "config.json").read_text())


@pytest.fixture
def folder(tmp_path):
    """Returns a folder with a smaller configs/tiny.py, and with the folders that pages read."""
    for name in ("stdlib", "llama_jax", "docs", "benchmarks", "configs"):
        (tmp_path / name).mkdir()
        if name != "configs":
            write_corpus(tmp_path / name)
    shipped = (ROOT / "configs" / "tiny.py").read_text()
    changed = shipped.replace(
        "    return config\n", SMALLER.format(source=str(tmp_path / "stdlib"))
    )
    assert changed != shipped
    (tmp_path / "configs" / "tiny.py").write_text(changed)
    return tmp_path


@pytest.mark.slow
def test_extend(folder):
    run_page("extend.md", folder)
    run, short = folder / "runs" / "extend", folder / "runs" / "shorter"
    assert changes(run) == [{"step": 200, "changes": {"train.steps": [200, 300]}}]
    assert list(losses(run)) == list(range(10, 301, 10))
    assert list(losses(short)) == [210, 220, 230, 240, 250]
    # The batches are those of the longer run: the loss of the first new steps is nearly the same.
    assert losses(short)[210]["loss"] == pytest.approx(losses(run)[210]["loss"], abs=0.05)
    assert config_of(run).at(199).train.steps == 200 and config_of(run).at(200).train.steps == 300


@pytest.mark.slow
def test_cool_down(folder):
    run_page("cool_down.md", folder)
    run, short = folder / "runs" / "wsd", folder / "runs" / "wsd_150"
    assert losses(run)[200]["learning_rate"] == pytest.approx(2e-3)  # constant after the warm-up
    assert list(losses(short)) == [130, 140, 150]
    # `1-sqrt` from the peak of 2e-3 to a tenth of it, over a fifth of the steps.
    for name, begin, steps in (("wsd_150", 120, 150), ("wsd_200", 160, 200)):
        for step, record in losses(folder / "runs" / name).items():
            done = (step - 1 - begin) / (steps - begin)
            rate = 2e-4 + 1.8e-3 * (1 - done**0.5)
            assert record["learning_rate"] == pytest.approx(rate, rel=1e-5)
    assert (folder / "runs" / "wsd_average" / "checkpoints" / "0").is_dir()


@pytest.mark.slow
def test_branch(folder):
    run_page("branch.md", folder)
    runs = folder / "runs"
    low, high = (losses(runs / f"rate_{rate}") for rate in ("1e-3", "4e-3"))
    assert high[110]["learning_rate"] == pytest.approx(4 * low[110]["learning_rate"])
    assert list(low) == list(range(110, 241, 10)) and list(high) == list(range(110, 201, 10))
    config = config_of(runs / "rate_1e-3")
    assert [config.at(step).optim.peak_lr for step in (0, 99, 100)] == [2e-3, 2e-3, 1e-3]
    assert not (runs / "trunk").exists()


@pytest.mark.slow
def test_change_data(folder):
    run_page("change_data.md", folder)
    run = folder / "runs" / "planned"
    config = config_of(run)
    assert [(stage.start, stage.config.data.mixture) for stage in config.stages] == [
        (0, "code=0.9,docs=0.1"),
        (60, "code=0.5,docs=0.5"),
        (100, "code=0.2,docs=0.8"),
        (140, "code=0.2,docs=0.4,more=0.4"),
        (180, "code=0.2,docs=0.4,more=0.4"),
    ]
    assert [config.at(step).train.global_batch for step in (0, 179, 180)] == [8, 8, 16]
    assert [record["step"] for record in changes(run)] == [100, 140, 180]


def test_learning_rate(folder):
    run_page("learning_rate.md", folder)
    run = losses(folder / "runs" / "rate")
    assert list(run) == list(range(10, 201, 10))
    # Of a run that has the lower peak from its first step, at the same step.
    config = config_of(folder / "runs" / "rate")
    schedule = make_schedule(config.optim, config.train.steps)
    for step in (110, 150, 200):
        assert run[step]["learning_rate"] == pytest.approx(float(schedule(step - 1)))


@pytest.mark.slow
def test_stages(folder):
    run_page("stages.md", folder)
    run = folder / "runs" / "staged"
    config = config_of(run)
    assert [stage.start for stage in config.stages] == [0, 40, 98, 120]
    assert [stage.config.train.seq_len for stage in config.stages] == [64, 128, 32, 32]
    assert config.at(119).optim.weight_decay == 0.1 and config.at(120).optim.weight_decay == 0.05
    tokens = 40 * 64 * 32 + 58 * 128 * 16 + 62 * 32 * 8
    assert config.total(lambda one: one.train.tokens_per_step, 160) == tokens
