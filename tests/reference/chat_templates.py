"""Chat templates in the style of three families, and conversations for them."""

# A system message goes into the first user message; every user message begins with BOS.
LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}
  {% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
  {% set turns = messages[1:] %}
{% else %}
  {% set system = '' %}
  {% set turns = messages %}
{% endif %}
{% for message in turns -%}
  {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('user and assistant must take turns') }}
  {% endif %}
  {% set content = system + message['content'] if loop.first else message['content'] %}
  {% if message['role'] == 'user' -%}
    {{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
  {%- elif message['role'] == 'assistant' -%}
    {{ ' ' + content.strip() + ' ' + eos_token }}
  {%- endif %}
{%- endfor %}
"""
# Headers around every role, and a date.
LLAMA3 = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
  {%- set system = messages[0].content | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nDate: ' + strftime_now('%d %b %Y') + '\\n' }}
{{- system + '<|eot_id|>' }}
{%- for message in messages %}
  {%- if message.role not in ('user', 'assistant') %}{% continue %}{% endif %}
  {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
  {%- if message.role == 'assistant' %}
    {%- generation %}{{ message.content | trim + '<|eot_id|>' }}{% endgeneration %}
  {%- else %}{{ message.content | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
# Like LLAMA3, but as in the first Llama-3-Instruct: no date, and no system message by default.
LLAMA3_FIRST = """\
{% for message in messages %}
{% set head = '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>' %}
{% set turn = head ~ '\\n\\n' ~ (message['content'] | trim) ~ '<|eot_id|>' %}
{{ bos_token + turn if loop.first else turn }}{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
# One BOS; an answer ends with EOS; extra fields as JSON.
MISTRAL = """\
{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}
{% elif message['role'] == 'tool' %}{{ '[RESULT] ' + message | tojson + '[/RESULT]' }}
{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}{% endfor %}
"""
TEMPLATES = {"llama2": LLAMA2, "llama3": LLAMA3, "mistral": MISTRAL}


def said(*texts, system=None):
    """Returns a conversation in which user and assistant take turns."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return first + [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


CONVERSATIONS = [
    said("Who are you?"),
    said("  two  spaces \n", "é 日本 🦙\n\nyes", "a < b && c > d"),
    said("x", "", " ", "1234567", "{{ 7 * 7 }} {% raw %}"),
]
WITH_SYSTEM = said("Hello", "Hi.", "And?", system=" Be brief. ")


def chat_tokenizer(corpus):
    """Returns a small tokenizer.json like LLaMA-3's, with all tokens of its conversations."""
    from tokenizers import Tokenizer

    from tests.helpers import llama3_tokenizer

    made = Tokenizer.from_str(llama3_tokenizer(corpus).decode())
    made.add_special_tokens(["<|start_header_id|>", "<|end_header_id|>"])
    return made.to_str().encode()


def marked(tokenizer, ids, counts):
    """Returns the text of tokens, counted ones in [[ ]]; special tokens appear by name."""
    stream, text, inside = tokenizer.stream(), "", False
    for token, count in zip(ids, counts, strict=True):
        if count != inside:
            text += "[[" if count else "]]"
            inside = bool(count)
        name = tokenizer.piece(token)
        added = stream.add(int(token))
        text += added + (name if name in tokenizer.special_names else "")
    return text + ("]]" if inside else "")
