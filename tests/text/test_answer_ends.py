"""Answers without an end token are counted (expectations by hand), stored and warned about."""

import json

import pytest
import tokenizers
from etils import epath

from llama_jax.data.prepare.job import prepare
from llama_jax.data.shards.layout import encode_manifest, read_manifest
from llama_jax.data.show import summary
from llama_jax.data.show.rows import Screen
from llama_jax.data.training_data import open_data
from llama_jax.text.templates import BUILT_IN, built_in, end_ids
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train import run as run_lib
from llama_jax.train.overview import remarks
from tests.data.sources.test_conversations import chat_config, quiet, read
from tests.helpers import replace
from tests.reference.chat_templates import chat_tokenizer, said
from tests.text.test_templates import own

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Chat templates; for each, `test_answers_without_an_end` states how many answers have no end.
BARE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
BEFORE_THE_NEXT = (
    "{% for m in messages %}{{ eos_token if not loop.first and m.role == 'user' else '' }}"
    "{{ m.role }}: {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
OUTSIDE = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}"
    "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
)
INSIDE = OUTSIDE.replace("{% endgeneration %}{{ eos_token }}", "{{ eos_token }}{% endgeneration %}")
SPACED = OUTSIDE.replace(
    "{% endgeneration %}{{ eos_token }}", "{{ eos_token }}\n{% endgeneration %}"
)
IN_TWO = OUTSIDE.replace("{{ eos_token }}", "{% generation %}{{ eos_token }}{% endgeneration %}")
IN_PARTS = INSIDE.replace(
    "{% generation %}", "{% generation %}a{% endgeneration %}--{% generation %}"
)
# The answers follow one another with nothing between them.
BESIDE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ eos_token if loop.last else '' }}{% endgeneration %}{% endif %}{% endfor %}"
)
ONLY_LAST = INSIDE.replace("{{ eos_token }}", "{{ eos_token if loop.last else '' }}")
# 1 + 2 + 3 answers; the author of one wrote the names of end tokens at its end, as text.
RECORDS = [
    {"messages": said("one", "two")},
    {"messages": said("three", "four</s><|end_of_text|>", "five", "six  ")},
    {"messages": said("a", "b", "c", "d", "e", "f", system="Be brief.")},
]


@pytest.fixture(scope="module")
def byte_level(corpus):
    return Tokenizer(chat_tokenizer(corpus))


def with_names(model_bytes, *names, special=True):
    """Returns a tokenizer.json with these tokens added."""
    described = json.loads(model_bytes)
    first = tokenizers.Tokenizer.from_str(model_bytes.decode()).get_vocab_size()
    for number, name in enumerate(names, first):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        token = {"id": number, "content": name, "special": special, **flags}
        described["added_tokens"].append(token)
    return json.dumps(described).encode()


def counted(source, tokenizer, tmp_path, seq_len=512, records=RECORDS):
    template = own(source, tokenizer) if "{" in source else built_in(source, tokenizer)
    found, _ = read(records, template, tmp_path, seq_len=seq_len)
    return [(one.answers, one.unended) for one in found]


@pytest.mark.parametrize("kind", ["SentencePiece", "byte level"])
@pytest.mark.parametrize(
    ("source", "unended"),
    [
        (CHATML, (1, 2, 3)),  # its markers are text here
        (BARE, (1, 2, 3)),
        (BEFORE_THE_NEXT, (1, 2, 3)),
        (OUTSIDE, (1, 2, 3)),
        (ONLY_LAST, (0, 1, 2)),
        (INSIDE, (0, 0, 0)),
        (SPACED, (0, 0, 0)),
        (IN_TWO, (0, 0, 0)),
        (IN_PARTS, (0, 0, 0)),
        (BESIDE, (0, 1, 2)),
    ],
    ids=[
        *("chatml", "bare", "before the next", "outside", "last", "inside", "spaced", "in two"),
        *("in parts", "beside"),
    ],
)
def test_answers_without_an_end(source, unended, kind, tokenizer, byte_level, tmp_path):
    chosen = tokenizer if kind == "SentencePiece" else byte_level
    expected = list(zip((1, 2, 3), unended, strict=True))
    assert counted(source, chosen, tmp_path) == expected


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates_end_all_answers(name, tokenizer, byte_level, tmp_path):
    records = RECORDS[:2] if name == "alpaca" else RECORDS  # no system message
    chosen = byte_level if name == "llama3" else tokenizer
    found = counted(name, chosen, tmp_path, records=records)
    assert found == [(1, 0), (2, 0), (3, 0)][: len(records)]


def test_chatml_with_its_names_in_the_vocabulary(byte_level, tmp_path):
    known = Tokenizer(with_names(byte_level.model_bytes, "<|im_start|>", "<|im_end|>"))
    assert counted(CHATML, known, tmp_path) == [(1, 0), (2, 0), (3, 0)]


def test_an_end_with_white_space_behind_it_ends_generation(byte_level):
    """With `<|eot_id|>` and a line break between the tags, the token ends it, not the break."""
    source = SPACED.replace("eos_token", "'<|eot_id|>'")
    found = [byte_level.piece(token) for token in end_ids(own(source, byte_level))]
    assert found == ["<|end_of_text|>", "<|eot_id|>"]


def test_answers_that_are_cut_are_not_counted(tokenizer, tmp_path):
    """The second answer lost its end to the length limit: the template is not to blame."""
    template = own(INSIDE, tokenizer)
    encoded = template.example(RECORDS[1]["messages"])
    last = int(encoded.counts.nonzero()[0][-1])  # the second answer's end token
    cut = {0: [(2, 0)], 1: [(1, 0)], 2: [(1, 0)]}
    for back, expected in cut.items():
        records = RECORDS[1:2]
        assert counted(INSIDE, tokenizer, tmp_path, last - back, records) == expected
    assert counted(OUTSIDE, tokenizer, tmp_path, last - 4, RECORDS[1:2]) == [(1, 1)]


@pytest.fixture(scope="module")
def unended(tokenizer, tmp_path_factory):
    """Returns the config, folder and log of 24 conversations whose 48 answers have no end."""
    folder = tmp_path_factory.mktemp("unended")
    records = [
        {"messages": said(*(f"{number} {turn}" for turn in range(2 + 2 * (number % 3))))}
        for number in range(24)
    ]
    (folder / "bare.jinja").write_text(BARE)
    config = chat_config(
        folder,
        tokenizer,
        records,
        data__template=str(folder / "bare.jinja"),
        data__part_bytes=500,
        optim__warmup_steps=0,
        train__steps=1,
        train__sample_prompt="",
    )
    lines = []
    prepare(config, folder / "shards", log=lines.append)
    return config, folder, lines


def test_the_report_and_the_manifest(unended, tokenizer, tmp_path):
    config, folder, lines = unended
    assert "answers without an end token: 48 of 48" in lines[-1].splitlines()
    splits = read_manifest(folder / "shards")["splits"]
    assert sum(split["unended_answers"] for split in splits.values()) == 48
    assert str(prepare(config, folder / "shards", log=quiet)[0]) == lines[-1]
    fine = replace(config, data__template="vicuna")
    report = prepare(fine, tmp_path / "fine", log=quiet)[0]
    assert "answers without an end token: 0 of 48" in str(report).splitlines()
    shown = summary.summary(summary.open_prepared(folder / "shards"), 0, Screen(100, False))
    assert "the source: answers without an end token: 48 of 48" in shown.splitlines()


def test_a_run_warns_once_of_shards_that_were_prepared_before(
    unended, tmp_path, capsys, monkeypatch
):
    class Reached(Exception):
        pass

    def reached(*_):
        raise Reached

    config, folder, _ = unended
    here = replace(config, data__path=str(folder / "shards"), mesh__fsdp=8)
    monkeypatch.setattr(run_lib, "Checkpointer", reached)  # stops the run here
    with pytest.raises(Reached):
        run_lib.train(here, tmp_path / "run")
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert warning.startswith("warning 48 of 48 answers do not end in an end token")
    assert f"the chat template {config.data.template}" in warning and "eos_token" in warning


def test_no_warning_where_all_is_well_or_nothing_is_known(unended, tmp_path):
    config, folder, _ = unended
    fine = replace(config, data__template="vicuna")
    assert remarks(fine, open_data(fine, epath.Path(tmp_path / "fine")), None) == []
    path = folder / "shards" / "manifest.json"
    kept = path.read_bytes()
    manifest = json.loads(kept)
    for split in manifest["splits"].values():  # older versions did not count answers
        del split["answers"], split["unended_answers"]
    path.write_bytes(encode_manifest(manifest))
    try:
        here = replace(config, data__path=str(folder / "shards"))
        assert remarks(here, open_data(here, epath.Path(tmp_path)), None) == []
        report = str(prepare(config, folder / "shards", log=quiet)[0])
        assert "without an end token" not in report and "of answers" in report
    finally:
        path.write_bytes(kept)
