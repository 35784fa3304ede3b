"""What every command shares: the `--config` flag, quiet libraries, errors told in one line."""

import logging as std_logging
import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from llama_jax import config as config_lib
from llama_jax.errors import UserError


def config_flag() -> flags.FlagHolder:
    """Defines `--config=FILE.py`, with `--config.group.field=value` overrides."""
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file, such as configs/tiny.py; --config.GROUP.FIELD=VALUE overrides a field.",
        lock_config=True,
    )
    # --help shows the flags of the main module, which absl calls by this name.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["config"])
    return holder


def load_config(holder: flags.FlagHolder) -> config_lib.Config:
    """The validated config that the flag holds.

    Raises:
      UserError: no `--config` was given, or it is not valid.
    """
    if holder.value is None:
        raise UserError("--config is missing; try --config=configs/tiny.py")
    return config_lib.from_config_dict(holder.value)


def run(main: Callable[[], int | None], doc: str | None) -> None:
    """Parses the flags and runs `main`; a `UserError` becomes one line and exit status 1."""

    def parse(argv: list[str]) -> list[str]:
        # A bad --config fails while flags are parsed, with whatever its loader raises.
        if {"--help", "-h", "--helpshort"} & set(argv):
            app.usage(shorthelp=True, writeto_stdout=True)
            sys.exit(0)
        try:
            rest = flags.FLAGS(argv)
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            _fail(error)
        if len(rest) > 1:
            _fail(UserError(f"unexpected argument {rest[1]!r}; options look like --name=value"))
        return rest

    def guarded(_: list[str]) -> int | None:
        try:
            return main()
        except (UserError, OSError) as error:  # a full disk, a missing permission: not our bug
            _fail(error)
        except Exception as error:
            # What TensorFlow raises where a cloud path cannot be reached; it may not be installed.
            if type(error).__module__ != "tensorflow.python.framework.errors_impl":
                raise
            _fail(error)
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return 130

    quieten_libraries()
    os.umask(os.umask(0o077) | 0o002)  # whoever may write a shard or a cached program, trains it
    # absl prints the docstring of __main__ above the flags in --help.
    sys.modules["__main__"].__doc__ = doc
    app.run(guarded, flags_parser=parse)


def quieten_libraries() -> None:
    """Keeps what libraries say about themselves out of the user's terminal."""
    # orbax logs every save, and a failed one with its traceback; what fails is also raised to us.
    logging.set_verbosity(logging.FATAL)
    std_logging.getLogger("matplotlib").setLevel(std_logging.WARNING)
    # TensorFlow reads these at import; here it only feeds data.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def _fail(error: Exception) -> NoReturn:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    one_line = re.sub(r"\s*\n\s*", " ", text.strip())
    print(f"error: {one_line}", file=sys.stderr)
    sys.exit(1)
