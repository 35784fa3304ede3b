"""The tokenizer.json that `convert` exports of a SentencePiece model gives sentencepiece's ids.

The tokenizers library reads the file here; transformers reads it in `make parity`.
"""

import importlib.util
import io
import itertools
import json
import pathlib
import random
import sys
import sysconfig

import pytest
import sentencepiece
import tokenizers

from llama_jax.errors import UserError
from llama_jax.inference.chat import open_template
from llama_jax.inference.loaded_model import open_model
from llama_jax.interchange import bpe_rules
from llama_jax.interchange.fast_tokenizer import fast_files
from llama_jax.interchange.hf import HfSource
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.transfer import convert
from llama_jax.text.tokenizer import Tokenizer
from tests.helpers import TINY, random_params, replace, run_command
from tests.interchange.test_transfer import Memory, exported
from tests.reference.chat_templates import said

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
LLAMA = {
    "model_type": "bpe",
    "vocab_size": 500,
    "split_digits": True,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "minloglevel": 2,
}
NAMED = {
    "user_defined_symbols": [
        "[INST]",
        "[/INST]",
        "foo",
        "foobar",
        "\u2581\u2581\u2581",
        "é",
        "(.*)",
    ],
    "control_symbols": ["[CTRL]", "<pad>"],
}
SOURCES = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))[:200]


@pytest.fixture(scope="module")
def sources():
    return [path.read_text(errors="replace") for path in SOURCES]


def hard_strings(pieces):
    """Returns 200 or more strings that are easy to get wrong, some of them made of `pieces`."""
    found = [
        *(
            "",
            " ",
            "  ",
            "\t",
            "\n",
            "\r\n",
            "\0",
            "a\0b",
            " \n \n ",
            "\x1b[0m",
            "\u2581",
            " \u2581",
            "\u2581 x",
        ),
        *(
            "  leading",
            "trailing  ",
            "  both  ",
            "a  b   c",
            "\ta\t b",
            "x\u2581y",
            "\u2581\u2581\u2581",
        ),
        *(
            "ﬁ ﬃ ½ ² Ⅷ ㎏ ｆｕｌｌ ﾊﾞ",
            "é e\u0301 q\u0307\u0323 ẛ̣ ﬁ\u0301",
            "각 \u1100\u1161\u11a8",
            "ǆ İ ſ Å",
        ),
        *(
            "🦙👩\u200d👩\u200d👧👍🏽🇩🇪",
            "1\ufe0f\u20e3 ☃",
            "日本語中文",
            "العربية עברית",
            "\u200f\u202eabc\u202c",
        ),
        *(
            "\u00a0\u2003\u200b\u3000\ufeff",
            "\u2028\u2029\u0085",
            "\ufdd0\ufffd\U0010ffff",
            "<0x0A>",
            "<unk>",
        ),
        *(
            "[INST] hi [/INST]",
            "[INST]",
            " [INST]",
            "[INST ]",
            "x[INST]y",
            "foobarfoo foo",
            "(.*)[INST](.*)",
        ),
        *(
            "a" * 2000,
            "ab" * 500,
            "0123456789" * 9,
            "1 2 3",
            "-" * 99,
            "the" * 77,
            "é" * 30,
            "\n" * 20,
        ),
        *(" " * count + "x" for count in (2, 3, 5, 8, 13, 16, 17, 31, 33, 64, 100)),
        *(f"a{' ' * count}b" for count in range(2, 20)),
    ]
    draw = random.Random(1)
    texts = [piece.replace("\u2581", " ") for piece in pieces]
    letters = sorted({letter for text in texts for letter in text})
    while len(found) < 200:
        found.append("".join(draw.choices(texts, k=draw.randint(2, 6))))
        found.append("".join(draw.choices(draw.choices(letters, k=3), k=draw.randint(2, 30))))
    return found


def proto(model_bytes):
    from sentencepiece import sentencepiece_model_pb2  # Beam's protobuf is too old

    return vars(sentencepiece_model_pb2)["ModelProto"].FromString(model_bytes)


@pytest.fixture(scope="module")
def trained(sources):
    """Returns a cached function that trains a model with options that differ from LLaMA's."""
    made = {}

    def train(**changes):
        key = json.dumps(changes)
        if key not in made:
            lines = (line for text in sources[:30] for line in text.splitlines() if line)
            model = io.BytesIO()
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=itertools.islice(lines, 4000),
                model_writer=model,
                **{**LLAMA, **changes},
            )
            made[key] = model.getvalue()
        return proto(made[key])

    return train


def scored(model, rule):
    """Sets the score of each piece of several characters to `rule(piece, score)`."""
    for piece in model.pieces:
        if piece.type == NORMAL and len(piece.piece) > 1:
            piece.score = rule(piece.piece, piece.score)
    return model


def spaces_last(piece, score):
    return -1e9 if set(piece) == {"\u2581"} else score


def shuffled(model):
    scores = [piece.score for piece in model.pieces if piece.type == NORMAL]
    random.Random(0).shuffle(scores)
    rest = iter(scores)
    return scored(model, lambda piece, score: next(rest))


def ties_apart(model):
    """Gives the same score to two pieces that share no character."""
    found = {piece.piece: piece for piece in model.pieces}
    found["in"].score = found["se"].score
    return model


def renamed(model, *names):
    """Replaces some pieces by `names`, which no merges produce."""
    pieces = [p for p in model.pieces if p.type == NORMAL and len(p.piece) > 3]
    for piece, name in zip(pieces, names, strict=False):
        piece.piece = name
    return model


def normalizer(model, **changes):
    for name, value in changes.items():
        setattr(model.normalizer_spec, name, value)
    return model


def without(model, letter):
    del model.pieces[[piece.piece for piece in model.pieces].index(letter)]
    return model


def kind_of(model, name, kind):
    {piece.piece: piece for piece in model.pieces}[name].type = kind
    return model


SAID = {
    "llama": lambda train: train(),
    "spaces last": lambda train: scored(train(), spaces_last),
    "other order": lambda train: shuffled(train()),
    "reversed": lambda train: scored(train(), lambda piece, score: -1000 - score),
    "ties": lambda train: ties_apart(train()),
    "unreachable": lambda train: renamed(train(), "qzqzq", "a\u2581\u2581b", "<|x|>", "zz" * 20),
    "named": lambda train: scored(train(**NAMED), spaces_last),
    "named, no prefix": lambda train: normalizer(train(**NAMED), add_dummy_prefix=False),
    "named, unreachable": lambda train: renamed(train(**NAMED), "qzqzq", "a\u2581\u2581b", "<|x|>"),
    "patterns": lambda train: train(
        user_defined_symbols=["\n", "0", "[a-z]", "^", "|", "\\", "<0x41>x"]
    ),
    "no prefix": lambda train: normalizer(train(), add_dummy_prefix=False),
    "extra spaces": lambda train: normalizer(train(), remove_extra_whitespaces=True),
    "learnt without extra spaces": lambda train: train(remove_extra_whitespaces=True),
    "named, extra spaces": lambda train: normalizer(train(**NAMED), remove_extra_whitespaces=True),
    "extra, no prefix": lambda train: normalizer(
        train(), remove_extra_whitespaces=True, add_dummy_prefix=False
    ),
    "no bytes": lambda train: train(byte_fallback=False, character_coverage=0.99),
    "surface": lambda train: train(
        byte_fallback=False, character_coverage=0.99, unk_surface="??", **NAMED
    ),
    "other names": lambda train: train(
        unk_piece="[U]", bos_piece="[B]", eos_piece="[E]", bos_id=3, eos_id=0, unk_id=1
    ),
    "across words": lambda train: train(split_by_whitespace=False, split_by_unicode_script=False),
    "letters": lambda train: train(model_type="char", hard_vocab_limit=False),
    "letters, no bytes": lambda train: train(
        model_type="char", vocab_size=60, hard_vocab_limit=False, byte_fallback=False
    ),
}
NOT_SAID = {
    "all equal": (lambda train: scored(train(), lambda piece, score: 0.0), "equal scores, such as"),
    "unused": (lambda train: kind_of(train(), "th", UNUSED), "unused piece 'th'"),
    "unused letter": (lambda train: kind_of(train(), "e", UNUSED), "encodes 'e' without its piece"),
    "control letter": (
        lambda train: kind_of(train(), "e", CONTROL),
        "encodes 'e' without its piece",
    ),
    "no letter": (lambda train: without(train(), "e"), "is made of 'e', which is not a piece"),
    "nfkc": (
        lambda train: train(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True),
        "its normalizer, nmt_nfkc, replaces sequences of characters",
    ),
    "unigram": (lambda train: train(model_type="unigram"), "it is a unigram model"),
    "words": (lambda train: train(model_type="word", byte_fallback=False), "it is a word model"),
    "suffix": (lambda train: train(treat_whitespace_as_suffix=True), "treat_whitespace_as_suffix"),
    "a space": (lambda train: train(user_defined_symbols=["a b"]), "piece 'a b' has a space"),
    "no escapes": (
        lambda train: normalizer(train(), escape_whitespaces=False),
        "does not escape spaces",
    ),
}


def assert_same_ids(encode, decode, processor, texts):
    """Checks the ids and the decoded texts; `encode` adds BOS, and `decode` drops it."""
    for text in texts:
        ids = [processor.bos_id(), *processor.encode(text)]
        assert encode(text) == ids, text[:99]
        assert same_text(text, decode(ids), processor.decode(ids)), text[:99]


def same_text(text, found, wanted):
    """Returns whether the texts agree, except for a leading U+2581 that SentencePiece drops."""
    return found == wanted or (text[:1] == "\u2581" and found.lstrip() == wanted)


@pytest.mark.parametrize("name", SAID)
def test_the_ids_of_sentencepiece(trained, sources, name):
    model = SAID[name](trained).SerializeToString()
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    files = fast_files(Tokenizer(model))
    library = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    texts = hard_strings([processor.id_to_piece(i) for i in range(3, processor.vocab_size())])
    names = [processor.id_to_piece(i) for i in range(len(processor)) if processor.is_control(i)]
    plain = [text for text in texts if not any(name in text for name in names)]
    assert len(plain) > 190
    plain += [text[:1500] for text in sources] + [text[-500:] for text in sources]
    assert_same_ids(lambda text: library.encode(text).ids, library.decode, processor, plain)
    library.encode_special_tokens = (
        True  # sentencepiece always reads the names of control tokens as text
    )
    texts += [
        f"{before}{name}{after}" for name in names for before in (" ", "") for after in (" b", "")
    ]
    assert_same_ids(lambda text: library.encode(text).ids, library.decode, processor, texts)
    config = json.loads(files["tokenizer_config.json"])
    assert config["bos_token"] == processor.id_to_piece(processor.bos_id())
    assert config["eos_token"] == processor.id_to_piece(processor.eos_id())


@pytest.mark.parametrize("name", NOT_SAID)
def test_where_no_file_says_it_one_line_does(trained, tmp_path, capsys, name):
    make, reason = NOT_SAID[name]
    model = make(trained).SerializeToString()
    config = replace(TINY, model__vocab_size=Tokenizer(model).vocab_size)
    exported(tmp_path / "hf", config, files={"tokenizer.model": model})
    out = capsys.readouterr().out
    assert out.startswith(
        f"note  {tmp_path}/hf: no tokenizer.json is written, only tokenizer.model: "
    )
    assert reason in out and out.count("\n") == 1
    assert not (tmp_path / "hf" / "tokenizer.json").exists()
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == model


def test_the_command_prints_the_line(trained, tmp_path):
    model = trained(model_type="unigram").SerializeToString()
    config = replace(TINY, model__vocab_size=500)
    source = Memory(config, random_params(config.model), files={"tokenizer.model": model})
    convert(source, "ckpt", tmp_path / "run")
    process = run_command("convert", f"--source=ckpt:{tmp_path}/run", f"--target=hf:{tmp_path}/hf")
    assert process.returncode == 0 and process.stderr == ""
    assert process.stdout.startswith(f"note  {tmp_path}/hf: no tokenizer.json is written")
    assert not (tmp_path / "hf" / "tokenizer.json").exists()


def test_without_the_library_nothing_unchecked_is_written(tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    exported(
        tmp_path / "hf",
        replace(TINY, model__vocab_size=300),
        files={"tokenizer.model": tokenizer.model_bytes},
    )
    assert "pip install 'llama_jax[hf]'" in capsys.readouterr().out
    assert not (tmp_path / "hf" / "tokenizer.json").exists()


def test_a_model_that_begins_no_text_with_bos(tokenizer, tmp_path):
    folder = tmp_path / "hf"
    config = json.dumps({"add_bos_token": False, "chat_template": "{{ messages }}"}).encode()
    files = {"tokenizer.model": tokenizer.model_bytes, "tokenizer_config.json": config}
    exported(folder, replace(TINY, model__vocab_size=tokenizer.vocab_size), files=files)
    written = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    for text in ("a  b", " def f():\n    pass", "日本"):
        assert written.encode(text).ids == raw.encode(text)
    assert HfSource(folder).description.files.keys() >= files.keys()


@pytest.mark.parametrize(
    "config",
    [
        {"add_bos_token": True},
        {"bos_token": "<s>", "eos_token": "</s>"},
        {"added_tokens_decoder": {"300": {"content": "<end>", "special": False}}},
    ],
)
def test_a_config_that_names_no_class(tokenizer, tmp_path, config):
    files = {"tokenizer.model": tokenizer.model_bytes}
    files["tokenizer_config.json"] = json.dumps(config).encode()
    folder = exported(tmp_path / "hf", replace(TINY, model__vocab_size=301), files=files)
    written = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("a  b", " self.x", "\tx<end>"):
        ids = written.encode(text).ids
        assert ids[0] == tokenizer.bos_id
        if "<end>" not in text:
            assert ids[1:] == tokenizer.encode(text)
    said = json.loads((folder / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "added_tokens_decoder" not in said


def test_a_config_that_names_a_class_is_kept_and_told(tokenizer, tmp_path, capsys):
    files = {"tokenizer.model": tokenizer.model_bytes}
    files["tokenizer_config.json"] = b'{"tokenizer_class": "LlamaTokenizer"}'
    folder = exported(
        tmp_path / "hf", replace(TINY, model__vocab_size=tokenizer.vocab_size), files=files
    )
    assert not (folder / "tokenizer.json").exists()
    assert "names LlamaTokenizer, and transformers reads the" in capsys.readouterr().out
    kept = {name: (folder / name).read_bytes() for name in files}
    assert kept == files


def test_tokens_that_another_file_adds_are_in_the_file(tokenizer, tmp_path):
    folder, size = tmp_path / "hf", tokenizer.vocab_size
    added = json.dumps({"<|im_start|>": size, "<|im_end|>": size + 1}).encode()
    config = json.dumps({"chat_template": "{{ messages }}"}).encode()
    files = {"tokenizer.model": tokenizer.model_bytes, "added_tokens.json": added}
    files["tokenizer_config.json"] = config
    exported(folder, replace(TINY, model__vocab_size=size + 2), files=files)
    written = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert written.encode("<|im_end|>").ids == [tokenizer.bos_id, size + 1]
    assert (folder / "tokenizer.model").read_bytes() == tokenizer.model_bytes


def test_the_check_finds_what_nobody_thought_of(trained, monkeypatch):
    model = Tokenizer(trained().SerializeToString())
    right = bpe_rules.rules
    wrong = {
        "order": lambda *args: right(*args)[::-1],
        "one left out": lambda *args: right(*args)[:-1],
    }
    for rules in wrong.values():
        monkeypatch.setattr(bpe_rules, "rules", rules)
        with pytest.raises(UserError, match="it would give other ids for '"):
            fast_files(model)


def by_hand(pieces):
    model = proto(b"")
    model.trainer_spec.model_type = 2
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    for piece, score, kind in (("<unk>", 0, 2), ("<s>", 0, CONTROL), ("</s>", 0, CONTROL)):
        model.pieces.add(piece=piece, score=score, type=kind)
    for piece, score in pieces.items():
        model.pieces.add(piece=piece, score=score, type=NORMAL)
    return model.SerializeToString()


def test_rules_of_any_scores_give_the_ids_or_are_refused():
    """All texts of up to 8 characters, with 150 vocabularies whose scores are often equal."""
    draw, refused = random.Random(4), 0
    texts = [
        "".join(letters) for size in range(1, 9) for letters in itertools.product("ab", repeat=size)
    ]
    for _ in range(150):
        pieces = dict.fromkeys("ab", 0.0)
        for _ in range(draw.randint(2, 9)):
            pieces["".join(draw.choices("ab", k=draw.randint(2, 5)))] = -draw.randint(0, 3)
        vocab = dict(zip(["<unk>", "<s>", "</s>", *pieces], range(99), strict=False))
        try:
            rules = bpe_rules.rules(pieces, pieces)
        except UserError:
            refused += 1
            continue
        library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, rules, unk_token="<unk>"))
        processor = sentencepiece.SentencePieceProcessor(model_proto=by_hand(pieces))
        assert [library.encode(text).ids for text in texts] == processor.encode(texts), pieces
    assert refused < 50


def test_equal_scores_that_no_order_of_rules_has():
    # "aba" is ab|a, and "bab" is ba|b: each of the two pieces must come before the other.
    pieces = {"a": 0.0, "b": 0.0, "ab": -1.0, "ba": -1.0}
    processor = sentencepiece.SentencePieceProcessor(model_proto=by_hand(pieces))
    assert processor.encode(["aba", "bab"], out_type=str) == [["ab", "a"], ["ba", "b"]]
    with pytest.raises(UserError, match="equal scores, such as 'ab' and 'ba'"):
        bpe_rules.rules(pieces, pieces)


def test_files_of_the_same_pieces_but_other_merges_are_not_the_same(trained):
    model = Tokenizer(scored(trained(), spaces_last).SerializeToString())
    described = json.loads(fast_files(model)["tokenizer.json"])
    assert model.same_ids(Tokenizer(json.dumps(described).encode()))
    ids = described["model"]["vocab"]
    described["model"]["merges"].sort(key=lambda rule: ids["".join(rule)])  # by id
    assert not model.same_ids(Tokenizer(json.dumps(described).encode()))


# Released models.

TALK = said(
    "  def f(x):\n    return x  # two  spaces", "Yes.\n\n\t42 🦙", "[/INST] </s> more ", " no\n"
)
CONTENTS = [turn["content"] for turn in TALK]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
RELEASED = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
FEW = ["v7", pytest.param("v1", marks=pytest.mark.slow)]  # v7 has the features of the others


def released(name):
    spec = importlib.util.find_spec("mistral_common")
    if spec is None:
        pytest.skip("mistral-common has no build for this Python")
    return (pathlib.Path(spec.origin).parent / "data" / RELEASED[name]).read_bytes()


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Returns a cached function: a released model as `hf`, imported as `run`, back as `again`."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = folder = tmp_path_factory.mktemp(name)
            model = released(name)
            config = replace(TINY, model__vocab_size=len(proto(model).pieces), train__seq_len=256)
            files = {"tokenizer.model": model, "chat_template.jinja": TEMPLATE.encode()}
            exported(folder / "hf", config, files=files)
            convert(open_source("hf", folder / "hf"), "ckpt", folder / "run")
            convert(open_source("ckpt", folder / "run"), "hf", folder / "again")
        return made[name]

    return make


@pytest.mark.parametrize("name", FEW)
def test_a_released_model_through_export_and_import(folder_of, sources, name):
    folder = folder_of(name)
    processor = sentencepiece.SentencePieceProcessor(model_proto=released(name))
    library = tokenizers.Tokenizer.from_file(str(folder / "hf" / "tokenizer.json"))
    library.encode_special_tokens = True
    texts = [*hard_strings(map(processor.id_to_piece, range(300, 30_000)))]
    texts += [text[:4000] for text in sources]
    assert_same_ids(lambda text: library.encode(text).ids, library.decode, processor, texts)
    for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        assert (folder / "again" / file).read_bytes() == (folder / "hf" / file).read_bytes()
    model = open_model(folder / "run", "fsdp=1")
    chat = open_template(model)
    assert chat.tokenizer.same_ids(model.tokenizer)  # --chat uses one, --prompt the other
    assert chat.tokenizer.model_bytes != model.tokenizer.model_bytes
    assert chat.encode(TALK) == talk_by_hand(name)


def talk_by_hand(name):
    """Encodes each part of `TALK` with sentencepiece, without adding a space before it."""
    model = normalizer(proto(released(name)), add_dummy_prefix=False).SerializeToString()
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = [processor.bos_id()]
    for user, assistant in zip(CONTENTS[::2], CONTENTS[1::2], strict=True):
        if name == "v1":  # [INST] is text there
            ids += processor.encode(f"[INST] {user}[/INST] {assistant}")
        else:
            begin, end = map(processor.piece_to_id, ("[INST]", "[/INST]"))
            ids += [begin, *processor.encode(f" {user}"), end, *processor.encode(f" {assistant}")]
        ids.append(processor.eos_id())
    return ids


def load(folder):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parity
@pytest.mark.parametrize("name", RELEASED)
def test_transformers_reads_a_released_model(folder_of, sources, name):
    folder = folder_of(name)
    processor = sentencepiece.SentencePieceProcessor(model_proto=released(name))
    theirs = load(folder / "hf")
    texts = [*hard_strings(map(processor.id_to_piece, range(800, 30_000)))]
    texts += sources if name == "v1" else [text[:2000] for text in sources]
    if name != "v1":  # control pieces there
        texts = [text for text in texts if "[INST]" not in text and "[/INST]" not in text]
    assert_same_ids(
        lambda text: theirs(text)["input_ids"],
        lambda ids: theirs.decode(ids, skip_special_tokens=True),
        processor,
        texts,
    )
    chat = open_template(open_model(folder / "run", "fsdp=1"))
    talk = [*TALK[:2], *said("more ", " no\n")]  # transformers parses names in messages
    assert theirs.apply_chat_template(talk, return_dict=False) == chat.encode(talk)


@pytest.mark.parity
@pytest.mark.parametrize("name", [*SAID, *NOT_SAID])
def test_transformers_gives_the_ids(trained, sources, tmp_path, name):
    """Without a tokenizer.json, the class that tokenizer_config.json names gives them."""
    make = SAID[name] if name in SAID else NOT_SAID[name][0]
    model = make(trained).SerializeToString()
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    config = replace(TINY, model__vocab_size=len(processor))
    exported(tmp_path / "hf", config, files={"tokenizer.model": model})
    theirs = load(tmp_path / "hf")
    names = [processor.id_to_piece(i) for i in range(len(processor)) if processor.is_control(i)]
    pieces = [processor.id_to_piece(i) for i in range(3, len(processor))]
    texts = [text for text in hard_strings(pieces) if not any(name in text for name in names)]
    texts += [text[:1000] for text in sources]
    for text in texts:
        ids = [processor.bos_id(), *processor.encode(text)]
        assert theirs(text)["input_ids"] == ids, text[:99]
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids[1:], text[:99]
        if name in SAID:
            decoded = theirs.decode(ids, skip_special_tokens=True)
            assert same_text(text, decoded, processor.decode(ids)), text[:99]
