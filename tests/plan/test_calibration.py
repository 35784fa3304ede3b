"""The runs with which predictions are compared, and what `plan` prints about them."""

import pytest

from llama_jax.hardware.chips import CHIPS, chip_named
from llama_jax.plan.calibration import RUNS, SHAPES, summary, table, uncertainty
from tests.helpers import run_command
from tests.reference import plans


def test_the_published_runs():
    """MaxText published 692 tokens/s/chip on v5p and 905 on v6e, each for 16,384 tokens."""
    v5p, v6e = (next(run for run in RUNS if run.chip == chip) for chip in ("v5p", "v6e"))
    assert (v5p.measured, v6e.measured) == (16384 / 692, 16384 / 905)
    assert v5p.error == pytest.approx(0.058, abs=1e-3) and abs(v6e.error) < 0.08
    assert all(chip_named(run.chip) and run.source for run in (*RUNS, *SHAPES))


@pytest.mark.parametrize(
    ("chip", "text"),
    [
        ("v5p", "v5p: predicted times were 5.8% above one published run of MaxText; no run of this "
                "code yet"),
        ("v6e", "v6e: predicted times were 4.6% below one published run of MaxText; no run of this "
                "code yet"),
        ("h200", "h200: predicted times were 2.3% to 22.9% below 5 runs of llama_jax"),
        ("h100", "h100: predicted times were 2.3% to 22.9% below 5 runs of llama_jax on an h200, "
                 "which has the same unit"),
        ("v4", "v4: no prediction has been compared with a run"),
    ],
)  # fmt: skip
def test_the_uncertainty_of_a_chip(chip, text):
    assert uncertainty(chip) == text


def test_every_chip_has_a_line_and_its_runs():
    for chip in CHIPS:
        found = summary(chip.name)
        assert found["text"].startswith(f"{chip.name}: ")
        assert bool(found["runs"]) == ("no prediction" not in found["text"])
        for run in found["runs"]:
            assert run["error"] == pytest.approx(run["predicted"] / run["measured"] - 1)


@pytest.mark.parametrize("home", plans.PUBLISHED, ids=lambda home: home.name)
def test_shapes_of_published_runs_are_as_the_plan_has_them(home):
    """`python -m tests.reference.plans` compiles this project's program for each shape."""
    chip = home.topology.split("-")[0].split(":")[0]
    stored = plans.golden(home)
    found = [run for run in SHAPES if run.chip == chip and run.predicted == stored["step_seconds"]]
    assert len(found) == 1 and stored["fits"]


def test_llama_3_on_v6e_is_near_its_published_rate():
    """960 tokens/s/chip were published, with the same batch, remat policy and flags."""
    stored = next(plans.golden(home) for home in plans.PUBLISHED if home.config == "llama3_1_70b")
    assert stored["fits"] and stored["gib_per_chip"]["host"] > 80
    assert stored["tokens_per_second_per_chip"] == pytest.approx(960, rel=0.1)


def test_the_command_prints_all():
    process = run_command("plan", "--calibration")
    assert process.returncode == 0, process.stderr
    assert process.stdout == table() + "\n"
    assert len([line for line in process.stdout.splitlines() if "%" in line]) == len(RUNS + SHAPES)
