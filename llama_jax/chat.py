"""Chat templates: from the messages of a conversation to the prompt that a model was tuned on.

A template is Jinja and comes with a checkpoint: `chat_template.jinja`, others by name in
`additional_chat_templates/`, or all of them in `tokenizer_config.json`. It is rendered as
`apply_chat_template` of transformers renders it, in Jinja's sandbox: it is the code of others.
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from llama_jax.data.tokenizer import Tokenizer
from llama_jax.data.vocabularies import with_ends
from llama_jax.errors import UserError
from llama_jax.inference import InferenceModel
from llama_jax.interchange.formats import MORE_TEMPLATES
from llama_jax.prompts import Messages

DEFAULT = "default"
# The names under which a template finds the special tokens.
_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template with the tokenizer that it is for.

    Attributes:
      source: Jinja.
      name: what to call it in an error.
      tokenizer: reads what it renders.
      tokens: `bos_token`, `eos_token` and so on, which it may write.
    """

    source: str
    name: str
    tokenizer: Tokenizer
    tokens: Mapping[str, str]

    def render(self, messages: Messages) -> str:
        """The text of a conversation, up to where the model's next message begins.

        Raises:
          UserError: it is not Jinja, or does not take such messages.
        """
        jinja2 = _jinja2()
        try:
            return self._compiled.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self.tokens,
            )
        # A template may do what Python may; but our own mistakes are not to be blamed on it.
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{self.name} does not take these messages: {error}") from error

    def encode(self, messages: Messages, *, special: bool = False) -> list[int]:
        """Token ids of a conversation; BOS is there if the template writes it.

        The template's special tokens are parsed, their names in the messages stay text.

        Args:
          messages: the conversation.
          special: parse names in the messages, too, as transformers does by default.

        Raises:
          UserError: as `render`.
        """
        guarded = messages if special else _protected(messages, self.tokenizer)
        return self.tokenizer.encode(self.render(guarded), special=True)

    @functools.cached_property
    def _compiled(self) -> Any:
        jinja2 = _jinja2()
        try:
            return _environment().from_string(self.source)
        except jinja2.TemplateError as error:
            raise UserError(f"{self.name} is not a chat template: {error}") from error


def templates(files: Mapping[str, bytes]) -> dict[str, str]:
    """Templates by name, `default` among them where there is one.

    Raises:
      UserError: tokenizer_config.json is damaged.
    """
    found: dict[str, str] = {}
    given = _tokenizer_config(files).get("chat_template")
    if isinstance(given, str):
        found[DEFAULT] = given
    elif given:
        try:
            found = {one["name"]: one["template"] for one in given}
        except (KeyError, TypeError) as error:
            raise UserError("tokenizer_config.json: chat_template has no such templates") from error
    for file, content in files.items():
        folder, _, name = file.rpartition("/")
        if file == "chat_template.jinja":
            found[DEFAULT] = content.decode()
        elif folder == MORE_TEMPLATES:
            found[name.removesuffix(".jinja")] = content.decode()
    return found


def open_template(model: InferenceModel, choice: str = DEFAULT) -> ChatTemplate:
    """A template of a checkpoint, or one of a file.

    Args:
      model: with the files that came with it.
      choice: name of a template, or a file that ends in `.jinja`.

    Raises:
      UserError: there is no such template.
    """
    if choice.endswith(".jinja"):
        try:
            source, name = epath.Path(choice).read_text(), f"the chat template {choice}"
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --chat_template={choice}: {error}") from error
    else:
        name = f"the chat template {choice!r} of {model.folder}"
        found = templates(model.files)
        if not found:
            raise UserError(
                f"{model.folder} has no chat template; give one: --chat_template=FILE.jinja"
            )
        if choice not in found:
            raise UserError(
                f"{model.folder} has no chat template {choice!r}; --chat_template may be "
                f"{', '.join(sorted(found))}, or a FILE.jinja"
            )
        source = found[choice]
    tokenizer = _tokenizer(model)
    return ChatTemplate(source, name, tokenizer, _tokens(model.files, tokenizer))


def _tokenizer(model: InferenceModel) -> Tokenizer:
    """The tokenizer.json where there is one beside a SentencePiece model.

    It has the tokens that were added for turns, and puts spaces where transformers puts them.
    """
    content = model.files.get("tokenizer.json")
    if content is None:
        return model.tokenizer
    name = f"the tokenizer.json of {model.folder}"
    return Tokenizer(with_ends(content, _tokenizer_config(model.files), name), name)


def _tokenizer_config(files: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        values = json.loads(files.get("tokenizer_config.json", b"{}"))
    except ValueError as error:
        raise UserError(f"tokenizer_config.json is not valid JSON: {error}") from error
    return values if isinstance(values, dict) else {}


def _tokens(files: Mapping[str, bytes], tokenizer: Tokenizer) -> dict[str, str]:
    found = {
        "bos_token": tokenizer.piece(tokenizer.bos_id),
        "eos_token": tokenizer.piece(tokenizer.eos_id),
    }
    values = _tokenizer_config(files)
    for name in (f"{token}_token" for token in _TOKENS):
        value = values.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def _protected(value: Any, tokenizer: Tokenizer) -> Any:
    """Messages whose texts hold no name of a special token, however the template joins them."""
    if isinstance(value, str):
        return tokenizer.protected(value)
    if isinstance(value, list):
        return [_protected(one, tokenizer) for one in value]
    if isinstance(value, dict):
        return {key: _protected(one, tokenizer) for key, one in value.items()}
    return value


def _jinja2() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise UserError("chat templates need jinja2: pip install 'llama_jax[hf]'") from error
    return jinja2


@functools.cache
def _environment() -> Any:
    """Jinja as chat templates expect it: their white space, functions and tags."""
    _jinja2()
    from jinja2 import ext, nodes, sandbox
    from jinja2.exceptions import TemplateError

    class Generation(ext.Extension):
        """{% generation %}: marks what the model writes, for training; it shows what is inside."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    found = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    found.filters["tojson"] = to_json  # Jinja's own writes <, > and & as \u003c and so on
    found.globals["raise_exception"] = refuse
    found.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return found
