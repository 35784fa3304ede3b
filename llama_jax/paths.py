"""Paths as users type them."""

import os

from etils import epath

from llama_jax.errors import UserError

FORMATS = ("hf", "meta", "ckpt", "peft", "gguf")


def expand(path: str) -> str:
    """A path with the home folder in place of a first `~` or `~USER`, and without `file://`.

    A shell expands them at the beginning of a word only, so `--workdir=~/runs` comes as it is
    typed.

    Args:
      path: a local path, or one of an object store, which stays as it is.

    Raises:
      UserError: there is no such user, `file://` has no absolute path, or a URL is of a kind that
        cannot be read.
    """
    if path.lower().startswith("file://"):
        local = path[len("file://") :].removeprefix("localhost")
        if not local.startswith("/"):
            raise UserError(f"{path} is not file:///FOLDER; give the path alone")
        return local
    if "://" in path:
        try:
            epath.Path(path)
        except KeyError as error:  # of its table of schemes
            raise UserError(
                f"{path}: paths of {path.partition('://')[0]}:// cannot be read; name a local one, "
                "or one of gs://"
            ) from error
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.split("/")[0]
        raise UserError(f"there is no home folder {user}; a file of that name here is ./{path}")
    return expanded


def expand_place(place: str) -> str:
    """FORMAT:DIR with its folder as `expand` gives it; any other text is a path.

    Raises:
      UserError: as `expand`.
    """
    kind, colon, folder = place.partition(":")
    if not colon or kind not in FORMATS:
        return expand(place)
    return f"{kind}:{expand(folder)}"
