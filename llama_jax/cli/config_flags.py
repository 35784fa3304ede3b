"""The flags of a config: `--config=FILE` and `--config.GROUP.FIELD=VALUE`."""

import contextlib
import dataclasses
import re
import textwrap
from typing import Any

import ml_collections
from absl import flags

from llama_jax.cli.config_file import load_config_file
from llama_jax.config import Config, all_fields, field_types, from_config_dict
from llama_jax.errors import UserError, as_user_error, facts

PREFIX = "config."
_SHOWN = 60  # characters of a value in a message
_INTRODUCTION = (
    "Set a field with --config.GROUP.FIELD=VALUE, such as --config.train.steps=200. A field that "
    "neither a flag nor the config file sets has its default, that of LLaMA 7B."
)


def define() -> flags.FlagHolder:
    """Defines `--config` and a flag for each field, which holds the text of its value."""
    holder = flags.DEFINE_string(
        "config",
        None,
        "Config file, or the name of one in configs/, such as tiny. --config.GROUP.FIELD=VALUE "
        "overrides a field; --help lists all fields.",
    )
    for name, field in all_fields().items():
        flag: flags.Flag[str] = flags.Flag(
            parser=flags.ArgumentParser(),
            serializer=flags.ArgumentSerializer(),
            name=PREFIX + name,
            default=None,
            help_string=f"{field.metadata['meaning']} ({facts(field)})",
            boolean=field.type is bool,  # the flag needs no value
        )
        flags.DEFINE_flag(flag, module_name=__name__)
    return holder


def fields_help(width: int) -> str:
    """Lists all fields by group, with type, check, default and meaning, as `--help` prints them.

    Args:
      width: characters per line.
    """
    blocks = ["fields of the config:", textwrap.fill(_INTRODUCTION, width)]
    for group in dataclasses.fields(Config):
        lines, names = [], [group.name]
        if dataclasses.is_dataclass(group.type):
            about, _, _ = (group.type.__doc__ or "").partition("\n")
            lines.append(_wrapped(f"{group.name}: {about}", width))
            names = [f"{group.name}.{one.name}" for one in dataclasses.fields(group.type)]
        for name in names:
            field = all_fields()[name]
            switch = "[no]" if field.type is bool else ""
            lines.append(_wrapped(f"--{switch}{PREFIX}{name} ({facts(field)})", width, 2))
            lines.append(_wrapped(field.metadata["meaning"], width, 6))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _wrapped(text: str, width: int, indent: int = 0) -> str:
    """Breaks a text into lines between words, so that names can be copied whole."""
    first, rest = " " * indent, " " * max(indent, 4)
    return textwrap.fill(
        text,
        width,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def overrides() -> dict[str, Any]:
    """Returns the fields that flags set: dotted name -> value.

    Raises:
      UserError: a value does not have the type of its field.
    """
    defined = {name: flags.FLAGS[PREFIX + name] for name in field_types()}
    given = {name: str(flag.value) for name, flag in defined.items() if flag.present}
    return {name: parse_value(name, text) for name, text in given.items()}


def load(file: str) -> Config:
    """Returns the validated config of a file, with the fields that flags set.

    Args:
      file: the value of `--config`.

    Raises:
      UserError: the file, a flag or their combination is not valid.
    """
    given = overrides()
    # A copy that can be changed and keeps references between fields.
    config = ml_collections.ConfigDict(load_config_file(file), type_safe=False)
    for name, value in given.items():
        group, _, field = name.rpartition(".")
        place = config.get(group) if group else config
        if isinstance(place, ml_collections.ConfigDict) and field in place:
            place[field] = value
    try:
        with as_user_error(file):
            return from_config_dict(config)
    except UserError as error:
        raise UserError(f"{error}{_origins(str(error), file, given)}") from error


def parse_value(name: str, text: str) -> Any:
    """Converts the text of a field on the command line to its value.

    Args:
      name: dotted name of the field.
      text: the text after `=`.

    Raises:
      UserError: the text is not a value of the field's type.
    """
    kind = field_types()[name]
    with contextlib.suppress(ValueError, KeyError):
        if kind is bool:
            return _BOOLS[text.strip().lower()]
        return kind(text)
    mend = ""
    if kind is int:
        with contextlib.suppress(ValueError, ArithmeticError):
            number = float(text.replace(",", ""))
            if number.is_integer() and abs(number) < 2**63:
                mend = f"; did you mean {int(number)}?"
    elif kind is float:
        with contextlib.suppress(ValueError):
            mend = f"; did you mean {float(text.replace(',', '.'))!r}?"
    shown = repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
    raise UserError(f"--{PREFIX}{name} must be of type {_KINDS[kind]}, got {shown}{mend}")


def _origins(message: str, file: str, given: dict[str, Any]) -> str:
    """Says where the values that a message names come from; empty where this is clear."""
    names = re.findall(r"(?<![\w.])(?:[a-z]+\.)?\w+", re.sub(r"--config\.\S+", "", message))
    named = [name for name in dict.fromkeys(names) if name in field_types()]
    flagged = [name for name in named if name in given]
    if len(named) == len(flagged) < 2:
        return ""
    others = [name for name in named if name not in given]
    parts = [f"{' and '.join(others)} from {file}"] if others else []
    if flagged:
        parts.append(f"{' and '.join(flagged)} from the command line")
    return f" ({', '.join(parts)})"


_BOOLS = {
    **dict.fromkeys(("true", "t", "1"), True),
    **dict.fromkeys(("false", "f", "0"), False),
}
_KINDS = {
    int: "int, a whole number",
    float: "float, a number",
    bool: "bool, true or false",
    str: "str, a text",
}
