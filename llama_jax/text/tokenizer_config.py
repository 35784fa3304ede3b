"""Reads the special tokens of a tokenizer, and its use of BOS, from the files next to it."""

import contextlib
from collections.abc import Mapping
from typing import Any

from llama_jax.errors import UserError
from llama_jax.files import parse_json
from llama_jax.text.tiktoken_ranks import is_tiktoken
from llama_jax.text.tokenizer import Tokenizer, merged_config, with_config

_GENERATION = "generation_config.json"


def tokenizer_config(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Returns the contents of tokenizer_config.json; empty if there is no such file.

    Raises:
      UserError: the file is damaged.
    """
    return _contents(files, "tokenizer_config.json")


def _contents(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return parse_json(files[name], name) if name in files else {}


def config_with_special_tokens(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Returns tokenizer_config.json, merged with the special_tokens_map.json of old tokenizers.

    Raises:
      UserError: one of the files is damaged.
    """
    return merged_config(tokenizer_config(files), _contents(files, "special_tokens_map.json"))


def adds_bos(files: Mapping[str, bytes], tokenizer: Tokenizer, name: str) -> bool | None:
    """Returns whether texts begin with BOS, if the files next to the tokenizer decide this.

    As in transformers, the post-processor of a tokenizer.json decides it, whatever add_bos_token
    is; for other formats, add_bos_token in tokenizer_config.json does.

    Args:
      files: files of the checkpoint, by name.
      tokenizer: the tokenizer that encodes the texts.
      name: name of the checkpoint in errors.

    Returns:
      True or False; None: the tokenizer itself decides.

    Raises:
      UserError: a file is damaged.
    """
    if tokenizer.is_json:
        return None
    if "tokenizer.json" in files:
        with contextlib.suppress(UserError):  # perhaps only `tokenizer` can be read here
            return bool(json_tokenizer(files, name).prefix)
    added = tokenizer_config(files).get("add_bos_token")
    if added is not None and type(added) is not bool:
        raise UserError(f"{name}: add_bos_token={added!r} in tokenizer_config.json is not a bool")
    return added


def json_tokenizer(files: Mapping[str, bytes], name: str) -> Tokenizer:
    """Opens the tokenizer.json among files, with the BOS and EOS that its config names.

    Raises:
      UserError: the file is damaged, or has no BOS or no EOS.
    """
    name = f"the tokenizer.json of {name}"
    return Tokenizer(
        with_config(files["tokenizer.json"], config_with_special_tokens(files), name), name
    )


def with_base_files(files: Mapping[str, bytes], base: Mapping[str, bytes]) -> dict[str, bytes]:
    """Returns the files of adapters, with the files of their base that the adapters lack.

    A template must be used with the tokenizer that it was trained with: another format of that
    tokenizer may put spaces at other places. So if the adapters have a template, only the
    generation config of the base is added, but neither its templates nor its tokenizer.

    Raises:
      UserError: tokenizer_config.json is damaged.
    """
    learnt = "chat_template.jinja" in files or tokenizer_config(files).get("chat_template")
    kept = base.keys() & {_GENERATION} if learnt else base.keys()
    return {**{name: base[name] for name in kept}, **files}


def special_ids(
    files: Mapping[str, bytes], vocab_size: int | None = None
) -> tuple[int | None, int | list[int] | None]:
    """Returns the ids of BOS and EOS from the files of a checkpoint; None if they do not say.

    EOS may be several ids, such as one that ends a turn and one that ends a text.

    Args:
      files: contents of the files, by name.
      vocab_size: rows of the model, which all ids must be below; None: not known.

    Raises:
      UserError: generation_config.json is damaged.
    """
    bos, eos = token_ids(_contents(files, _GENERATION), _GENERATION, vocab_size)
    if eos is not None:
        return bos, eos
    model, config = files.get("tokenizer.model", b""), config_with_special_tokens(files)
    tokenizer = None
    if model and not is_tiktoken(model):
        tokenizer = Tokenizer(model)
    elif "tokenizer.json" in files:
        with contextlib.suppress(ValueError):  # it names no BOS or EOS, or cannot be read here
            tokenizer = json_tokenizer(files, "the files")
    elif model:
        tokenizer = Tokenizer(with_config(model, config, "tokenizer.model"))
    return (None, None) if tokenizer is None else (tokenizer.bos_id, tokenizer.eos_id)


def token_ids(
    values: Mapping[str, Any], name: str, vocab_size: int | None = None
) -> tuple[int | None, int | list[int] | None]:
    """Returns `bos_token_id` and `eos_token_id` of a file; None (or -1 in the file): there is none.

    Args:
      values: contents of the file.
      name: name of the file in errors.
      vocab_size: rows of the model; None: not known.

    Raises:
      UserError: a value is not an id, or the model has no row for it.
    """

    def checked(key: str, value: Any) -> int | None:
        if value is None or (type(value) is int and value == -1):
            return None
        if type(value) is not int or value < 0:
            given = values[key]
            many = " or a list of them" if key == "eos_token_id" else ""
            raise UserError(f"{name}: {key}={given!r} is not a token id{many}")
        if vocab_size is not None and value >= vocab_size:
            raise UserError(
                f"{name}: {key} has {value}, but the model's vocabulary is {vocab_size:,}"
            )
        return value

    bos, eos = values.get("bos_token_id"), values.get("eos_token_id")
    if not isinstance(eos, list):
        return checked("bos_token_id", bos), checked("eos_token_id", eos)
    if not eos or None in eos:
        raise UserError(f"{name}: eos_token_id={eos!r} is not a token id or a list of them")
    found = [checked("eos_token_id", one) for one in eos]
    return checked("bos_token_id", bos), [one for one in found if one is not None] or None
