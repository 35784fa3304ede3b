"""Finds a config file and runs it; reports an error in it with the file and the line."""

import difflib
import importlib.machinery
import importlib.util
import inspect
import pathlib
import re
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import ml_collections
from etils import epath

import llama_jax
from llama_jax.cli.field_names import unknown_field
from llama_jax.config import UnknownField, field_types, require_fields
from llama_jax.errors import UserError, check_type, first_line
from llama_jax.files import expand, read_bytes

SHIPPED = "configs"
_MODULE = "llama_jax_config"
_LISTED = 30  # files of a folder in a message


def load_config_file(text: str) -> ml_collections.ConfigDict:
    """Runs `get_config` of a config file.

    Args:
      text: the value of `--config`: a file, or the name of a shipped config, optionally followed
        by a colon and the argument of its `get_config`.

    Raises:
      UserError: the config does not exist, fails, or does not have exactly the fields of `Config`.
    """
    path, argument = find_config(text)
    module = _run(path, lambda: _module(path))
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(
            f"{path} has no function get_config, which returns the config; see configs/tiny.py"
        )
    _check_arguments(path, get_config, argument)
    config = _run(path, lambda: get_config(*argument))
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"{path}: get_config() returned {_shown(config)}, not a config; begin with config = "
            "llama_jax.config.default(), which is a ConfigDict, and end with return config"
        )
    try:
        require_fields(config)
    except UnknownField as error:
        raise UserError(f"{text}: {error} ({unknown_field(error.name, 'config.')})") from error
    except UserError as error:
        raise UserError(f"{text}: {error}") from error
    return config


def find_config(text: str) -> tuple[epath.Path, tuple[str, ...]]:
    """Finds the file that a user means, and the argument of its `get_config`, if there is one.

    A name, such as `7b` or `configs/7b`, is searched first in the folder `configs` of the current
    folder, and then in the one next to the package.

    Raises:
      UserError: there is no such file.
    """
    name = expand(text)
    whole = epath.Path(name)
    if whole.is_file():
        return _checked(whole), ()
    parts = (
        re.fullmatch(r"(.+?(?:\.py)?)(?::(.*))?", name, re.DOTALL) if "://" not in name else None
    )
    name, argument = (parts[1], parts[2]) if parts else (name, None)
    for path in _candidates(name):
        if path.is_file():
            return _checked(path), () if argument is None else (argument,)
    if whole.is_dir():
        raise UserError(f"--config={text} is a folder; name one of its files{_listed(whole)}")
    if (known := shipped_configs()) and "/" not in name.removeprefix(f"{SHIPPED}/"):
        asked = name.removeprefix(f"{SHIPPED}/").removesuffix(".py")
        close = _close(asked, list(known))
        mend = f"; did you mean --config={close[0]}?" if close else ""
        raise UserError(f"there is no config {text}{mend} (there are {', '.join(known)})")
    if name.endswith(".py") or "/" in name:
        raise UserError(f"there is no config file {text}{_listed(epath.Path(name).parent)}")
    raise UserError(
        f"there is no config {text}: the current folder and the package's parent have no folder "
        f"{SHIPPED}; give a file"
    )


def shipped_configs() -> dict[str, pathlib.Path]:
    """Lists the configs that a bare name finds; the current folder's replace the package's."""
    found: dict[str, pathlib.Path] = {}
    for folder in _folders():
        if folder.is_dir():
            for path in sorted(folder.glob("*.py")):
                found.setdefault(path.stem, path)
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def _folders() -> list[pathlib.Path]:
    package = pathlib.Path(llama_jax.__file__).resolve().parent
    return [pathlib.Path(SHIPPED), package.parent / SHIPPED]


def _natural(name: str) -> list[Any]:
    """Returns a key that sorts 7b before 13b."""
    return [
        (0, int(piece), "") if piece.isdigit() else (1, 0, piece)
        for piece in re.findall(r"[0-9]+|[^0-9]+", name)
    ]


def _candidates(name: str) -> list[epath.Path]:
    """Lists the files where a config of this name may be, in the order of the search."""
    path = epath.Path(name)
    found = [path, epath.Path(f"{name}.py")]
    bare = name.removeprefix("./").removeprefix(f"{SHIPPED}/").removesuffix(".py")
    if "/" not in bare:
        found += [epath.Path(folder) / f"{bare}.py" for folder in _folders()]
    return found


def _close(name: str, known: list[str]) -> list[str]:
    def plain(one: str) -> str:
        return re.sub(r"[^a-z0-9]", "", one.lower())

    names = {plain(one): one for one in known}
    # The first LLaMA's configs have no family in their names.
    asked = plain(name)
    for one in (asked, asked.removeprefix("llama1"), asked.removeprefix("llama")):
        if one in names:
            return [names[one]]
    return [names[one] for one in difflib.get_close_matches(asked, list(names), 1, 0.6)]


def _checked(path: epath.Path) -> epath.Path:
    if path.suffix != ".py":
        kept = " (config.json is the record of a run)" if path.name == "config.json" else ""
        raise UserError(
            f"--config={path} is not a Python file, FILE.py with a function get_config{kept}"
        )
    return path


def _listed(folder: epath.Path) -> str:
    names = sorted(path.name for path in folder.glob("*.py")) if folder.is_dir() else []
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f" ({folder} has {', '.join(names[:_LISTED])}{more})" if names else ""


class _Loader(importlib.machinery.SourceFileLoader):
    """Reads the source each time: the bytecode cache, keyed by time and size, may be stale."""

    def get_code(self, fullname: str) -> types.CodeType:
        content = read_bytes(epath.Path(self.path))
        try:
            source = importlib.util.decode_source(content)
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} is not text in UTF-8: {error}") from error
        return self.source_to_code(source, self.path)


def _module(path: epath.Path) -> types.ModuleType:
    loader = _Loader(_MODULE, str(path))
    spec = importlib.util.spec_from_loader(_MODULE, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module  # dataclasses in it look their module up
    loader.exec_module(module)
    return module


def _check_arguments(
    path: epath.Path, get_config: Callable[..., Any], argument: tuple[str, ...]
) -> None:
    try:
        signature = inspect.signature(get_config)
    except (TypeError, ValueError):  # a callable written in C
        return
    try:
        signature.bind(*argument)
    except TypeError as error:
        shown = signature.replace(return_annotation=inspect.Signature.empty)
        if argument:
            mend = f"takes no argument {argument[0]!r}; give --config={path} alone"
        else:
            mend = f"needs an argument; give it as --config={path}:ARGUMENT"
        raise UserError(f"{path}: get_config{shown} {mend}") from error


def _run(path: epath.Path, step: Callable[[], Any]) -> Any:
    """Runs code of a config file; converts its errors to a `UserError` with file and line."""
    try:
        return step()
    except SyntaxError as error:
        where = f", line {error.lineno}" if error.lineno else ""
        place = path if error.filename in (None, str(path), "<unknown>") else error.filename
        said = first_line(Exception(error.msg))
        raise UserError(f"{place}{where}: {type(error).__name__}: {said}") from error
    except (Exception, SystemExit) as error:
        frames = []
        trace = error.__traceback__
        while trace is not None:
            frames.append(trace)
            trace = trace.tb_next
        ours = [i for i, one in enumerate(frames) if one.tb_frame.f_code.co_filename == str(path)]
        if not ours:  # the file cannot be read
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: {_said(error)}") from error
        line = frames[ours[-1]].tb_lineno
        below = [one.tb_frame for one in frames[ours[-1] :]]
        message = _of_config_dict(error, below) or _said(error)
        raise UserError(f"{path}, line {line}: {message}") from error


def _said(error: BaseException) -> str:
    text = first_line(error)
    if isinstance(error, UserError):
        return text
    if isinstance(error, KeyError) and error.args:
        text = first_line(Exception(str(error.args[0])))
    name = type(error).__name__
    return text if text.startswith(f"{name}(") else f"{name}: {text}"


def _of_config_dict(error: BaseException, frames: list[types.FrameType]) -> str:
    """Describes why a ConfigDict raised an error; empty if the error is something else.

    The ConfigDict's own message has the values of all fields, but not the name of the group.

    Args:
      error: the error that the config file raised.
      frames: the frames of the traceback, from the config file's line on.
    """
    if not isinstance(error, AttributeError | KeyError | TypeError):
        return ""
    inner = frames[-1].f_locals
    group, key = inner.get("self"), inner.get("key", inner.get("attribute"))
    if not isinstance(group, ml_collections.ConfigDict) or not isinstance(key, str):
        return ""
    fields = field_types()
    prefix = _group_name(group, frames[0].f_locals.values())
    if prefix is None:
        return ""
    name = f"{prefix}.{key}" if prefix else key
    if key not in group:
        return unknown_field(name, "config.")
    if "value" not in inner:
        return ""
    if name not in fields:
        return f"{name} is a group of fields, and cannot be {inner['value']!r}"
    try:
        check_type(name, inner["value"], fields[name])
    except UserError as refused:
        return str(refused)
    return ""


def _group_name(group: ml_collections.ConfigDict, variables: Iterable[Any]) -> str | None:
    """Returns the name of a group; empty for the config itself, None for anything else."""
    groups: dict[str, set[str]] = {}
    for field in field_types():
        name, _, inner = field.rpartition(".")
        groups.setdefault(name, set()).add(inner)
    if set(groups) <= {"", *group}:
        return ""
    for one in variables:
        if isinstance(one, ml_collections.ConfigDict):  # two groups have the same fields
            for name, value in one.items():
                if value is group and name in groups:
                    return name
    return next((name for name, inner in groups.items() if inner == set(group)), None)


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
