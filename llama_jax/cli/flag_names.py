"""Suggestions for a misspelt name of a flag: "did you mean ...?"."""

import shlex
from collections.abc import Collection

from llama_jax.cli.field_names import (
    ALIKE,
    FIELD_ALIASES,
    alike_names,
    either,
    fields_named,
    fields_spelt,
    other_names,
    plain,
    same_names,
    unknown_field,
)

# Names of flags in other programs.
_FLAG_ALIASES = {
    "workdir": "output_dir out_dir run_dir save_dir log_dir out output dir folder",
    "output": "output_dir out_dir out workdir dir folder target",
    "checkpoint": "model ckpt model_path checkpoint_path checkpoint_dir load workdir",
    "max_tokens": "max_new_tokens n_predict num_tokens max_length length",
    "topology": "tpu gpu gpus device devices hardware machine",
    "show": "data path dir folder shards workdir",
    "verify": "checkpoint path dir folder workdir",
    "source": "input from src",
    "target": "output to dst dest",
    "text": "file files input data",
}


def unknown_flag(arg: str, flags: Collection[str], fields: Collection[str]) -> str:
    """Returns the message about a flag that a command does not have.

    Args:
      arg: the flag as it was typed, with the value if it follows `=`.
      flags: names of the command's flags.
      fields: dotted names of the config's fields; empty: the command has no config.
    """
    typed, equals, value = arg.lstrip("-").partition("=")
    begin = f"unknown flag --{typed}"
    given = equals + shlex.quote(value) if value and not _has_other_units(typed) else ""
    switched = typed.removeprefix("no")
    dotted = (switched if switched.startswith("config.") else typed).removeprefix("config.")
    if switched != typed and f"config.{dotted}" == switched and dotted in fields:
        return f"--{switched} is not a switch; give its value as --{switched}=VALUE"
    if dotted in fields or not typed.startswith("config."):
        spelt = fields_spelt(typed, fields) or fields_spelt(typed, fields, "config")
        if spelt:
            return f"{begin}; did you mean --config.{spelt[0]}{given}?"
    if fields and ("." in dotted or dotted not in (typed, switched)):
        return unknown_field(dotted, "--config.")
    own = same_names(typed, flags) or alike_names(typed, flags, 0.8)
    if not own and fields:
        if found := fields_named(dotted, fields):
            return f"{begin}; did you mean {either(f'--config.{name}{given}' for name in found)}?"
        if any(field.startswith(f"{dotted}.") for field in fields):
            return unknown_field(dotted, "--config.")
    own = own or [name for name in flags if plain(typed) in other_names(_FLAG_ALIASES, name)]
    own = own or alike_names(typed, flags, ALIKE)
    if own:
        return f"{begin}. Did you mean: {either(own)}?"
    return f"{begin}; the flags are {', '.join(f'--{name}' for name in flags)}, see --help"


def _has_other_units(name: str) -> bool:
    words = " ".join(FIELD_ALIASES.values()).split()
    return plain(name) in [plain(word) for word in words if word.endswith("~")]
