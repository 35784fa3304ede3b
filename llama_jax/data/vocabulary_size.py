"""Ids of a tokenizer, and rows of the model that has it.

A model may have more rows than ids: padding, so that the vocabulary divides over a mesh or into
blocks of 64 or 128, or a PAD row that no tokenizer writes. The rows beyond the ids are never
targets, and sampling never draws them (`decode.stream_tokens`); the loss and every score are those
of a softmax over all rows, as in transformers. Weights of fewer rows than `model.vocab_size` get
them when a run begins (`interchange.padded_vocabulary`).
"""

from llama_jax.config import Config
from llama_jax.errors import UserError


def trained_size(config: Config) -> int:
    """Ids of a tokenizer that is trained for this config."""
    return config.data.tokenizer_size or config.model.vocab_size


def check_ids(ids: int, config: Config, what: str) -> None:
    """Checks that the model has a row for each id.

    Args:
      ids: of the tokenizer.
      config: whose `model.vocab_size` is the number of rows.
      what: says how many ids what has, for the error.

    Raises:
      UserError: there are more ids than rows, with what to do.
    """
    rows = config.model.vocab_size
    if ids <= rows:
        return
    mend = f"raise model.vocab_size to {ids} or more, or name another tokenizer by data.tokenizer"
    if config.init_from:
        mend += f"; init_from={config.init_from} has no rows of its own for the last {ids - rows}"
    raise UserError(f"{what}, but model.vocab_size is {rows}; {mend}")
