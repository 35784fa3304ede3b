"""Built-in templates give the ids of the released code, and count exactly the answers."""

import json

import numpy as np
import pytest
import sentencepiece
import tokenizers

from llama_jax.errors import UserError
from llama_jax.text.chat_template import ChatTemplate, special_tokens
from llama_jax.text.template_renderer import Refused
from llama_jax.text.templates import BUILT_IN, built_in, end_ids, open_choice, to_json
from llama_jax.text.tokenizer import Tokenizer
from tests.helpers import llama3_tokenizer, released_json
from tests.reference.chat_templates import (
    LLAMA2,
    LLAMA3,
    LLAMA3_FIRST,
    MISTRAL,
    chat_tokenizer,
    marked,
    said,
)

PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
ONE = said("abc def?", "Yes. 42")
TWO = said("abc def?", "Yes. 42", " more ", " no\n")
SYSTEM = said("abc def?", "Yes. 42", "more", "no", system="Be brief.")
ALPACA_INPUT = [
    {"role": "user", "content": "add\n\n1 2", "instruction": "add", "input": "1 2"},
    {"role": "assistant", "content": "3"},
]
ODD = said("日 🦙 </s> <s>[INST]", "🦙é日", "x", "1  2   3\n\n```\tx```  ")
# Template, messages, and the text with its counted parts in [[ ]], written by hand.
EXPECTED = [
    (
        "alpaca",
        ONE,
        f"<s>{PREAMBLE}\n\n### Instruction:\nabc def?\n\n### Response:[[Yes. 42</s>]]",
    ),
    (
        "alpaca",
        ALPACA_INPUT,
        f"<s>{WITH_INPUT}\n\n### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:[[3</s>]]",
    ),
    (
        "alpaca",
        TWO,
        f"<s>{PREAMBLE}\n\n### Instruction:\nabc def?\n\n### Response:[[Yes. 42</s>]]"
        "\n\n### Instruction:\n more \n\n### Response:[[ no\n</s>]]",
    ),
    ("vicuna", ONE, f"<s>{VICUNA} USER: abc def? ASSISTANT:[[ Yes. 42</s>]]"),
    (
        "vicuna",
        TWO,
        f"<s>{VICUNA} USER: abc def? ASSISTANT:[[ Yes. 42</s>]] USER:  more  ASSISTANT:"
        "[[  no\n</s>]]",
    ),
    (
        "vicuna",
        SYSTEM,
        "<s>Be brief. USER: abc def? ASSISTANT:[[ Yes. 42</s>]] USER: more ASSISTANT:[[ no</s>]]",
    ),
    ("llama2", ONE, "<s>[INST] abc def? [/INST][[ Yes. 42 </s>]]"),
    (
        "llama2",
        TWO,
        "<s>[INST] abc def? [/INST][[ Yes. 42 </s>]]<s>[INST] more [/INST][[ no </s>]]",
    ),
    (
        "llama2",
        SYSTEM,
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nabc def? [/INST][[ Yes. 42 </s>]]"
        "<s>[INST] more [/INST][[ no </s>]]",
    ),
    (
        "llama3",
        ONE,
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nabc def?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[Yes. 42<|eot_id|>]]",
    ),
    (
        "llama3",
        SYSTEM,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nabc def?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[Yes. 42<|eot_id|>]]"
        "<|start_header_id|>user<|end_header_id|>\n\nmore<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[no<|eot_id|>]]",
    ),
]


@pytest.fixture(scope="module")
def llama3(corpus):
    return Tokenizer(chat_tokenizer(corpus))


@pytest.fixture(scope="module")
def released(tokenizer):
    """Returns the SentencePiece model as a tokenizer.json in its released form."""
    return Tokenizer(released_json(tokenizer))


@pytest.mark.parametrize(("name", "messages", "expected"), EXPECTED)
@pytest.mark.parametrize("kind", ["model", "json"])
def test_what_counts(name, messages, expected, kind, tokenizer, released, llama3):
    if name == "llama3":
        tokenizer = llama3
    elif kind == "json":
        tokenizer = released
    found = built_in(name, tokenizer).example(messages)
    text = marked(tokenizer, found.ids, found.counts)
    if name == "alpaca" and kind == "json":  # it adds a space after specials
        text = text.replace("</s>]] \n", "</s>]]\n")
    assert text == expected


def reference(name, messages, encode, bos, eos):
    """Computes ids and counts like the code that was released with the template.

    `encode` gives the ids of a text by itself, with a space put before it.
    """
    system = None
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    pairs = list(zip(messages[::2], messages[1::2], strict=True))
    ids, counts = [], []
    for number, (asked, given) in enumerate(pairs):
        question, answer = asked["content"], given["content"]
        if name == "llama2":
            if system is not None and number == 0:
                question = f"<<SYS>>\n{system}\n<</SYS>>\n\n{question}"
            prompt, text = f"[INST] {question.strip()} [/INST]", f" {answer.strip()} "
        elif name == "vicuna":
            preamble = VICUNA if system is None else system
            prompt = f"{'' if number else preamble + ' '}USER: {question} ASSISTANT:"
            text = f" {answer}"
        elif asked.get("input"):
            question = f"{asked['instruction']}\n\n### Input:\n{asked['input']}"
            prompt = f"{WITH_INPUT}\n\n### Instruction:\n{question}\n\n### Response:"
            text = answer
        else:
            prompt = f"{PREAMBLE}\n\n### Instruction:\n{question}\n\n### Response:"
            text = answer
        if number == 0 or name == "llama2":
            ids, counts = [*ids, bos], [*counts, 0]
        whole, before = encode(prompt + text), encode(prompt)
        assert whole[: len(before)] == before
        ids += [*whole, eos]
        counts += [0] * len(before) + [1] * (len(whole) - len(before) + 1)
    return ids, counts


@pytest.mark.parametrize("kind", ["model", "json"])
@pytest.mark.parametrize("name", ["alpaca", "vicuna", "llama2"])
def test_ids_are_those_of_the_reference(name, kind, tokenizer, released):
    raw = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    template = built_in(name, tokenizer if kind == "model" else released)
    more = ALPACA_INPUT if name == "alpaca" else SYSTEM
    for messages in (ONE, TWO, ODD, more):
        messages = messages[:2] if name == "alpaca" else messages
        found = template.example(messages)
        ids, counts = reference(name, messages, raw.encode, raw.bos_id(), raw.eos_id())
        assert found.ids.tolist() == ids
        assert found.counts.astype(int).tolist() == counts


def test_ids_of_llama3_are_those_of_the_reference(llama3):
    """The reference encodes each part of a turn separately."""
    raw = tokenizers.Tokenizer.from_str(llama3.model_bytes.decode())
    raw.encode_special_tokens = True

    def encode(text):
        return raw.encode(text, add_special_tokens=False).ids

    begin, head, tail, end = (
        raw.token_to_id(f"<|{name}|>")
        for name in ("begin_of_text", "start_header_id", "end_header_id", "eot_id")
    )
    for messages in (ONE, TWO, SYSTEM, said("<|eot_id|> 🦙", "a<|end_header_id|>\n\nb 🦙")):
        ids, counts = [begin], [0]
        for message in messages:
            header = [head, *encode(message["role"]), tail, *encode("\n\n")]
            body = [*encode(message["content"].strip()), end]
            ids += header + body
            counts += [0] * len(header) + [int(message["role"] == "assistant")] * len(body)
        found = built_in("llama3", llama3).example(messages)
        assert found.ids.tolist() == ids
        assert found.counts.astype(int).tolist() == counts


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_prompt_is_the_beginning_of_what_was_trained_on(name, tokenizer, llama3):
    template = built_in(name, llama3 if name == "llama3" else tokenizer)
    for messages in (ONE, TWO):
        found = template.example(messages)
        prompt = template.encode(messages[:-1])
        assert found.ids[: len(prompt)].tolist() == prompt
        assert found.counts[len(prompt) :].all() and not found.counts[len(prompt) - 1]


def test_tokens_that_a_template_needs(tokenizer, corpus):
    lacking = Tokenizer(llama3_tokenizer(corpus))
    with pytest.raises(UserError, match=r"needs the special token <\|start_header_id\|>, .*_id\|>"):
        built_in("llama3", lacking)
    with pytest.raises(UserError, match="needs the special token"):
        open_choice("llama3", tokenizer, {})


@pytest.mark.parametrize(
    ("name", "role"), [("alpaca", "system"), ("alpaca", "tool"), ("vicuna", "tool")]
)
def test_roles_that_a_template_does_not_have(name, role, tokenizer):
    messages = [{"role": role, "content": "x"}, *ONE]
    with pytest.raises(Refused, match=f"does not take these messages: .* has no role {role}"):
        built_in(name, tokenizer).example(messages)


# Templates that are not built in.


def own(source, tokenizer):
    return ChatTemplate(source, "the template", tokenizer, special_tokens({}, tokenizer))


@pytest.mark.parametrize("name", ["llama2", "vicuna"])
def test_a_template_without_tags_counts_the_same(name, tokenizer):
    given = built_in(name, tokenizer)
    plain = given.source.replace("{%- generation %}", "{%- if true %}")
    plain = plain.replace("{% endgeneration %}", "{% endif %}")
    assert "generation %" not in plain
    for messages in (ONE, TWO, SYSTEM, ODD):
        expected, found = given.example(messages), own(plain, tokenizer).example(messages)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.counts, expected.counts)


def test_white_space_between_turns_is_no_part_of_an_answer(llama3):
    source = (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}\n{{ m.content }}<|eot_id|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant\n{% endif %}"
    )
    found = own(source, llama3).example(said("q", "a", "r", "b"))
    head = "<|start_header_id|>"
    assert marked(llama3, found.ids, found.counts) == (
        f"{head}user\nq<|eot_id|>\n{head}assistant\n[[a<|eot_id|>]]\n"
        f"{head}user\nr<|eot_id|>\n{head}assistant\n[[b<|eot_id|>]]\n"
    )
    # In a template without an end of turn, the line break counts as part of the answer.
    found = own("{% for m in messages %}{{ m.content }}\n{% endfor %}", llama3).example(ONE)
    assert marked(llama3, found.ids, found.counts) == "abc def?\n[[Yes. 42\n]]"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content if loop.last else '-' }}{% endfor %}",
        "{% for m in messages %}{{ m.content if m.role == 'user' or loop.last else '-' }}"
        "{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{{ 'so:' if add_generation_prompt else '' }}",
    ],
)
def test_prompts_that_are_not_the_beginning(source, tokenizer):
    with pytest.raises(UserError, match=r"has no \{% generation %\}, and the") as caught:
        own(source, tokenizer).example(TWO)
    assert not isinstance(caught.value, Refused)


def test_tags_within_a_text_that_is_changed_later(tokenizer):
    source = (
        "{% for m in messages %}{% set turn %}{% if m.role == 'assistant' %}"
        "{%+ generation -%} {{ m.content }}{% endgeneration %}{% else %}{{ m.content }}"
        "{% endif %}{% endset %}{{ turn | upper }}|{% endfor %}"
    )
    found = own(source, tokenizer).example(said("a\ufdd1b\ufdd2c", "d\ufdd0", "e", "f"))
    assert marked(tokenizer, found.ids, found.counts) == " ABC|[[D]]|E|[[F]]|"
    assert own(source, tokenizer).render(said("a", "b")) == "A|B|"


def test_which_template(tokenizer, tmp_path):
    (tmp_path / "own.jinja").write_text("{{ eos_token }}{{ pad_token }}")
    (tmp_path / "one.json").write_text(json.dumps({"chat_template": "A", "eos_token": "E"}))
    named = [{"name": "default", "template": "B"}, {"name": "x", "template": "C"}]
    (tmp_path / "many.json").write_text(json.dumps({"chat_template": named}))
    found = {p.name: open_choice(str(p), tokenizer, {"pad_token": "P"}) for p in tmp_path.iterdir()}
    assert found["own.jinja"].render(ONE) == "</s>P"
    assert found["one.json"].source == "A" and found["one.json"].tokens["eos_token"] == "E"
    assert found["many.json"].source == "B"
    for name, template in found.items():  # the copy in shards can be read back
        (tmp_path / name).with_suffix(".again.json").write_bytes(to_json(template))
        again = open_choice(str((tmp_path / name).with_suffix(".again.json")), tokenizer, {})
        assert (again.source, again.tokens) == (template.source, template.tokens)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("none", None, "neither one of alpaca, vicuna, llama2, llama3 nor a file"),
        ("a.jinja", "{% if %}", "is not a chat template: "),
        ("a.json", "{", "a.json is not valid JSON"),
        ("a.json", "[]", "a.json is not a JSON object"),
        ("a.json", '{"chat_template": [{"name": "x", "template": "C"}]}', "has no chat_template"),
        ("a.json", '{"chat_template": [3]}', "chat_template .* is malformed: "),
        (
            "a.json",
            '{"chat_template": [{"name": "\\n", "template": "C"}]}',
            "is not the name of a templ",
        ),
        ("a.json", '{"chat_template": [{"name": 1, "template": "C"}]}', "name must be of type str"),
        ("a.jinja", b"\xff", "a.jinja is not text in UTF-8"),
    ],
)
def test_files_that_hold_no_template(tokenizer, tmp_path, file, content, message):
    if content is not None:
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_choice(str(tmp_path / file), tokenizer, {})


@pytest.mark.parametrize(
    ("source", "ends"),
    [
        (LLAMA3, ["<|end_of_text|>", "<|eot_id|>"]),
        ("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}", ["<|end_of_text|>"]),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", ["<|end_of_text|>"]),
        # One token ends the last answer, another earlier ones; the next needs a system message.
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
            "{{ eos_token if loop.last else '<|eot_id|>' }}{% endgeneration %}"
            "{% else %}{{ m.content }}{% endif %}{% endfor %}",
            ["<|end_of_text|>", "<|eot_id|>"],
        ),
        (
            "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
            "{% for m in messages %}{{ m.content + '<|eot_id|>' }}{% endfor %}",
            ["<|end_of_text|>", "<|eot_id|>"],
        ),
        ("{{ raise_exception('only with tools') }}", ["<|end_of_text|>"]),
    ],
)
def test_what_ends_an_answer(llama3, source, ends):
    found = end_ids(own(source, llama3))
    assert [llama3.piece(token) for token in found] == ends


# Against transformers.


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["model", "json", "byte level"])
def test_the_masks_of_transformers(kind, tokenizer, released, llama3, tmp_path):
    import transformers

    ours = {"model": tokenizer, "json": released, "byte level": llama3}[kind]
    if kind == "model":
        tokenizer.save(tmp_path / "tokenizer.model")
        theirs = transformers.LlamaTokenizer.from_pretrained(str(tmp_path), legacy=False)
    else:
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer.from_str(ours.model_bytes.decode()),
            bos_token=ours.piece(ours.bos_id),
            eos_token=ours.piece(ours.eos_id),
        )
    names = ["llama3"] if kind == "byte level" else ["alpaca", "vicuna", "llama2"]
    templates = [built_in(name, ours) for name in names]
    if kind == "byte level":
        templates.append(own(LLAMA3, ours))
    for template in templates:
        for messages in (ONE, TWO, SYSTEM, said("日 🦙", "🦙é日", "x", "1  2\n\n`x`  ")):
            if messages is SYSTEM and "Alpaca" in template.source:
                continue
            encoded = theirs.apply_chat_template(
                messages,
                chat_template=template.source,
                return_assistant_tokens_mask=True,
                return_dict=True,
            )
            found = template.example(messages)
            assert found.ids.tolist() == encoded["input_ids"]
            assert found.counts.astype(int).tolist() == encoded["assistant_masks"]
            assert sum(encoded["assistant_masks"])
            text = theirs.apply_chat_template(
                messages, chat_template=template.source, tokenize=False
            )
            assert found.text == text


@pytest.mark.parity
@pytest.mark.parametrize(("name", "source"), [("llama2", LLAMA2), ("llama3", LLAMA3_FIRST)])
def test_built_in_ones_are_those_of_the_released_models(name, source, released, llama3):
    """Transformers renders the released template; all that follows a prompt counts."""
    import transformers

    ours = llama3 if name == "llama3" else released
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(ours.model_bytes.decode()),
        bos_token=ours.piece(ours.bos_id),
        eos_token=ours.piece(ours.eos_id),
    )

    def encode(messages, prompt):
        return theirs.apply_chat_template(
            messages, chat_template=source, add_generation_prompt=prompt, return_dict=False
        )

    for messages in (ONE, TWO, SYSTEM, said("日 🦙", "🦙é日", "x", "1  2\n\n`x`  ")):
        ids, counts = encode(messages, False), np.zeros(0, bool)
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = encode(messages[:number], True)
                after = encode(messages[: number + 1], False)
                assert ids[: len(before)] == before and ids[: len(after)] == after
                counts = np.pad(counts, (0, len(before) - len(counts)))
                counts = np.pad(counts, (0, len(after) - len(before)), constant_values=True)
        found = built_in(name, ours).example(messages)
        assert found.ids.tolist() == ids
        assert found.counts.tolist() == counts.tolist()


@pytest.mark.parity
@pytest.mark.parametrize("source", [LLAMA2, MISTRAL])
def test_the_ids_of_transformers_without_tags(source, tokenizer, tmp_path):
    import transformers

    tokenizer.save(tmp_path / "tokenizer.model")
    theirs = transformers.LlamaTokenizer.from_pretrained(str(tmp_path), legacy=False)
    for messages in (ONE, TWO, said("日 🦙", "🦙é日", "x", "1  2\n\n`x`  ")):
        ids = theirs.apply_chat_template(messages, chat_template=source, return_dict=False)
        assert own(source, tokenizer).example(messages).ids.tolist() == ids
