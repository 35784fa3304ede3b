"""The chat templates for instruction data: four built-in ones, or your own from a file.

The built-in templates give exactly the tokens of the code that was released with their models, with
either format of the tokenizer (see `Tokenizer.gap`). A test compares them with written references.
"""

import json
from typing import Any

from etils import epath

from llama_jax.errors import UserError
from llama_jax.files import parse_json, read_bytes, text_of
from llama_jax.text.answer_ends import last_tokens
from llama_jax.text.chat_template import DEFAULT, ChatTemplate, named_templates, special_tokens
from llama_jax.text.template_renderer import Exceeded
from llama_jax.text.tokenizer import Tokenizer

# Stanford Alpaca (https://github.com/tatsu-lab/stanford_alpaca, `train.py`): one question, with or
# without an input, and no system message. Alpaca had no further questions; here they follow the EOS
# without the preamble.
ALPACA = r"""
{%- for message in messages %}
  {%- if message.role == 'user' %}
    {%- if loop.first %}
      {{- bos_token + gap + 'Below is an instruction that describes a task' }}
      {{- ', paired with an input that provides further context' if message.input else '' }}
      {{- '. Write a response that appropriately completes the request.' }}
    {%- endif %}
    {{- '\n\n### Instruction:\n' }}
    {{- message.instruction if message.instruction is defined else message.content }}
    {{- '\n\n### Input:\n' + message.input if message.input else '' }}
    {{- '\n\n### Response:' }}
  {%- elif message.role == 'assistant' %}
    {%- generation %}{{ message.content + eos_token }}{% endgeneration %}
  {%- else %}{{ raise_exception('Alpaca has no role ' + message.role) }}{% endif %}
{%- endfor %}
"""
# Vicuna v1.1 (https://github.com/lm-sys/FastChat, `conversation.py`): the answer begins with the
# space after the colon. A system message takes the place of the preamble.
VICUNA = r"""
{%- set preamble = 'A chat between a curious user and an artificial intelligence assistant. The ' +
    "assistant gives helpful, detailed, and polite answers to the user's questions." %}
{%- if messages[0].role == 'system' %}
  {%- set preamble = messages[0].content %}{% set messages = messages[1:] %}
{%- endif %}
{{- bos_token + gap + preamble + ' ' }}
{%- for message in messages %}
  {%- if message.role == 'user' %}
    {{- (gap if not loop.first else '') + 'USER: ' + message.content + ' ' }}
  {%- elif message.role == 'assistant' %}
    {{- 'ASSISTANT:' }}
    {%- generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}
  {%- else %}{{ raise_exception('Vicuna has no role ' + message.role) }}{% endif %}
{%- endfor %}
{{- 'ASSISTANT:' if add_generation_prompt else '' }}
"""
# LLaMA-2 chat (https://github.com/meta-llama/llama, `generation.py`): every pair of question and
# answer is between BOS and EOS; the system message is inside the first question.
LLAMA2 = r"""
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
  {%- set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}
  {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
  {%- if message.role == 'user' %}
    {%- set content = (system if loop.first else '') + message.content %}
    {{- bos_token + gap + '[INST] ' + content.strip() + ' [/INST]' }}
  {%- elif message.role == 'assistant' %}
    {%- generation %}{{ ' ' + message.content.strip() + ' ' + eos_token }}{% endgeneration %}
  {%- else %}{{ raise_exception('LLaMA-2 has no role ' + message.role) }}{% endif %}
{%- endfor %}
"""
# LLaMA-3 (https://github.com/meta-llama/llama3, `tokenizer.py`): every message has a header, and
# ends with a special token.
LLAMA3 = r"""
{{- bos_token }}
{%- for message in messages %}
  {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
  {%- if message.role == 'assistant' %}
    {%- generation %}{{ message.content.strip() + '<|eot_id|>' }}{% endgeneration %}
  {%- else %}{{ message.content.strip() + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt else '' }}
"""
BUILT_IN = {"alpaca": ALPACA, "vicuna": VICUNA, "llama2": LLAMA2, "llama3": LLAMA3}
# Special tokens that a built-in template writes by name.
_NEEDED = {
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
}


def built_in(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """Returns one of `BUILT_IN`, for this tokenizer.

    Raises:
      UserError: the vocabulary lacks a special token of the template.
    """
    missing = [one for one in _NEEDED.get(name, ()) if one not in tokenizer.special_names]
    if missing:
        raise UserError(
            f"the chat template {name} needs the special token {', '.join(missing)}, which the "
            "tokenizer does not have; use a tokenizer of this model family, or another template"
        )
    # The source is plain Jinja, so that other programs can use the template of a checkpoint.
    source = f"{{%- set gap = {tokenizer.gap!r} %}}{BUILT_IN[name]}".strip()
    return ChatTemplate(
        source, f"the chat template {name}", tokenizer, special_tokens({}, tokenizer)
    )


def open_choice(choice: str, tokenizer: Tokenizer, config: dict[str, Any]) -> ChatTemplate:
    """Opens the template that `data.template` names.

    Args:
      choice: one of `BUILT_IN`, a file of Jinja code, or a .json file with a `chat_template`.
      tokenizer: the tokenizer to use the template with.
      config: contents of the tokenizer_config.json of the tokenizer; empty: there is none.

    Raises:
      UserError: the template does not exist, or is not valid Jinja.
    """
    if choice in BUILT_IN:
        return built_in(choice, tokenizer)
    path, name = epath.Path(choice).expanduser(), f"data.template={choice}"
    if not path.exists():
        raise UserError(f"{name} is neither one of {', '.join(BUILT_IN)} nor a file")
    content = read_bytes(path)
    if path.suffix == ".json":
        values = parse_json(content, name)
        found = named_templates(values.get("chat_template"))
        if DEFAULT not in found:
            raise UserError(f"{name} has no chat_template")
        source, config = found[DEFAULT], {**config, **values}
    else:
        source = text_of(content, name)
    name = f"the chat template {choice}"
    template = ChatTemplate(source, name, tokenizer, special_tokens(config, tokenizer))
    template.check()
    return template


def from_json(content: bytes, tokenizer: Tokenizer) -> ChatTemplate:
    """Reads a template that `to_json` has written."""
    values = json.loads(content)
    tokens = special_tokens(values, tokenizer)
    return ChatTemplate(values["chat_template"], "the chat template", tokenizer, tokens)


def end_ids(template: ChatTemplate) -> list[int]:
    """Returns the tokens that end an answer: the tokenizer's EOS, and markers that end a turn.

    Raises:
      Exceeded: the template takes more time or memory than the limits.
    """
    tokenizer = template.tokenizer
    markers, found = set(tokenizer.marker_names), [tokenizer.eos_id]
    system = {"role": "system", "content": "Be brief."}
    turn = [
        {"role": "user", "content": "A question?"},
        {"role": "assistant", "content": "An answer."},
    ]
    for messages in (turn, [*turn, *turn], [system, *turn]):
        try:
            example = template.example(messages)
        except Exceeded:  # the same would happen in every conversation
            raise
        except UserError:  # the template rejects this kind of conversation
            continue
        last = (one for answer in example.answers for one in last_tokens(example, *answer))
        found += [one for one in last if tokenizer.piece(one) in markers]
    return list(dict.fromkeys(found))


def to_json(template: ChatTemplate) -> bytes:
    """Returns the template as a file that `open_choice` reads, like a tokenizer_config.json."""
    values = {"chat_template": template.source, **template.tokens}
    return json.dumps(values, ensure_ascii=False, indent=1).encode() + b"\n"
