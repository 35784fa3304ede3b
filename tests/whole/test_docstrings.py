"""Docstrings keep the form that a reader expects: a sentence first, and the arguments by name."""

import ast
import functools
import re

import pytest

from tests.whole.test_house import modules

VERB = re.compile(r"(Is|[A-Z][a-z]+s)\b")


def functions(tree):
    """Yields the functions of a syntax tree that have a docstring, and whether they are public."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and not any("property" in ast.unparse(d) for d in node.decorator_list):
                yield node, text


def arguments(node):
    """Returns the names of the arguments that a caller gives."""
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [argument.arg for argument in every if argument.arg not in ("self", "cls")]


@functools.cache
def documented_by_a_protocol():
    """Returns the methods whose arguments a protocol explains, so that those behind it need not."""
    found = set()
    for file in modules().values():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and "Protocol" in map(ast.unparse, node.bases):
                found |= {one.name for one, text in functions(node) if "\nArgs:\n" in text}
    return found


def faults(tree):
    """Returns what is wrong with the docstrings of a module."""
    found = []
    for node, text in functions(tree):
        first = text.splitlines()[0]
        if not VERB.match(first):
            found.append(f"line {node.lineno}: {node.name} begins with no verb: {first}")
        public = not node.name.startswith("_") and node.name not in documented_by_a_protocol()
        if public and len(arguments(node)) >= 3 and "\nArgs:\n" not in text:
            found.append(f"line {node.lineno}: {node.name} has no Args:")
    return found


@pytest.mark.parametrize("name", sorted(modules()))
def test_docstrings_say_what_a_function_does_and_what_it_takes(name):
    assert faults(ast.parse(modules()[name].read_text())) == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ('def f():\n    """The loss."""', ["line 1: f begins with no verb: The loss."]),
        ('def f():\n    """Returns the loss."""', []),
        ('def f(a, b, *, c):\n    """Adds."""', ["line 1: f has no Args:"]),
        ('def _f(a, b, *, c):\n    """Adds."""', []),
        ('class A:\n  @property\n  def f(self):\n    """The loss."""', []),
    ],
)
def test_a_fault_is_found(code, expected):
    assert faults(ast.parse(code)) == expected
