"""What `make train` promises, in full."""

import ast
import json
import re

import pytest

from tests.helpers import run_command


@pytest.mark.slow
def test_the_tiny_config_learns_python(tmp_path):
    flags = ("--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}")
    process = run_command("train", *flags, timeout=1500)
    assert process.returncode == 0, process.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    # The docstring says about 3.7; other versions of Python have other files.
    assert 3.3 < evaluations[-1] < 3.95
    assert evaluations == sorted(evaluations, reverse=True)

    again = run_command("train", *flags)
    assert "finished already" in again.stdout
    sample = again.stdout.split("what it writes after 'def ':\n")[1]
    assert sample == process.stdout.split("what it writes after 'def ':\n")[1]
    assert sample.startswith("def ") and re.search(r"\n    ", sample)

    # Some of many short greedy continuations are whole statements.
    prompts = ["import os\nimport ", "for i in range(", "x = ", "if x is None:\n    ", "raise "]
    statements = 0
    for prompt in prompts:
        arguments = (f"--checkpoint={tmp_path / 'run'}", f"--prompt={prompt}", "--temperature=0")
        text = run_command("generate", *arguments, "--max_tokens=24").stdout
        assert text.startswith(prompt)
        body = text.rsplit("\n", 2)[0]  # the last line may be cut
        try:
            statements += bool(ast.parse(body).body)
        except SyntaxError:
            continue
    assert statements >= 1
