"""The frame of every command: the `--config` flag, quiet libraries, errors in one line."""

import logging as std_logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging

from llama_jax import config as config_lib
from llama_jax.cli import config_flags, interrupts
from llama_jax.cli.flag_names import unknown_flag
from llama_jax.data.source import quieten_tensorflow
from llama_jax.errors import UserError, one_line
from llama_jax.files import expand_place

flags.disclaim_key_flags()  # flags defined here belong to the command that calls us


def config_flag() -> flags.FlagHolder:
    """Defines `--config=FILE.py`, with `--config.group.field=value` overrides."""
    holder = config_flags.define()
    # --help shows the flags of the main module, which absl calls by this name.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["config"])
    return holder


def load_config(holder: flags.FlagHolder) -> config_lib.Config:
    """Returns the validated config from the flag and its overrides.

    Raises:
      UserError: `--config` is missing, or the config is not valid.
    """
    if not holder.value:
        raise UserError("--config is missing; try --config=configs/tiny.py")
    return config_flags.load(holder.value)


def path_flag(name: str, default: str | None, doc: str) -> flags.FlagHolder:
    """Defines a flag for a path, or FORMAT:DIR; a leading `~` is the home folder.

    Args:
      name: name of the flag.
      default: its default value.
      doc: its help text.
    """
    return flags.DEFINE(_PathParser(), name, default, doc)


def path_list_flag(name: str, default: list[str] | None, doc: str) -> flags.FlagHolder:
    """Defines a flag for several names or paths, separated by commas.

    Args:
      name: name of the flag.
      default: its default value.
      doc: its help text.
    """
    serializer = flags.CsvListSerializer(",")
    return flags.DEFINE(_PathListParser(), name, default, doc, serializer=serializer)


class _PathParser(flags.ArgumentParser):
    def parse(self, argument: str) -> str:
        return expand_place(argument)


class _PathListParser(flags.ListParser):
    def parse(self, argument: str | list[str]) -> list[str]:
        return [expand_place(item) for item in super().parse(argument)]


def run(main: Callable[[], int | None], doc: str | None) -> None:
    """Parses the flags and runs `main`; a `UserError` becomes one line and exit status 1."""

    def parse(argv: list[str]) -> list[str]:
        if {"--help", "-h", "--helpshort"} & set(argv):
            app.usage(shorthelp=True, writeto_stdout=True)
            if "config" in flags.FLAGS and "--helpshort" not in argv:
                print(f"\n{config_flags.fields_help(flags.get_help_width())}")
                print("\n--helpshort prints the flags without these fields.")
            sys.exit(0)
        try:
            _require_values(argv)
            rest = flags.FLAGS(argv)
            if len(rest) > 1:
                raise UserError(_unexpected(rest[1]))
            _check_overrides()
        except flags.UnrecognizedFlagError as error:
            _fail(UserError(unknown_flag(error.flagvalue, _own_flags(), _fields())))
        except (flags.Error, TypeError, ValueError, OSError) as error:
            _fail(error)
        return rest

    def guarded(_: list[str]) -> int | None:
        try:
            interrupts.raise_again()
            return main()
        except (UserError, OSError) as error:  # a full disk or a missing permission is not a bug
            _fail(error)
        except Exception as error:
            # TensorFlow raises these if a cloud path cannot be reached; it may not be installed.
            if type(error).__module__ != "tensorflow.python.framework.errors_impl":
                raise
            _fail(error)
        except KeyboardInterrupt:
            print(interrupts.MESSAGE, file=sys.stderr)
            return interrupts.STATUS

    quieten_libraries()
    # docs/security.md promises that no file is writable for others, whatever the user's umask and
    # whichever library writes: who can change a shard or a compiled program controls the run.
    os.umask(os.umask(0o077) | 0o002)
    # absl prints the docstring of __main__ above the flags in --help.
    sys.modules["__main__"].__doc__ = doc
    app.run(guarded, flags_parser=parse)


def _own_flags() -> list[str]:
    """Returns the names of the command's own flags."""
    return [flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])]


def _fields() -> list[str]:
    """Returns the names of the config's fields, if the command has a config."""
    return list(config_lib.field_types()) if "config" in flags.FLAGS else []


def _require_values(argv: list[str]) -> None:
    """Refuses a flag without a value; absl would take the next flag as its value."""
    args = iter(argv[1:])
    for arg in args:
        if arg == "--" or not arg.startswith("-"):
            return
        name = arg.lstrip("-")
        if name not in flags.FLAGS or flags.FLAGS[name].boolean:
            continue
        value = next(args, None)
        known = value is not None and value.lstrip("-").partition("=")[0] in flags.FLAGS
        if value is None or (value.startswith("--") and known):
            raise UserError(f"--{name} has no value; give one as --{name}=VALUE")


def _unexpected(arg: str) -> str:
    """Returns the message about an argument that is not a flag."""
    begin = f"unexpected argument {arg!r}; options look like --name=value"
    bare = arg.lstrip("-\u2010\u2011\u2012\u2013\u2014\u2015\u2212")  # dashes of web pages
    name, equals, _ = bare.partition("=")
    if not equals:
        return begin
    if name in flags.FLAGS:
        return f"{begin}; did you mean --{bare}?"
    _, found, mend = unknown_flag(f"--{bare}", _own_flags(), _fields()).partition("id you mean")
    return f"{begin}; d{found}{mend}" if found else begin


def _check_overrides() -> None:
    """Refuses values of the wrong type, and overrides without a config."""
    if "config" not in flags.FLAGS:
        return
    given = config_flags.overrides()
    if given and not flags.FLAGS["config"].value:
        name = f"--{config_flags.PREFIX}{next(iter(given))}"
        raise UserError(
            f"--config is missing, but {name} sets a field of it; try --config=configs/tiny.py"
        )


def quieten_libraries() -> None:
    """Keeps the log output of libraries out of the user's terminal."""
    # orbax logs every save, and failures with a traceback; failures are raised to us as well.
    logging.set_verbosity(logging.FATAL)
    std_logging.getLogger("matplotlib").setLevel(std_logging.WARNING)
    quieten_tensorflow()


def _fail(error: Exception) -> NoReturn:
    print(f"error: {one_line(str(error))}", file=sys.stderr)
    sys.exit(1)
