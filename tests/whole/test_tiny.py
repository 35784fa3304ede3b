"""The full run of `make train` reaches the loss that its config promises."""

import json
import keyword
import re

import pytest

from tests.helpers import run_command


@pytest.mark.slow
@pytest.mark.long
def test_the_tiny_config_learns_python(tmp_path):
    flags = ("--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}")
    process = run_command("train", *flags, timeout=3600, fresh=True)
    assert process.returncode == 0, process.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    # The docstring says about 3.8; other versions of Python have other files.
    assert 3.3 < evaluations[-1] < 3.95
    assert evaluations == sorted(evaluations, reverse=True)

    again = run_command("train", *flags)
    assert "finished already" in again.stdout
    sample = again.stdout.split("what it writes after 'def __init__(self':\n")[1]
    assert sample == process.stdout.split("what it writes after 'def __init__(self':\n")[1]
    assert sample.startswith("def __init__(self")
    # One sample proves little, but it is not a row of digits, and it has an indented block.
    assert sum(letter.isdigit() for letter in sample) < 0.2 * len(sample), sample
    assert "\n    " in sample, sample

    # Several samples together look like Python: keywords, and blocks indented by four.
    prompts = [f"--prompt={prompt}" for prompt in ("def", "class", "if", "for")]
    arguments = (f"--checkpoint={tmp_path / 'run'}", *prompts, "--temperature=0.5")
    assert_looks_like_python(run_command("generate", *arguments).stdout)


def assert_looks_like_python(text):
    words = set(re.findall(r"[a-z]+", text)) & set(keyword.kwlist)
    lines = [line for line in text.splitlines() if line.strip()]
    indents = [len(line) - len(line.lstrip(" ")) for line in lines]
    assert len(words - {"def", "class", "if", "for"}) >= 2, text
    assert sum(indent % 4 == 0 for indent in indents) >= 0.7 * len(indents), text
    assert sum(indent >= 4 for indent in indents) >= 0.2 * len(indents), text
