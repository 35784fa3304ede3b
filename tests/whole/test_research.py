"""The code of docs/research.md runs from top to bottom, and does what the page says."""

import os
import re
import subprocess
import sys

from tests.helpers import QUICK, ROOT

CODE = "\n".join(
    re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "research.md").read_text(), re.S)
)


def test_the_page_runs(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": QUICK}
    process = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    lines = re.findall(r"^(\w[\w -]{9}) (\d\.\d{3})(.*)$", process.stdout, re.M)
    losses = {name.strip(): float(loss) for name, loss, _ in lines}
    names = [
        "AdamW",
        "Lion",
        "Adafactor",
        "own chain",
        "Muon",
        "GEGLU",
        "qk-norm",
        "capped",
        "loss",
    ]
    assert list(losses) == names
    # The loss is ln 256 = 5.55 before training. Adafactor's updates are proportional to the small
    # weights.
    assert all(loss < (5.4 if name == "Adafactor" else 3.5) for name, loss in losses.items())
    assert len(set(losses.values())) == len(names)  # no variant equals the plain model
    rest = {name.strip(): text for name, _, text in lines}
    assert "('fsdp', 'context'), 'tensor')" in rest["Muon"]
    assert rest["qk-norm"] == " (2, 16)"
    [accuracy] = re.findall(r"'accuracy': ([\d.]+), 'weight_norm'", process.stdout)
    assert float(accuracy) > 0.2
    assert re.search(r"^step 20/20 .* weight_norm .* accuracy ", process.stdout, re.M)
    assert (tmp_path / "runs" / "sums" / "checkpoints" / "20").is_dir()
    assert (tmp_path / "runs" / "capped" / "checkpoints" / "10").is_dir()
