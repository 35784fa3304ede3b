"""What the files beside a tokenizer say: names and ids of its special tokens, and about BOS."""

import contextlib
from collections.abc import Mapping
from typing import Any

from llama_jax.errors import UserError
from llama_jax.files import parse_json
from llama_jax.text.tiktoken_ranks import is_tiktoken
from llama_jax.text.tokenizer import Tokenizer, merged_config, with_config

_GENERATION = "generation_config.json"


def tokenizer_config(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Contents of tokenizer_config.json; empty where it is not there.

    Raises:
      UserError: it is damaged.
    """
    return _contents(files, "tokenizer_config.json")


def _contents(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return parse_json(files[name], name) if name in files else {}


def config_with_special_tokens(files: Mapping[str, bytes]) -> dict[str, Any]:
    """tokenizer_config.json, with the special_tokens_map.json that old ones have beside them.

    Raises:
      UserError: one of them is damaged.
    """
    return merged_config(tokenizer_config(files), _contents(files, "special_tokens_map.json"))


def adds_bos(files: Mapping[str, bytes], tokenizer: Tokenizer, name: str) -> bool | None:
    """Whether texts begin with BOS, where other files say so than the tokenizer itself; else None.

    As in transformers, a tokenizer.json says it by its post-processor, whatever add_bos_token is;
    of other formats, add_bos_token in tokenizer_config.json does.

    Args:
      files: of the checkpoint.
      tokenizer: that texts are encoded with.
      name: of the checkpoint, for errors.

    Raises:
      UserError: a file is damaged.
    """
    if tokenizer.is_json:
        return None
    if "tokenizer.json" in files:
        with contextlib.suppress(UserError):  # only the other one may be readable here
            return bool(json_tokenizer(files, name).prefix)
    added = tokenizer_config(files).get("add_bos_token")
    if added is not None and type(added) is not bool:
        raise UserError(f"{name}: add_bos_token={added!r} in tokenizer_config.json is not a bool")
    return added


def json_tokenizer(files: Mapping[str, bytes], name: str) -> Tokenizer:
    """The tokenizer.json among files, with the names that its config gives to BOS and EOS.

    Raises:
      UserError: it is damaged, or has neither BOS nor EOS.
    """
    name = f"the tokenizer.json of {name}"
    return Tokenizer(
        with_config(files["tokenizer.json"], config_with_special_tokens(files), name), name
    )


def with_base_files(files: Mapping[str, bytes], base: Mapping[str, bytes]) -> dict[str, bytes]:
    """Files of adapters, and those of their base that they bring none of.

    A template that was learnt goes with the tokenizer that it was learnt with: where the adapters
    have one, the base's templates are left out, and its tokenizer, of which another format may
    put spaces elsewhere: all but how it generates.

    Raises:
      UserError: tokenizer_config.json is damaged.
    """
    learnt = "chat_template.jinja" in files or tokenizer_config(files).get("chat_template")
    kept = base.keys() & {_GENERATION} if learnt else base.keys()
    return {**{name: base[name] for name in kept}, **files}


def special_ids(
    files: Mapping[str, bytes], vocab_size: int | None = None
) -> tuple[int | None, int | list[int] | None]:
    """Ids of BOS and EOS (or of several, such as those of turns and texts) where the files tell.

    Args:
      files: by name.
      vocab_size: rows of the model, which ids must be below; None: not known.

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
        with contextlib.suppress(ValueError):  # it does not say, or cannot be read here
            tokenizer = json_tokenizer(files, "the files")
    elif model:
        tokenizer = Tokenizer(with_config(model, config, "tokenizer.model"))
    return (None, None) if tokenizer is None else (tokenizer.bos_id, tokenizer.eos_id)


def token_ids(
    values: Mapping[str, Any], name: str, vocab_size: int | None = None
) -> tuple[int | None, int | list[int] | None]:
    """`bos_token_id` and `eos_token_id` of a file; None where it has none, which some write as -1.

    Args:
      values: what the file holds.
      name: of the file, for errors.
      vocab_size: as `special_ids`.

    Raises:
      UserError: one is no id, or beyond the rows of the model.
    """

    def checked(key: str, value: Any) -> int | None:
        if value is None or (type(value) is int and value == -1):
            return None
        if type(value) is not int or value < 0:
            given = values[key]
            many = ", nor several" if key == "eos_token_id" else ""
            raise UserError(f"{name}: {key}={given!r} is no token id{many}")
        if vocab_size is not None and value >= vocab_size:
            raise UserError(
                f"{name}: {key} has {value}, but the model's vocabulary is {vocab_size:,}"
            )
        return value

    bos, eos = values.get("bos_token_id"), values.get("eos_token_id")
    if not isinstance(eos, list):
        return checked("bos_token_id", bos), checked("eos_token_id", eos)
    if not eos or None in eos:
        raise UserError(f"{name}: eos_token_id={eos!r} is no token id, nor several")
    found = [checked("eos_token_id", one) for one in eos]
    return checked("bos_token_id", bos), [one for one in found if one is not None] or None
