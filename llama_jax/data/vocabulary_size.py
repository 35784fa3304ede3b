"""The ids of a tokenizer and the rows of its model.

A model may have more rows than its tokenizer has ids: padding, so that the vocabulary divides over
a mesh or into blocks of 64 or 128, or a PAD row that no tokenizer writes. The rows beyond the ids
are never targets, and sampling never draws them (`decode.stream_tokens`). The loss and every score
use a softmax over all rows, as in transformers. Weights with fewer rows than `model.vocab_size` are
padded when a run begins (`interchange.padded_vocabulary`).
"""

from llama_jax.config import Config
from llama_jax.errors import UserError


def trained_size(config: Config) -> int:
    """Returns the number of ids of a tokenizer that is trained for this config."""
    return config.data.tokenizer_size or config.model.vocab_size


def check_ids(ids: int, config: Config, what: str) -> None:
    """Checks that the model has a row for each id.

    Args:
      ids: number of ids of the tokenizer.
      config: the config of the model, with `model.vocab_size` rows.
      what: beginning of the error, such as "tokenizer PATH has 500 ids".

    Raises:
      UserError: there are more ids than rows; the message says what to do.
    """
    rows = config.model.vocab_size
    if ids <= rows:
        return
    mend = f"raise model.vocab_size to {ids} or more, or set data.tokenizer to another tokenizer"
    if config.init_from:
        mend += f"; init_from={config.init_from} has no trained rows for the last {ids - rows} ids"
    raise UserError(f"{what}, but model.vocab_size is {rows}; {mend}")
