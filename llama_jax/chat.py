"""The chat template of a checkpoint: what its conversations are written with.

It comes as `chat_template.jinja`, others by name in `additional_chat_templates/`, or all of them in
`tokenizer_config.json`; `data/chat_template.py` renders it, `data/templates.py` has built-in ones.
"""

import dataclasses
from collections.abc import Mapping

from etils import epath

from llama_jax.data.chat_template import DEFAULT, ChatTemplate, named_templates, special_tokens
from llama_jax.data.templates import BUILT_IN, built_in, end_ids
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.data.tokenizer_config import json_tokenizer, tokenizer_config
from llama_jax.data.tokenizer_files import MORE_TEMPLATES
from llama_jax.errors import UserError
from llama_jax.files import read_bytes, text_of
from llama_jax.inference import InferenceModel


def templates(files: Mapping[str, bytes]) -> dict[str, str]:
    """Templates by name, `default` among them where there is one.

    Raises:
      UserError: tokenizer_config.json is damaged.
    """
    found = named_templates(tokenizer_config(files).get("chat_template"))
    for file, content in files.items():
        folder, _, name = file.rpartition("/")
        if file == "chat_template.jinja":
            found[DEFAULT] = text_of(content, file)
        elif folder == MORE_TEMPLATES:
            found[name.removesuffix(".jinja")] = text_of(content, file)
    return found


def open_template(model: InferenceModel, choice: str = DEFAULT) -> ChatTemplate:
    """A template of a checkpoint, one of a file, or a built-in one.

    Args:
      model: with the files that came with it.
      choice: name of a template of the checkpoint or, failing that, of a built-in one; or a file
        that ends in `.jinja`.

    Raises:
      UserError: there is no such template.
    """
    tokenizer = _tokenizer(model)
    tokens = special_tokens(tokenizer_config(model.files), tokenizer)
    if choice.endswith(".jinja"):
        name = f"the chat template {choice}"
        source = text_of(read_bytes(epath.Path(choice)), name)
    else:
        name = f"the chat template {choice!r} of {model.folder}"
        found = templates(model.files)
        if choice not in found and choice in BUILT_IN:
            return built_in(choice, tokenizer)
        if choice not in found:
            which = f" {choice!r}" if found else ""
            raise UserError(
                f"{model.folder} has no chat template{which}; --chat_template may be "
                f"{', '.join([*sorted(found), *BUILT_IN])}, or a FILE.jinja"
            )
        source = found[choice]
    return ChatTemplate(source, name, tokenizer, tokens)


def _tokenizer(model: InferenceModel) -> Tokenizer:
    """The tokenizer.json where there is one beside a SentencePiece model.

    It has the tokens that were added for turns, and puts spaces where transformers puts them.
    """
    if model.tokenizer.is_json or "tokenizer.json" not in model.files:
        return model.tokenizer
    return json_tokenizer(model.files, str(model.folder))


def ending_turns(model: InferenceModel, template: ChatTemplate) -> InferenceModel:
    """The model, for which a token that ends a turn of the template ends an answer, too."""
    return dataclasses.replace(model, turn_ends=tuple(end_ids(template)[1:]))
