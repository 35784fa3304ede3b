"""The rooms of llama_jax import only what their rules allow, as the imports themselves show.

Three rules: a noun is a room (a package), a verb is a command (a module of flags that no module
imports); `python -m llama_jax.X` runs `X.py` or `X/__main__.py`; a room imports only rooms below
it, and its `__init__.py` holds only a docstring. Imports inside functions count.
"""

import ast
import functools
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "llama_jax"

# The rooms that each room may import. All may import errors and files.
BELOW = {
    "stages": "",
    "config": "stages",
    "hardware": "",
    "parameters": "config",
    "parallel": "config parameters",
    "text": "config",
    "model": "config parameters parallel",
    "data": "config text",
    "checkpoint": "config text parallel",
    "interchange": "config parameters model text checkpoint",
    "inference": "config parameters model parallel text data checkpoint interchange",
    "train": "stages config parameters hardware parallel text model data checkpoint interchange "
    "inference",
    # The planned step is the one that trains.
    "plan": "config parameters hardware parallel model train.step train.optimizer",
}
GROUND = ("errors", "files")
COMMANDS = ("prepare", "generate", "evaluate", "convert")
# The code that commands share is above all rooms.
ABOVE = ("cli",)
MOST_ENTRIES = 21
OPTIONAL = ("inference.harness",)  # a plug-in of a library that may not be installed


@functools.cache
def modules() -> dict[str, pathlib.Path]:
    """Returns the files of all modules by module name; a package has the name of its folder."""
    files = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


def imported(tree: ast.AST) -> set[str]:
    """Returns the modules of the package that a syntax tree imports, inside functions as well."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"a relative import in line {node.lineno}"
            # A name that is imported from a package may be a module.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.partition(".")[2] in modules() else node.module for name in names]
        else:
            continue
        found |= {name.partition(".")[2] for name in names if name.split(".")[0] == "llama_jax"}
    return {name for name in found if name in modules()}


@functools.cache
def imports() -> dict[str, set[str]]:
    """Returns the imports of each module."""
    return {name: imported(ast.parse(file.read_text())) for name, file in modules().items()}


def room_of(module: str) -> str:
    return module.split(".")[0]


def is_command(module: str) -> bool:
    return module in COMMANDS or module.endswith("__main__")


def may_import(module: str, other: str) -> bool:
    """Returns whether the table lets a module import another one."""
    room, wanted = room_of(module), room_of(other)
    if is_command(other) or wanted in ABOVE:
        return is_command(module) or (room in ABOVE and not is_command(other))
    if is_command(module) or room in ABOVE or wanted == room:
        return True
    allowed = BELOW.get(room, "").split()
    return wanted in GROUND or wanted in allowed or other in allowed


def test_rooms_import_only_rooms_below():
    wrong = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in sorted(others)
        if module and other and not may_import(module, other)
    ]
    assert not wrong


def test_nobody_imports_a_command():
    wrong = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if is_command(other)
    ]
    assert not wrong


def test_there_is_no_circle():
    list(graphlib.TopologicalSorter(imports()).static_order())  # CycleError names the modules


def test_the_top_is_read_at_one_glance():
    entries = {path.stem for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert entries == {"__init__", *GROUND, *COMMANDS, *ABOVE, *BELOW}
    assert len(entries) <= MOST_ENTRIES


ROOMS = [name for name, file in modules().items() if name and file.stem == "__init__"]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_begins_with_its_map(room):
    """The docstring of a room names each of its files, and the room's `__init__.py` has no code."""
    file = modules()[room]
    (docstring,) = ast.parse(file.read_text()).body
    text = docstring.value.value
    listed = set(re.findall(r"^  (\w+)(?:\.py|/)", text, re.M))
    there = {path.stem for path in file.parent.iterdir() if path.name != "__pycache__"}
    assert listed == there - {"__init__"}


@pytest.mark.parametrize("module", ["config", "prepare"])
def test_imports_no_jax(module):
    code = f"import sys, llama_jax.{module}; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def eager(tree: ast.AST) -> set[str]:
    """Returns the packages that a syntax tree imports outside of functions."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            found |= eager(node)
    return found


def test_tensorflow_is_imported_when_it_is_used():
    wanted = {"tensorflow", "tensorflow_datasets"}
    files = modules().items()
    assert not [name for name, file in files if eager(ast.parse(file.read_text())) & wanted]
    left_out = {name for name in modules() if is_command(name) or name in OPTIONAL}
    library = [f"llama_jax.{name}" for name in modules() if name and name not in left_out]
    code = f"import sys, {', '.join(library)}; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
