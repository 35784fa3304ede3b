"""The notebook runs, and its saved outputs are what it prints."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT

pytestmark = pytest.mark.slow

CELLS = [
    cell
    for cell in json.loads((ROOT / "notebooks" / "mesh.ipynb").read_text())["cells"]
    if cell["cell_type"] == "code"
]
# Runs the cells one after another in a fresh Python, as a kernel would; prints the output of each
# cell and the key figures. Without the TPU compiler, which takes minutes.
EXECUTE = """
import contextlib, io, json, sys
sys.modules["libtpu"] = None
scope, printed = {}, []
for number, source in enumerate(json.load(sys.stdin), start=1):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        exec(compile(source, f"cell {number}", "exec"), scope)
    printed.append(text.getvalue())
figures = {name: scope[name] for name in ("losses", "memory", "collectives")}
figures["weights"] = [[*sizes, size] for sizes, size in scope["weights"].items()]
print(json.dumps({"printed": printed, **figures}))
"""


@pytest.fixture(scope="module")
def executed():
    process = subprocess.run(
        [sys.executable, "-c", EXECUTE],
        cwd=ROOT / "notebooks",  # the working directory that Jupyter uses
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "MPLBACKEND": "Agg"},
        input=json.dumps(["".join(cell["source"]) for cell in CELLS]),
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def words(text):
    """Returns the words of a text without numbers and collectives, which depend on XLA."""
    text = re.sub(r"^ +[\d,]+ x [a-z-]+ .*$", "", text, flags=re.M)
    return re.sub(r"[\d.,]+(e[+-]\d+)?", "#", text).split()


def test_outputs_in_the_file_are_those_of_the_code(executed):
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    assert len(executed["printed"]) == len(CELLS)
    for cell, printed in zip(CELLS, executed["printed"], strict=True):
        kinds = {output["output_type"] for output in cell["outputs"]}
        assert kinds <= {"stream", "display_data"} and kinds, cell["source"]
        saved = "".join("".join(output.get("text", "")) for output in cell["outputs"])
        # Skip drawings, which are saved as rich text, and plans that the real compiler may have
        # made.
        if kinds == {"stream"} and "plan(large" not in "".join(cell["source"]):
            assert words(saved) == words(printed)


def test_losses_are_equal_on_all_meshes(executed):
    losses = executed["losses"]
    assert len(losses) == 4
    for values in losses.values():
        assert values == pytest.approx(losses["one device"], abs=1e-5)
    assert losses["fsdp"][-1] < 2.8 < 5.5 < losses["fsdp"][0]
    saved = "".join(CELLS[7]["outputs"][0]["text"])
    for name, values in losses.items():
        numbers = re.search(rf"^{name} +(.*?)   ", saved, re.M)[1].split()
        assert list(map(float, numbers)) == pytest.approx(values, abs=2e-3)


def test_sharding_shrinks_the_state_and_costs_collectives(executed):
    collectives, memory = executed["collectives"], executed["memory"]
    assert collectives["one device"] == {}
    assert set(collectives["data"]) == {"all-reduce"}
    # One float32 gradient per parameter, and a few scalars.
    assert collectives["data"]["all-reduce"][1] == pytest.approx(4 * 918_656, rel=0.01)
    assert collectives["fsdp"]["all-gather"][1] > 4 * 918_656
    assert memory["fsdp"] == pytest.approx(memory["one device"] / 8, rel=0.02)
    assert memory["data"] == pytest.approx(memory["one device"], rel=0.01)


def test_65b_on_2048_devices(executed):
    weights = {tuple(sizes): size for *sizes, size in executed["weights"]}
    assert weights[(1, 2048, 1, 1)] == pytest.approx(4 * 65_285_660_672 / 2048, rel=0.05)
    assert weights[(8, 256, 1, 1)] == pytest.approx(4 * 65_285_660_672 / 256, rel=0.01)
