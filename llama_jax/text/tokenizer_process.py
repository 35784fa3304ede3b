"""The process that trains a SentencePiece model: `tokenizer` starts it, and talks to its pipes.

The library trains for minutes in one call, in which Python sees no signal; a process of its own can
be ended. The request is {"lines": [text, ..], options of the trainer}; the answer is ["model", the
model's bytes in base64] or ["error", what is wrong].
"""

import base64
import io
import sys
from typing import Any

import sentencepiece

from llama_jax.text import child_process


def train(lines: list[str], **options: Any) -> bytes:
    """Trains a model in a process of its own, which ends when this call does.

    Args:
      lines: of text to learn from.
      **options: of SentencePiece's trainer.

    Returns:
      The model.

    Raises:
      RuntimeError: as the trainer; or the process has been killed.
    """
    process = child_process.start(__name__)
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(child_process.encode_message({"lines": lines, **options}))
        process.stdin.flush()
        kind, answer = child_process.read_message(process.stdout)
    except (EOFError, OSError) as error:
        raise RuntimeError("its process was killed (out of memory?)") from error
    finally:
        process.kill()
        child_process.close(process)
    if kind == "error":
        raise RuntimeError(answer)
    return base64.b64decode(answer)


def serve() -> None:
    """Answers the one request on standard input."""
    child_process.exit_with_parent()
    options = child_process.read_message(sys.stdin.buffer)
    model = io.BytesIO()
    try:
        lines = iter(options.pop("lines"))
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, **options
        )
        answer = ["model", base64.b64encode(model.getvalue()).decode()]
    except (RuntimeError, MemoryError) as error:
        answer = ["error", str(error) or "out of memory"]
    sys.stdout.buffer.write(child_process.encode_message(answer))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
