import io

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.errors import UserError
from llama_jax.text.tokenizer import Tokenizer, train_tokenizer

# Any text without surrogates, which are no characters, and without U+2581, SentencePiece's
# symbol for a space (see `Tokenizer`).
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_decoding_gives_the_text_back(tokenizer, text):
    # NUL is a character like any other: SentencePiece does not end a text there.
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_the_texts_of_tokens_make_the_text(tokenizer, text):
    ids = [1, *tokenizer.encode(text), 2]
    texts = tokenizer.texts(ids)
    assert len(texts) == len(ids) and texts[0] == texts[-1] == ""
    assert "".join(texts) == text


def test_half_a_character_is_marked(tokenizer):
    ids = tokenizer.encode("🦙a")
    assert tokenizer.texts(ids[-5:]) == ["", "", "", "🦙", "a"]
    assert tokenizer.texts(ids[-3:]) == ["\ufffd", "\ufffd", "a"]  # begins inside the character
    assert tokenizer.texts(ids[-5:-2]) == ["", "", "\ufffd"]  # ends inside it
    assert tokenizer.texts([*ids[-5:-3], ids[-1]]) == ["", "", "\ufffda"]
    assert tokenizer.texts([]) == []


@pytest.mark.parametrize(
    "text",
    ["  two  spaces  ", "\ttab\n\n\nlines\r\n", "ﬁ ½ é é 日本語 🦙", "a" * 5000, " ", "\x00\x01"],
)
def test_nothing_is_normalised_away(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_single_tokens():
    tokenizer = train_tokenizer(["on 20231115 we met in 2023 " * 50], 285)
    pieces = [tokenizer.piece(token).strip("\u2581") for token in tokenizer.encode("20231115")]
    assert [piece for piece in pieces if piece] == list("20231115")


def test_unknown_characters_become_bytes(tokenizer):
    pieces = [tokenizer.piece(token) for token in tokenizer.encode("🦙")]
    assert pieces[-4:] == ["<0xF0>", "<0x9F>", "<0xA6>", "<0x99>"]


def test_ids_of_llama(tokenizer):
    assert tokenizer.vocab_size == 300
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.piece(0) == "<unk>"
    assert tokenizer.piece(3) == "<0x00>" and tokenizer.piece(258) == "<0xFF>"
    assert tokenizer.bos_id not in tokenizer.encode("a b c")


def test_batches_equal_single_texts(tokenizer):
    texts = ["abc def", "", "  x"]
    for threads in (1, 3):
        found = [ids.tolist() for ids in tokenizer.encode_documents(texts, threads)]
        assert found == [[1, *tokenizer.encode(text), 2] for text in texts]


def test_the_result_depends_on_the_documents_alone(corpus, tokenizer):
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    assert train_tokenizer(iter(texts), 300).fingerprint == tokenizer.fingerprint
    assert train_tokenizer(texts[:20], 300).fingerprint != tokenizer.fingerprint


def test_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.model")
    loaded = Tokenizer.load(tmp_path / "tokenizer.model")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode("abc") == tokenizer.encode("abc")


def test_long_lines_are_learnt_from(tokenizer):
    # SentencePiece silently drops lines that are longer than its limit.
    trained = train_tokenizer(["xyzzy " * 20_000], 270)
    assert any("xyzzy" in trained.piece(token) for token in range(259, 270))


def test_the_sample_is_limited():
    texts = ["abab " * 100, "cdcd " * 100]
    trained = train_tokenizer(texts, 264, sample_bytes=400)
    pieces = [trained.piece(token) for token in range(264)]
    assert "c" not in pieces and "a" in pieces


def test_no_text_is_an_error():
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        train_tokenizer(["", "\n"], 300)


def test_too_large_a_vocabulary_is_an_error():
    with pytest.raises(UserError, match=r"5000 ids on 1 lines: Vocabulary size too high"):
        train_tokenizer(["abc abd"], 5000)


def test_what_to_do_where_the_text_has_more_letters_than_ids():
    letters = "".join(map(chr, range(0x4E00, 0x4E40)))
    with pytest.raises(UserError) as caught:
        train_tokenizer([letters] * 9, 300)
    message = str(caught.value)
    assert "smaller than required_chars" in message and "--character" not in message
    assert message.endswith("; raise model.vocab_size, or set data.tokenizer")


def test_a_file_that_is_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"cannot read tokenizer .*missing.model"):
        Tokenizer.load(tmp_path / "missing.model")
    (tmp_path / "bad.model").write_text("not a model")
    with pytest.raises(UserError, match="bad.model is not a SentencePiece model"):
        Tokenizer.load(tmp_path / "bad.model")


def test_a_tokenizer_without_bos_is_refused():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abc abd abe"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=12,
        bos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="no BOS or no EOS"):
        Tokenizer(model.getvalue())
