"""The questions of examples/quiz.py: their answers are right, and those held out are new."""

import ast
import collections
import importlib.util
import re

import pytest

from tests.helpers import ROOT


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
