"""examples/quiz.py: the answers to its questions are right, and the held-out questions are new."""

import ast
import collections
import dataclasses
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from llama_jax.model.llama import init_params
from llama_jax.text.tokenizer import train_tokenizer
from tests.helpers import ROOT, TINY, replace, save_checkpoint
from tests.test_config import load


@pytest.fixture(scope="module")
def quiz():
    spec = importlib.util.spec_from_file_location("quiz", ROOT / "examples" / "quiz.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_answers_are_right_and_held_out_functions_are_new(quiz):
    train, test = quiz.split(640, 80, seed=0)
    assert (len(train), len(test)) == (640, 80)
    for question in (*train, *test):
        function = ast.parse(question.signature + " pass").body[0]
        names = [arg.arg for arg in function.args.args]
        method = "yes" if names[0] == "self" else "no"
        right = {"method": method, "count": str(len(names)), "first": names[0]}
        assert question.answer == {**right, "last": names[-1]}[question.kind]
    named = [{q.signature.split("(")[0] for q in part} for part in (train, test)]
    assert not named[0] & named[1] and len(named[1]) == 20
    counts = collections.Counter(q.answer for q in test if q.kind == "count")
    assert counts == {"1": 5, "2": 5, "3": 5, "4": 5}
    assert quiz.split(640, 80, seed=0) == (train, test)


def test_signatures_have_plain_parameters_only(quiz, tmp_path):
    (tmp_path / "a.py").write_text(
        "def a(x, y=1): pass\ndef b(*x): pass\ndef c(x, /, y): pass\ndef d(x, *, y): pass\n"
        "def e(): pass\ndef f(a, b, c, d, e): pass\nclass G:\n    def g(self): pass\n"
    )
    assert sorted(quiz.signatures(tmp_path)) == [("a", ("x", "y")), ("g", ("self",))]


@pytest.mark.slow
def test_a_small_model_answers_more_than_before(tmp_path):
    """The whole example at a small size, with a base of random weights and its own template."""
    base, workdir, template = (tmp_path / name for name in ("base", "quiz", "short.jinja"))
    template.write_text(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ m.content + '\\n' }}"
        "{% else %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}"
        "{% endfor %}"
    )
    config, _ = load("tiny_quiz")
    model = dataclasses.replace(config.model, dim=64, n_layers=2, ffn_dim=128, vocab_size=400)
    records = (ROOT / "examples" / "quiz.py").read_text().splitlines()
    library = pathlib.Path(pathlib.__file__).read_text().splitlines()
    tokenizer = train_tokenizer(records + library, 400)
    params = jax.device_get(init_params(model, jax.random.key(0)))
    plain = replace(TINY, model=model, train__seq_len=128)
    save_checkpoint(base, plain, params, tokenizer.model_bytes)
    tokenizer.save(base / "tokenizer.model")
    flags = ["--config.model.dim=64", "--config.model.n_layers=2", "--config.model.ffn_dim=128"]
    flags += ["--config.model.vocab_size=400", f"--config.data.template={template}"]
    flags += ["--config.train.steps=400", "--config.optim.peak_lr=3e-3"]
    flags += ["--config.train.seq_len=128", "--config.train.eval_every=400"]
    command = [sys.executable, "examples/quiz.py", f"--base={base}", f"--workdir={workdir}"]
    command += ["--train=320", "--test=40", *flags]
    env = {**os.environ, "XLA_FLAGS": ""}
    process = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3600
    )
    assert process.returncode == 0, process.stderr
    rows = re.findall(r"^(\w+) +10 +(\d+) +(\d+)$", process.stdout, re.M)
    assert [row[0] for row in rows] == ["method", "count", "first", "last"], process.stdout
    before, after = (sum(int(row[column]) for row in rows) for column in (1, 2))
    assert before == 0 and after >= 10, process.stdout


def test_the_table_counts_what_is_right(quiz):
    asked = quiz.questions([("f", ("a", "b")), ("g", ("c",))], seed=1)
    right = [question.answer for question in asked]
    wrong = ["no\nidea" if q.kind == "method" else q.answer for q in asked]
    lines = quiz.table(asked, wrong, right).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:5]}
    assert rows == {
        "method": ["2", "0", "2"],
        **dict.fromkeys(("count", "first", "last"), ["2"] * 3),
    }
    assert re.search(r"method  def f\(a, b\): +no idea +no$", "\n".join(lines), re.M)
