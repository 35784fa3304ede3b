"""The process that trains a SentencePiece model; `tokenizer` starts it and uses its pipes.

The library trains for minutes in one call, during which Python handles no signal; a separate
process can be killed. The request is {"lines": [text, ..], options of the trainer}; the answer is
["model", the bytes of the model in base64] or ["error", message].
"""

import base64
import io
import sys
from typing import Any

import sentencepiece

from llama_jax.text import child_process


def train(lines: list[str], **options: Any) -> bytes:
    """Trains a model in a separate process, which ends with this call.

    Args:
      lines: lines of text to learn from.
      **options: options of SentencePiece's trainer.

    Returns:
      The serialized model.

    Raises:
      RuntimeError: the trainer fails, or the process was killed.
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
    """Answers one request on standard input."""
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
