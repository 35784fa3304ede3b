"""Which text is in a batch, in words that lead back to it."""

from llama_jax.config import Config
from llama_jax.data.loader import Batches, BatchSource
from llama_jax.data.streaming import StreamingBatches

NAMED = 6  # sequences of a source that are named


def identify(source: BatchSource | StreamingBatches, config: Config, step: int) -> str:
    """The sequences of the batch that `step` (from 1, as in the log) took.

    The order is a function of the seed and the step, so the step alone names all of them; of a
    large batch only the first few are written out.
    """
    number = step - 1
    if isinstance(source, StreamingBatches):
        try:
            at = source.position(number)
        except KeyError:  # long ago
            return f"the streamed batch of step {step}"
        return f"epoch {at.epoch}, from document {at.document}, token {at.token} on"
    if not isinstance(source, Batches):
        return f"random tokens of train.seed={config.train.seed}, step {number}"
    found: dict[str, list[int]] = {}
    for index, sequence in source.draws(number, range(config.train.global_batch)):
        found.setdefault(source.schedule.names[index], []).append(sequence)
    texts = []
    for name, sequences in found.items():
        some = ", ".join(map(str, sequences[:NAMED]))
        more = f" and {len(sequences) - NAMED} more" if len(sequences) > NAMED else ""
        texts.append(f"{name + ': ' if name else ''}sequences {some}{more}")
    return f"{'; '.join(texts)}; see llama_jax.data --show=WORKDIR --step={number}"
