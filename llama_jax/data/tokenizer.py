"""SentencePiece tokenizers: loading them, and training them by LLaMA's recipe."""

import codecs
import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece
from etils import epath

from llama_jax.errors import UserError

# SentencePiece skips longer "sentences" and reads its sample into memory; both limits are generous
# for a recipe that learns frequent pieces, and keep training on any corpus within minutes.
MAX_SENTENCE_BYTES = 16_384
SAMPLE_BYTES = 64_000_000


class Tokenizer:
    """Text to token ids and back: `decode(encode(text)) == text`, but for U+2581.

    That character is how SentencePiece itself writes a space, and comes back as one.
    """

    def __init__(self, model_bytes: bytes, name: str = "the tokenizer") -> None:
        """Wraps a serialized SentencePiece model.

        Args:
          model_bytes: contents of a `.model` file.
          name: what to call it in an error.

        Raises:
          UserError: the bytes are no SentencePiece model, or one without BOS and EOS.
        """
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"{name} is not a SentencePiece model") from error
        self.model_bytes = model_bytes
        self.fingerprint = hashlib.sha256(model_bytes).hexdigest()
        self.vocab_size = self._processor.vocab_size()
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(f"{name} has no BOS or no EOS token")

    @classmethod
    def load(cls, path: epath.PathLike) -> "Tokenizer":
        """Reads a `.model` file.

        Raises:
          UserError: it cannot be read, or is none.
        """
        try:
            return cls(epath.Path(path).read_bytes(), f"tokenizer {path}")
        except OSError as error:
            raise UserError(f"cannot read tokenizer {path}: {error.strerror or error}") from error

    def save(self, path: epath.PathLike) -> None:
        """Writes a `.model` file."""
        epath.Path(path).write_bytes(self.model_bytes)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS and EOS."""
        return self._processor.encode(text)

    def encode_documents(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Token ids of several documents, int32, each from BOS to EOS, in so many threads."""
        return self._processor.encode_as_numpy(
            list(texts), add_bos=True, add_eos=True, num_threads=threads
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; BOS and EOS add nothing."""
        return self._processor.decode(list(ids))

    def piece(self, token: int) -> str:
        """How SentencePiece writes one token."""
        return self._processor.id_to_piece(int(token))

    def texts(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text; of a character made of several tokens, the last has it.

        BOS and EOS add nothing, bytes that are no UTF-8 a U+FFFD.
        """
        found: list[str] = []
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        begins = False
        for token in map(int, ids):
            piece = self._processor.id_to_piece(token)
            if self._processor.is_byte(token):  # written <0x0A>
                found.append(decoder.decode(bytes([int(piece[3:5], 16)])))
            else:
                cut_off = decoder.decode(b"", final=True)
                decoder.reset()
                if self._processor.is_control(token):
                    piece = ""
                elif self._processor.is_unknown(token):
                    piece = " ⁇ "  # as SentencePiece decodes it
                elif begins:  # SentencePiece puts a space before every text
                    piece = piece.removeprefix("\u2581")
                found.append(cut_off + piece.replace("\u2581", " "))
            begins = token == self.bos_id
        if found:
            found[-1] += decoder.decode(b"", final=True)
        return found


def _pieces_of(documents: Iterable[str], limit: int) -> Iterator[str]:
    """Cuts documents into lines that SentencePiece takes, up to `limit` bytes in all."""
    taken = 0
    for document in documents:
        for line in document.splitlines(keepends=True):
            # A line is at most 4 bytes a character, so this never exceeds the limit.
            for start in range(0, len(line), MAX_SENTENCE_BYTES // 4):
                piece = line[start : start + MAX_SENTENCE_BYTES // 4].rstrip("\n")
                if piece:
                    yield piece
                    taken += len(piece.encode())
        if taken >= limit:
            return


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, *, sample_bytes: int = SAMPLE_BYTES
) -> Tokenizer:
    """Trains BPE as LLaMA did: digits one by one, bytes for the unknown, whitespace kept.

    Nothing is normalised away, so decoding gives back the very text. Ids: 0 unknown, 1 BOS, 2 EOS,
    then 256 bytes, then pieces. The result depends on the documents alone.

    Args:
      documents: texts; the first `sample_bytes` are used.
      vocab_size: number of ids.
      sample_bytes: UTF-8 bytes of text to learn from.

    Raises:
      UserError: there is no text, or too little for so large a vocabulary.
    """
    pieces = list(_pieces_of(documents, sample_bytes))
    if not pieces:
        raise UserError("there is no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(pieces),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            split_digits=True,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=MAX_SENTENCE_BYTES,
            character_coverage=0.99995,
            num_threads=16,  # LLaMA's; BPE training gives the same result for any number
            minloglevel=2,
        )
    except RuntimeError as error:
        # "INTERNAL: file(line) [condition] what is wrong"
        reason = str(error).strip().splitlines()[-1].rsplit("] ", 1)[-1]
        raise UserError(
            f"cannot train a tokenizer of {vocab_size} ids on {len(pieces):,} lines: {reason}"
        ) from error
    return Tokenizer(model.getvalue())
