"""Continues texts: `python -m llama_jax.generate --checkpoint=DIR --prompt=TEXT`.

Text is printed as it is sampled. Several prompts are continued at the same time and printed one
after the other. A file of prompts has one prompt per line; a line of a .jsonl file is a string or
{"prompt": TEXT}. A prompt begins with BOS if the tokenizer adds it, as in transformers; with
--special, no second BOS is added to a prompt that begins with one.

A checkpoint with a chat template answers conversations: a line of --messages is a list of messages
{"role": "user", "content": TEXT}, or {"messages": [...]}. --chat_template=default makes each prompt
a conversation of one message; other values name another template of the checkpoint, or a file.
--chat answers each message that you type.

Example:
  python -m llama_jax.generate --checkpoint=runs/tiny --prompt='def main(' --max_tokens=100
  python -m llama_jax.generate --checkpoint=runs/7b --prompts=prompts.jsonl --json \\
      --mesh=fsdp=2,tensor=4 > answers.jsonl
  python -m llama_jax.generate --checkpoint=runs/chat --chat_template=default --prompt='Who? You?'
  python -m llama_jax.generate --checkpoint=runs/chat --messages=conversations.jsonl --json
  python -m llama_jax.generate --checkpoint=runs/chat --chat --system='Answer in one sentence.'
"""

import dataclasses
import json
import sys
from collections.abc import Iterator

import jax
from absl import flags

from llama_jax.cli import command
from llama_jax.errors import UserError
from llama_jax.inference.chat import Conversation, converse, open_template, with_turn_ends
from llama_jax.inference.decode import Sampling, check_prompts
from llama_jax.inference.generation import NewText, Stopwatch, new_texts, show_in_order
from llama_jax.inference.loaded_model import InferenceModel, open_model
from llama_jax.inference.prompts import Request, read_messages, read_prompts
from llama_jax.text.chat_template import DEFAULT

# Maximum number of new tokens without --max_tokens; an answer is rarely longer.
PROMPT_TOKENS, CHAT_TOKENS = 128, 512
# Tokens that one program generates when the text is not printed token by token.
UNWATCHED = 32

_CHECKPOINT = command.path_flag(
    "checkpoint",
    None,
    "Work directory (its newest step is used), or the folder of one step.",
)
_PROMPT = flags.DEFINE_multi_string(
    "prompt", [""], "Text to continue; repeat the flag for several texts."
)
_PROMPTS = command.path_flag("prompts", None, "File of prompts; replaces --prompt.")
_MESSAGES = command.path_flag(
    "messages", None, "File of conversations (.jsonl); replaces --prompt."
)
_CHAT_TEMPLATE = command.path_flag(
    "chat_template",
    None,
    "Chat template for prompts and messages: the name of one in the checkpoint (default is its "
    "standard template, which --messages and --chat use), or a FILE.jinja.",
)
_CHAT = flags.DEFINE_bool(
    "chat",
    False,
    "Answer messages that are typed, or read line by line from standard input; see /help.",
)
_SYSTEM = flags.DEFINE_string(
    "system", "", "System message, with --chat: how the model should behave."
)
_SPECIAL = flags.DEFINE_bool(
    "special",
    False,
    "Read names of special tokens in prompts and messages, such as </s>, as these tokens.",
)
_JSON = flags.DEFINE_bool("json", False, "Print a line of JSON for each prompt.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Prompts that are continued at the same time.")
_BASE = command.path_flag(
    "base",
    "",
    "Base weights of a LoRA checkpoint, as hf:DIR, meta:DIR or ckpt:DIR; empty: where they were "
    "in training.",
)
_MESH = flags.DEFINE_string(
    "mesh",
    "",
    "Devices along data, fsdp and tensor, such as fsdp=2,tensor=2; empty: as many along tensor as "
    "the model divides over.",
)
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens",
    None,
    f"Maximum number of new tokens; default: {PROMPT_TOKENS}, with --chat {CHAT_TOKENS}.",
    lower_bound=1,
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.8, "Sampling temperature; 0: take the most likely token (greedy)."
)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from the k most likely tokens; 0: from all.")
_TOP_P = flags.DEFINE_float(
    "top_p", 0.95, "Sample from the most likely tokens whose total probability is this."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling.")


def main() -> None:
    """Runs the command."""
    sampling = Sampling(
        max_tokens=_MAX_TOKENS.value or (CHAT_TOKENS if _CHAT.value else PROMPT_TOKENS),
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        seed=_SEED.value,
    )
    if _BATCH_SIZE.value < 1:
        raise UserError(f"--batch_size must be at least 1, got {_BATCH_SIZE.value}")
    requests = _requests()
    model = open_model(_CHECKPOINT.value, _MESH.value, _BASE.value)
    if _CHAT.value or _MESSAGES.value or _CHAT_TEMPLATE.value:
        template = open_template(model, _CHAT_TEMPLATE.value or DEFAULT)
        model = with_turn_ends(model, template)
    if _CHAT.value:
        conversation = Conversation(
            model, template, sampling, system=_SYSTEM.value, special=_SPECIAL.value
        )
        with jax.set_mesh(model.mesh):
            converse(conversation)
        return
    if _MESSAGES.value or _CHAT_TEMPLATE.value:
        ids = [template.encode(request.messages(), special=_SPECIAL.value) for request in requests]
    else:
        encode = model.tokenizer.encode_prompt
        ids = [encode(request.prompt, special=_SPECIAL.value) for request in requests]
    check_prompts(ids, model.context)  # all of them, before the first one is continued
    watch = Stopwatch()
    with jax.set_mesh(model.mesh):
        for first in range(0, len(requests), _BATCH_SIZE.value):
            rows = slice(first, first + _BATCH_SIZE.value)
            seed = sampling.seed + first  # batches, like rows, get different samples
            watch.count(
                _batch(
                    model,
                    requests[rows],
                    ids[rows],
                    dataclasses.replace(sampling, seed=seed),
                    first if len(requests) > 1 else None,
                )
            )
    print(watch.summary(), file=sys.stderr)


def _requests() -> list[Request]:
    given = [flag.name for flag in (_PROMPT, _PROMPTS, _MESSAGES, _CHAT) if flag.present]
    if len(given) > 1:
        raise UserError(f"give only one of --{' and --'.join(given)}")
    if _SYSTEM.value and not _CHAT.value:
        raise UserError("--system needs --chat; with --messages, write it as the first message")
    if _CHAT.value and _JSON.value:
        raise UserError("--json cannot be used with --chat; use --messages")
    if _MESSAGES.value:
        return [Request(conversation=messages) for messages in read_messages(_MESSAGES.value)]
    prompts = read_prompts(_PROMPTS.value) if _PROMPTS.value else _PROMPT.value
    return [Request(prompt) for prompt in prompts]


def _batch(
    model: InferenceModel,
    requests: list[Request],
    ids: list[list[int]],
    sampling: Sampling,
    first: int | None,
) -> Iterator[NewText]:
    """Continues the prompts of one batch and prints the texts; yields each new piece of text."""
    if not _JSON.value:

        def write(text: str) -> None:
            print(text, end="", flush=True)

        # An answer is printed without its prompt, a continuation with it.
        shown = ["" if _CHAT_TEMPLATE.value else request.prompt for request in requests]
        found = new_texts(model, ids, sampling, chunk=1)
        yield from show_in_order(shown, found, write, first)
        return
    texts, counts = [""] * len(requests), [0] * len(requests)
    for addition in new_texts(model, ids, sampling, chunk=UNWATCHED):
        texts[addition.row] += addition.text
        counts[addition.row] += addition.tokens
        yield addition
    for request, text, count in zip(requests, texts, counts, strict=True):
        answer = {**request.to_dict(), "text": text, "tokens": count}
        print(json.dumps(answer, ensure_ascii=False))


if __name__ == "__main__":
    command.run(main, __doc__)
