"""Instruction data, from files to batches: records read or skipped, and tokens that count."""

import gzip
import json
import re
import shutil

import numpy as np
import pytest
import zstandard
from etils import epath

from llama_jax.config import DataConfig
from llama_jax.data.batches import Batches, ValidationBatches
from llama_jax.data.prepare.job import prepare
from llama_jax.data.shards.layout import data_fingerprint, read_manifest, verify
from llama_jax.data.shards.reader import TokenDataset
from llama_jax.data.show import summary
from llama_jax.data.show.rows import Screen
from llama_jax.data.sources import conversations
from llama_jax.data.sources.conversations import examples, messages_of
from llama_jax.data.sources.documents import list_parts
from llama_jax.data.sources.part import Tally
from llama_jax.data.training_data import open_data
from llama_jax.errors import UserError
from llama_jax.text.chat_template import ChatTemplate
from llama_jax.text.templates import built_in
from llama_jax.text.tokenizer import Tokenizer, train_tokenizer
from llama_jax.text.tokenizer_config import special_ids
from tests.helpers import flip_bit, released_json, replace, text_config
from tests.reference.chat_templates import chat_tokenizer, marked, said

T = 512
ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
SHAREGPT = {
    "id": "x_0",
    "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
}
MESSAGES = {"messages": said("Hi", "Hello.", system="Be brief.")}


@pytest.fixture(scope="module")
def llama3(corpus):
    return Tokenizer(chat_tokenizer(corpus))


def quiet(line):
    """Logs nothing."""


def turns(*pairs):
    return {"conversations": [{"from": role, "value": text} for role, text in pairs]}


def made(count):
    """Returns `count` different conversations of 1 to 3 questions and answers."""
    rng = np.random.default_rng(0)
    return [
        {
            "messages": said(
                *(
                    f"{number} {turn} " + "abc def " * int(rng.integers(1, 6))
                    for turn in range(2 * int(rng.integers(1, 4)))
                )
            )
        }
        for number in range(count)
    ]


def read(records, template, tmp_path, seq_len=T, **fields):
    """Returns the examples of these records, and the tally."""
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    data = DataConfig(source=str(path), template="x", packing="best_fit", **fields)
    tally = Tally()
    (part,) = list_parts(str(path), data)
    return list(examples(part, data, template, seq_len, tally)), tally


# Records.


def test_four_forms_of_records():
    assert messages_of(ALPACA) == [
        {"role": "user", "content": "Add.\n\n1 2", "instruction": "Add.", "input": "1 2"},
        {"role": "assistant", "content": "3"},
    ]
    for nothing in ({"input": ""}, {"input": None}, {}):
        found = messages_of({"instruction": "Add.", "output": "3", **nothing})
        assert found[0] == {"role": "user", "content": "Add.", "instruction": "Add.", "input": ""}
    assert messages_of(SHAREGPT) == said("Hi", "Hello.")
    assert messages_of(MESSAGES) == said("Hi", "Hello.", system="Be brief.")
    # The format of openassistant-guanaco: turns on one line, with Markdown headings inside.
    text = "### Human: Hi, Assistant: ?### Assistant: ## Hello\n### Human ### Human: Bye"
    found = messages_of({"text": text})
    assert found == said("Hi, Assistant: ?", "## Hello\n### Human", "Bye")


def test_each_record_has_a_form_of_its_own(tokenizer, tmp_path):
    found, tally = read([ALPACA, SHAREGPT, MESSAGES], built_in("vicuna", tokenizer), tmp_path)
    answers = [tokenizer.decode(one.ids[one.counts].tolist()) for one in found]
    assert [answer.strip() for answer in answers] == ["3", "Hello.", "Hello."]
    assert not tally.skipped and not tally.changed
    assert tokenizer.decode(found[0].ids.tolist()).endswith("USER: Add.\n\n1 2 ASSISTANT: 3")
    assert tokenizer.decode(found[2].ids.tolist()).startswith("Be brief. USER: Hi")


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst"])
def test_files_of_records(ending, tokenizer, tmp_path):
    records = [ALPACA, {"instruction": 3}, SHAREGPT]
    text = "\n".join(map(json.dumps, records)) if "jsonl" in ending else json.dumps(records)
    data = text.encode()
    if ending.endswith(".gz"):
        data = gzip.compress(data)
    if ending.endswith(".zst"):
        data = zstandard.compress(data)
    path = tmp_path / f"a{ending}"
    path.write_bytes(data)
    config = DataConfig(source=str(path), template="x", packing="best_fit")
    tally = Tally()
    (part,) = list_parts(str(path), config)
    template = built_in("alpaca", tokenizer)
    assert len(list(examples(part, config, template, T, tally))) == 2
    assert tally.skipped == {"no text in field 'instruction'": 1}
    where = tally.first["no text in field 'instruction'"]
    assert where.startswith(str(path)) and ("record 2" in where) == ("jsonl" not in ending)


BAD = [
    (3, "a record without fields"),
    ({"text": "x"}, "no field instruction, conversations or messages"),
    ({"instruction": "x"}, "no text in field 'output'"),
    ({"instruction": None, "output": "y"}, "no text in field 'instruction'"),
    ({"instruction": "x", "input": 3, "output": "y"}, "no text in field 'input'"),
    ({"instruction": "x", "output": " \n"}, "an empty answer"),
    ({"instruction": "", "output": "y"}, "an empty question"),
    ({"conversations": "x"}, "no list of messages in field 'conversations'"),
    ({"messages": [3]}, "no list of messages in field 'messages'"),
    ({"messages": []}, "no answer"),
    ({"conversations": [{"from": "human"}]}, "no text in field 'value'"),
    ({"messages": [{"role": "user", "content": None}]}, "no text in field 'content'"),
    ({"messages": [{"content": "x"}]}, "no text in field 'role'"),
    (turns(("human", "x"), ("bard", "y")), "an unknown from"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "an unknown role"),
    (turns(("human", "x")), "no answer"),
    (turns(("gpt", "x")), "no answer"),
    (turns(("human", "x"), ("human", "y"), ("gpt", "z")), "roles out of order"),
    (turns(("human", "x"), ("gpt", "y"), ("gpt", "z")), "roles out of order"),
    (turns(("human", "x"), ("gpt", "y"), ("system", "z")), "roles out of order"),
    (turns(("system", "x"), ("system", "y"), ("gpt", "z")), "roles out of order"),
    (turns(("human", "x"), ("gpt", "")), "an empty answer"),
    (turns(("human", "x"), ("gpt", "y"), ("human", " "), ("gpt", "z")), "an empty question"),
    (MESSAGES, "a conversation that the template rejects"),
    (turns(("human", "x" * 900), ("gpt", "y")), "all answers are beyond train.seq_len=512"),
    (turns(("human", "x"), ("gpt", "y" * 3000)), "longer than 2,000 bytes"),
    ({"instruction": "x", "output": "\ud800"}, "invalid UTF-8"),
]


@pytest.mark.parametrize(("record", "reason"), BAD)
def test_a_bad_record_is_counted_and_costs_no_other(record, reason, tokenizer, tmp_path):
    template = built_in("alpaca", tokenizer)
    found, tally = read([ALPACA, record, SHAREGPT], template, tmp_path, max_document_bytes=2000)
    assert len(found) == 2
    assert tally.skipped == {reason: 1} and not tally.changed
    assert "records.json, record 2" in tally.first[reason]


def test_what_a_reason_does_not_say_stands_with_the_first(tokenizer, tmp_path):
    records = [turns(("human", "x"), ("bot", "y")), turns(("human", "x"), ("human", "y"))]
    records[1]["conversations"].append({"from": "gpt", "value": "z"})
    _, tally = read([*records, MESSAGES], built_in("alpaca", tokenizer), tmp_path)
    assert tally.first["an unknown from"].endswith("record 1: 'bot'")
    assert tally.first["roles out of order"].endswith("record 2: user after user")
    assert tally.first["a conversation that the template rejects"].endswith(
        "Alpaca has no role system"
    )


def test_an_answer_before_the_first_question_is_left_out(tokenizer, tmp_path):
    template = built_in("vicuna", tokenizer)
    record = turns(("gpt", "continued"), ("human", "Hi"), ("gpt", "Hello."))
    led = turns(("system", "S"), ("gpt", "a"), ("human", "Hi"), ("gpt", "Hello."))
    found, tally = read([record, SHAREGPT, led], template, tmp_path)
    assert found[0].ids.tolist() == found[1].ids.tolist()
    assert "S USER: Hi ASSISTANT: Hello." in tokenizer.decode(found[2].ids.tolist())
    assert tally.changed == {conversations.BEGINS_WITH_ANSWER: 2} and not tally.skipped


def test_what_a_template_leaves_out_is_counted(tokenizer, tmp_path):
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    source = (
        "{% for m in messages if m.role != 'system' %}"
        "{{ (m.content | trim) + eos_token }}{% endfor %}"
    )
    template = ChatTemplate(source, "the template", tokenizer, tokens)
    odd = turns(("human", " a</s>b\ufdd0\ufdd1 "), ("gpt", "c\ufdd2"))
    found, tally = read([SHAREGPT, odd, ALPACA, MESSAGES], template, tmp_path)
    assert len(found) == 4 and not tally.skipped
    (what,) = tally.changed
    assert what == "a message of the system that the template omits or changes"
    assert tally.changed[what] == 1 and tally.first[what].endswith("record 4")


def test_a_template_that_writes_no_answer(tokenizer, tmp_path):
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}"
    template = ChatTemplate(source, "the template", tokenizer, {})
    found, tally = read([SHAREGPT, MESSAGES], template, tmp_path)
    assert not found and tally.skipped == {"the template writes no answer": 2}


def test_nothing_follows_the_last_answer(tokenizer, tmp_path):
    asked = turns(("human", "Hi"), ("gpt", "Hello."), ("human", "And?"))
    found, _ = read([asked, SHAREGPT], built_in("vicuna", tokenizer), tmp_path)
    assert found[0].ids.tolist() == found[1].ids.tolist()
    assert found[0].counts[-1]


@pytest.mark.parametrize("name", ["alpaca", "vicuna", "llama2", "llama3"])
def test_long_conversations_are_cut(name, tokenizer, llama3, tmp_path):
    """They keep at most seq_len inputs, and end after the last token that counts."""
    template = built_in(name, llama3 if name == "llama3" else tokenizer)
    messages = said("abc", "one two three", "def", "four five")
    whole = template.example(messages)
    counted = np.flatnonzero(whole.counts)
    first, last = counted[0], counted[-1]
    gap = counted[np.flatnonzero(np.diff(counted) > 1)[0]]  # end of the first answer
    for seq_len, length in (
        (last, last + 1),
        (last + 5, last + 1),
        (last - 1, last),
        (gap, gap + 1),
        (gap + 2, gap + 1),  # in the next question
        (first, first + 1),
        (first - 1, 0),
    ):
        found, tally = read([{"messages": messages}], template, tmp_path, int(seq_len))
        if not length:
            assert not found and list(tally.skipped.values()) == [1]
            assert not tally.changed
            continue
        (one,) = found
        assert one.ids.tolist() == whole.ids[:length].tolist()
        assert one.counts.tolist() == whole.counts[:length].tolist()
        assert sum(tally.changed.values()) == (length <= last)
        assert not tally.skipped


def test_a_truncated_answer_by_hand(tokenizer, tmp_path):
    template = built_in("llama2", tokenizer)
    (one,), tally = read([turns(("human", "ab"), ("gpt", "42 cd"))], template, tmp_path, 20)
    assert marked(tokenizer, one.ids, one.counts) == "<s>[INST] ab [/INST][[ 42]]"
    assert tally.changed == {"longer than train.seq_len=20, and cut there": 1}
    assert one.text_bytes == len("<s> [INST] ab [/INST] 42")


@pytest.mark.parametrize(
    ("content", "reason", "found"),
    [
        (b'{"a": 1}', "no JSON list", 0),
        (b"[]", None, 0),
        (json.dumps([ALPACA, ALPACA]).encode()[:-9], "broken JSON", 1),
        (b"[" + json.dumps(ALPACA).encode() + b", \xff]", "broken JSON", 1),
        (b"[" * 100_000, "no JSON list", 0),
        (json.dumps([ALPACA]).encode()[:-1] + b", " + b"1" * 5000 + b"]", "broken JSON", 1),
    ],
)
def test_a_damaged_file(content, reason, found, tokenizer, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    config = DataConfig(source=str(path), template="x", packing="best_fit")
    tally = Tally()
    (part,) = list_parts(str(path), config)
    template = built_in("alpaca", tokenizer)
    records = list(examples(part, config, template, T, tally))
    assert len(records) == found
    expected = {f"{reason}; the rest of the file is left out": 1} if reason else {}
    assert tally.skipped == expected


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 9_000 + "]" * 9_000])
def test_a_line_that_python_refuses_costs_itself(value, tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps(ALPACA)
    path.write_text(f'{line}\n{line[:-1]}, "id": {value}}}\n{line}\n')
    config = DataConfig(source=str(path), template="x", packing="best_fit")
    tally = Tally()
    (part,) = list_parts(str(path), config)
    assert len(list(examples(part, config, built_in("alpaca", tokenizer), T, tally))) == 2
    assert tally.skipped == {"broken JSON line": 1}


def test_a_damaged_letter_costs_its_record(tokenizer, tmp_path):
    records = [ALPACA, {**ALPACA, "output": "AB"}, {**ALPACA, "id": "AB"}]
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(records).encode().replace(b"AB", b"A\xff"))
    config = DataConfig(source=str(path), template="x", packing="best_fit")
    tally = Tally()
    (part,) = list_parts(str(path), config)
    assert len(list(examples(part, config, built_in("alpaca", tokenizer), T, tally))) == 2
    assert tally.skipped == {"invalid UTF-8": 1}


def test_a_damaged_compressed_file(tokenizer, tmp_path):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps(made(200)).encode())[:-50])
    config = DataConfig(source=str(path), template="x", packing="best_fit")
    tally = Tally()
    list(
        examples(list_parts(str(path), config)[0], config, built_in("alpaca", tokenizer), T, tally)
    )
    assert tally.skipped == {"damaged compressed file; the rest of the file is left out": 1}


def test_only_json_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    config = DataConfig(template="alpaca", packing="best_fit")
    with pytest.raises(UserError, match="a.txt is neither .json nor .jsonl"):
        list_parts(str(tmp_path), config)
    for source in ("stdlib", "tfds:alpaca"):
        with pytest.raises(UserError, match=f"data.source={source} has no instruction data"):
            list_parts(source, config)


# Prepared shards.


def chat_config(tmp_path, tokenizer, records, **changes):
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    tokenizer.save(tmp_path / "tokenizer.model")
    fields = {
        "data__packing": "best_fit",
        "data__template": "vicuna",
        "data__tokenizer": str(tmp_path / "tokenizer.model"),
        "train__seq_len": T,
        **changes,
    }
    return replace(text_config(path), **fields)


@pytest.fixture(scope="module")
def chat(tokenizer, tmp_path_factory):
    """Returns config, records and shards of 60 conversations; tests must not change them."""
    folder = tmp_path_factory.mktemp("chat")
    records = made(60)
    config = chat_config(folder, tokenizer, records, data__shard_tokens=3000)
    prepare(config, folder / "shards", log=quiet)
    return config, records, folder / "shards"


def whole(records, template):
    """Returns the counts of each conversation by its ids."""
    found = (template.example(record["messages"]) for record in records)
    return {tuple(one.ids.tolist()): one.counts.tolist() for one in found}


def segments(rows):
    """Yields, per document of a batch, its ids and whether each counts as a target."""
    for row in range(len(rows["inputs"])):
        ids = rows["segment_ids"][row]
        for segment in range(1, ids.max() + 1):
            mine = ids == segment
            yield (
                (*rows["inputs"][row][mine], rows["targets"][row][mine][-1]),
                [False, *(rows["weights"][row][mine] == 1)],
            )


def test_shards_hold_the_masks(chat, tokenizer):
    _, records, folder = chat
    expected = whole(records, built_in("vicuna", tokenizer))
    found = {}
    for split in ("train", "validation"):
        dataset = TokenDataset.open(folder, split)
        assert dataset.n_sequences > 3
        for sequence in range(dataset.n_sequences):
            for tokens, counts in dataset.pieces(sequence):
                found[tuple(tokens.tolist())] = [False, *map(bool, counts)]
    assert found == expected
    manifest = read_manifest(folder)
    assert len(manifest["splits"]["train"]["shards"]) > 1
    splits = manifest["splits"].values()
    assert sum(split["answer_tokens"] for split in splits) == sum(map(sum, expected.values()))
    assert sum(split["documents"] for split in splits) == 60
    assert json.loads((folder / "chat_template.json").read_text())["bos_token"] == "<s>"


def test_batches_hold_the_masks(chat, tokenizer):
    config, records, folder = chat
    expected = whole(records, built_in("vicuna", tokenizer))
    data = open_data(config, epath.Path(folder))
    assert data.template == (folder / "chat_template.json").read_bytes()
    assert isinstance(data.train, Batches) and isinstance(data.validation, ValidationBatches)
    seen = {}
    for batches in (data.train, data.validation):
        for step in range(batches.n_sequences):  # eight epochs
            rows = batches.rows(step, range(8))
            assert not rows["weights"][rows["segment_ids"] == 0].any()
            for ids, counts in segments(rows):
                assert expected[ids] == counts
                seen[ids] = True
    assert len(seen) == 60


def test_batches_are_a_function_of_the_step(chat):
    config, _, folder = chat
    batches = open_data(config, epath.Path(folder)).train
    straight = list(batches.batches(range(8), 0, 6))
    resumed = list(batches.batches(range(8), 4, 6))
    hosts = [batches.rows(4, range(first, first + 4)) for first in (0, 4)]
    for name, value in straight[4].items():
        np.testing.assert_array_equal(value, resumed[0][name])
        np.testing.assert_array_equal(value, np.concatenate([part[name] for part in hosts]))
    assert 0 < straight[4]["weights"].mean() < 0.9


def test_the_split_is_by_conversation(chat, tokenizer, tmp_path):
    """Copies of a conversation go to the same split, with any template."""
    _, records, folder = chat
    again = replace(chat_config(tmp_path, tokenizer, records * 2), data__template="llama2")
    prepare(again, tmp_path / "shards", log=quiet)
    for split in ("train", "validation"):
        found = []
        for shards in (folder, tmp_path / "shards"):
            dataset = TokenDataset.open(shards, split)
            texts = [tokenizer.decode(tokens.tolist()) for tokens in dataset.documents()]
            found.append(sorted(re.search(r"(?:USER:|INST\]) (\d+) 0", text)[1] for text in texts))
        assert found[1] == sorted(found[0] * 2) and found[0]


def test_the_report(tokenizer, tmp_path):
    records = [*made(20), ALPACA, {"instruction": "x"}, {"instruction": "y"}]
    records.append(turns(("human", "x"), ("gpt", "y " * 600)))
    config = chat_config(tmp_path, tokenizer, records, data__validation_fraction=0.0)
    lines = []
    report = prepare(config, tmp_path / "shards", log=lines.append)[0]
    assert report.splits["train"]["documents"] == 22
    dataset = TokenDataset.open(tmp_path / "shards", "train")
    pieces = [p for s in range(dataset.n_sequences) for p in dataset.pieces(s)]
    answers = sum(int(counts.sum()) for _, counts in pieces)
    assert report.splits["train"]["answer_tokens"] == answers
    text = lines[-1]
    assert "conversations" in text and "of answers" in text and f"{answers:,}" in text
    assert "2  no text in field 'output'; the first: " in text
    assert "1  longer than train.seq_len=512, and cut there; the first: " in text
    again = prepare(config, tmp_path / "shards", log=quiet)[0]
    assert str(again) == text


def test_many_parts_are_the_same_conversations(chat, tmp_path):
    config, _, folder = chat
    many = replace(config, data__part_bytes=2000, data__workers=2)
    prepare(many, tmp_path / "many", log=quiet)
    counts = [read_manifest(f)["splits"]["train"] for f in (folder, tmp_path / "many")]
    for name in ("documents", "tokens", "answer_tokens", "text_bytes"):
        assert counts[0][name] == counts[1][name]


def test_the_fingerprint_covers_mask_and_template(chat, tokenizer, tmp_path):
    config, _, folder = chat
    manifest = read_manifest(folder)
    whole = data_fingerprint(manifest)
    for part in (manifest, manifest["splits"]["validation"]["shards"][0]):
        name = next(name for name in ("template_sha256", "mask_sha256") if name in part)
        part[name] += "1"
        assert data_fingerprint(manifest) != whole
        part[name] = part[name][:-1]
    # Another Jinja source with the same text and mask.
    source = built_in("vicuna", tokenizer).source + "{# once more #}"
    (tmp_path / "own.jinja").write_text(source)
    other = replace(config, data__template=str(tmp_path / "own.jinja"))
    prepare(other, tmp_path / "shards", log=quiet)
    ours, first = (TokenDataset.open(f, "train") for f in (tmp_path / "shards", folder))
    np.testing.assert_array_equal(ours.tokens(0, ours.n_tokens), first.tokens(0, first.n_tokens))
    assert ours.fingerprint != first.fingerprint


def test_other_templates_and_shards_are_not_mixed_up(chat, tokenizer, tmp_path):
    config, _, folder = chat
    with pytest.raises(UserError, match="made with another template; choose another folder"):
        prepare(replace(config, data__template="llama2"), folder, log=quiet)
    plain = replace(config, data__template="")
    with pytest.raises(UserError, match="made with another template; choose another folder"):
        prepare(plain, folder, log=quiet)
    where = epath.Path(folder)
    with pytest.raises(UserError, match="with a chat template, but data.template is empty now"):
        open_data(plain, where)
    with pytest.raises(UserError, match="with another chat template, but data.template is llama2"):
        open_data(replace(config, data__template="llama2"), where)
    # A template file that no longer exists does not count as another template.
    assert open_data(replace(config, data__template="gone.jinja"), where).template
    (tmp_path / "a.jsonl").write_text("\n".join(f'{{"text": "abc {n}"}}' for n in range(9)))
    text = replace(plain, data__source=str(tmp_path / "a.jsonl"))
    prepare(text, tmp_path / "text", log=quiet)
    with pytest.raises(UserError, match="with no chat template, but data.template is vicuna now"):
        open_data(config, epath.Path(tmp_path / "text"))
    with pytest.raises(UserError, match="made with another template"):
        prepare(replace(text, data__template="vicuna"), tmp_path / "text", log=quiet)


def test_shards_of_another_tokenizer_are_refused(chat, tokenizer, corpus, tmp_path):
    config, _, folder = chat
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    train_tokenizer([text[::-1] for text in texts], 300).save(tmp_path / "other.model")
    (tmp_path / "tokenizer.json").write_bytes(released_json(tokenizer))

    def opened(name):
        return open_data(replace(config, data__tokenizer=str(name)), epath.Path(folder))

    with pytest.raises(UserError, match=r"another tokenizer than \S+/other.model .*init_from"):
        opened(tmp_path / "other.model")
    # The same tokenizer in its other format, or a file that no longer exists, is accepted.
    for same in (tmp_path / "tokenizer.json", tmp_path / "gone.model", folder / "tokenizer.model"):
        assert opened(same).tokenizer.fingerprint == tokenizer.fingerprint


def test_damage_has_a_name(chat, tmp_path):
    folder = shutil.copytree(chat[2], tmp_path / "shards")
    mask = folder / "train-00000-000.mask"
    flip_bit(mask, 5)
    assert verify(folder) == [mask.name]
    flip_bit(mask, 5)
    mask.write_bytes(mask.read_bytes()[:-1])
    with pytest.raises(UserError, match="mask has .* bytes, the manifest says"):
        TokenDataset.open(folder, "train")
    flip_bit(folder / "chat_template.json", 5)
    assert set(verify(folder)) == {mask.name, "chat_template.json"}
    with pytest.raises(UserError, match="chat_template.json is missing, or not the template that"):
        TokenDataset.open(folder, "train")


def test_nothing_left(tokenizer, tmp_path):
    config = chat_config(tmp_path, tokenizer, [{"instruction": "x"}, {"a": "b"}, MESSAGES])
    config = replace(config, data__template="alpaca")
    with pytest.raises(UserError) as caught:
        prepare(config, tmp_path / "shards", log=quiet)
    text = str(caught.value)
    assert "has no conversation to train on (1 no text in field 'output'; the first: " in text
    assert "Alpaca has no role system" in text and "\n" not in text
    assert not (tmp_path / "shards").exists()


def test_a_tokenizer_is_needed(tokenizer, llama3, tmp_path):
    config = chat_config(tmp_path, tokenizer, made(3))
    with pytest.raises(UserError, match=r"data.template needs the tokenizer .* in data.tokenizer"):
        prepare(replace(config, data__tokenizer=""), tmp_path / "shards", log=quiet)
    with pytest.raises(UserError, match="needs the special token"):
        prepare(replace(config, data__template="llama3"), tmp_path / "shards", log=quiet)
    with pytest.raises(UserError, match="data.template=chatml is neither one of alpaca"):
        prepare(replace(config, data__template="chatml"), tmp_path / "shards", log=quiet)


def test_a_template_that_cannot_say_what_counts(tokenizer, tmp_path):
    (tmp_path / "bad.jinja").write_text("{{ messages | length }}{{ messages[-1].content }}")
    config = chat_config(tmp_path, tokenizer, made(3))
    config = replace(config, data__template=str(tmp_path / "bad.jinja"))
    with pytest.raises(
        UserError, match=r"chat.jsonl at byte 0: the chat template .*bad.jinja has no"
    ):
        prepare(config, tmp_path / "shards", log=quiet)


@pytest.mark.parametrize(
    "changes",
    [
        {"data__packing": "concat"},
        {"data__packing": "concat", "data__streaming": True},
        {"data__source": "synthetic"},
    ],
)
def test_a_template_does_not_go_with(chat, changes):
    with pytest.raises(
        UserError, match="data.template needs data.packing=best_fit, .* files to read"
    ):
        base = replace(chat[0], data__template="")
        replace(replace(base, **changes), data__template="vicuna")


def test_llama3_from_end_to_end(llama3, tmp_path):
    config = chat_config(
        tmp_path, llama3, [MESSAGES] * 3, data__template="llama3", data__validation_fraction=0.0
    )
    config = replace(config, model__vocab_size=llama3.vocab_size)
    llama3.save(tmp_path / "tokenizer.json")
    config = replace(config, data__tokenizer=str(tmp_path / "tokenizer.json"))
    prepare(config, tmp_path / "shards", log=quiet)
    data = open_data(config, epath.Path(tmp_path / "shards"))
    rows = data.train.rows(0, range(1))
    ids, counts = next(segments(rows))
    # With the files of a checkpoint, the model stops at the end of a turn.
    ends = [llama3.piece(one) for one in special_ids(data.files)[1]]
    assert ends == ["<|end_of_text|>", "<|eot_id|>"]
    head, tail = "<|start_header_id|>", "<|end_header_id|>"
    assert marked(llama3, ids, counts) == (
        f"<|begin_of_text|>{head}system{tail}\n\nBe brief.<|eot_id|>"
        f"{head}user{tail}\n\nHi<|eot_id|>{head}assistant{tail}\n\n[[Hello.<|eot_id|>]]"
    )


def test_show_marks_what_counts(tokenizer, tmp_path):
    config = chat_config(
        tmp_path, tokenizer, [{"messages": said("ab cd", "ef gh")}] * 2, train__seq_len=40
    )
    config = replace(config, data__template="llama2", data__validation_fraction=0.0)
    prepare(config, tmp_path / "shards", log=quiet)
    prepared = summary.open_prepared(tmp_path / "shards")
    lines = list(summary.show_rows(prepared, 0, 1, Screen(width=60)))
    assert "░ not in an answer, weight 0" in lines[0]
    first, rest = "  1: 0 ░ ‹BOS›[INST] ab cd [/INST]", "│  ef gh →‹EOS›"
    assert lines[3].split() == first.split() and lines[4].endswith(rest), lines
    assert "whole conversations, packed" in summary.summary(prepared, 0, Screen())
    assert "of answers" in summary.summary(prepared, 0, Screen())


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"\xff"])
def test_a_malformed_config_beside_the_tokenizer_is_one_line(tokenizer, tmp_path, content):
    config = chat_config(tmp_path, tokenizer, [{"messages": said("a", "b")}])
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer_config\.json") as caught:
        prepare(config, tmp_path / "shards", log=quiet)
    assert "\n" not in str(caught.value)
