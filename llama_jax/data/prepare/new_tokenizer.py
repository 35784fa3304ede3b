"""The tokenizer of new shards: a given one, one that exists already, or one trained here."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

from etils import epath

from llama_jax.config import Config
from llama_jax.data.mixture import parse_shares
from llama_jax.data.shards import layout
from llama_jax.data.sources.documents import read_source
from llama_jax.data.sources.part import Tally
from llama_jax.data.vocabulary_size import check_ids, trained_size
from llama_jax.errors import UserError
from llama_jax.text.tokenizer import SAMPLE_BYTES, Tokenizer, train_tokenizer
from llama_jax.text.tokenizer_files import open_tokenizer


def find_or_train(
    config: Config,
    sources: dict[str, str],
    output: epath.Path,
    log: Callable[[str], None],
    own: Sequence[epath.PathLike] = (),
) -> Tokenizer:
    """Returns the given tokenizer, that of a source prepared before, or a new one.

    Args:
      config: `data.tokenizer` names the given tokenizer; without it, `data.mixture` sets the share
        of each source in the text that a new tokenizer learns from.
      sources: what to read, by name.
      output: folder of the shards.
      log: receives a line for the user.
      own: folders that this run writes; they are left out of the sources that contain them.

    Raises:
      UserError: the given tokenizer cannot be read or does not fit the model, or the sources hold
        no text.
    """
    size = trained_size(config)
    if config.data.tokenizer:
        tokenizer = open_tokenizer(config.data.tokenizer)
        ids = tokenizer.vocab_size
        check_ids(ids, config, f"tokenizer {config.data.tokenizer} has {ids} ids")
        return tokenizer
    for name in filter(None, sources):
        if (output / name / layout.TOKENIZER).exists():
            return Tokenizer.load(output / name / layout.TOKENIZER)
    log(f"training a tokenizer of {size:,} ids on {config.data.source}")
    shares = dict.fromkeys(sources, 1 / len(sources))
    if config.data.mixture:
        given = parse_shares(config.data.mixture)
        shares = {name: float(given.get(name, 0)) for name in sources}

    tally = Tally()

    def sample() -> Iterator[str]:
        for name, source in sources.items():
            taken = 0
            for text in read_source(source, config.data, tally, own, name):
                if taken >= shares[name] * SAMPLE_BYTES:
                    break
                taken += len(text.encode())
                yield text

    return train(sample(), size, tally)


def train(texts: Iterable[str], size: int, tally: Tally) -> Tokenizer:
    """Trains a new tokenizer.

    Args:
      texts: the texts to learn from.
      size: number of ids.
      tally: the counts of what was skipped and left out, for the error message.

    Raises:
      UserError: there is no text, or too little text for this number of ids.
    """
    rest = iter(texts)
    first = list(itertools.islice(rest, 1))
    if not first:
        raise UserError(f"there is no text to train a tokenizer on: {tally.why_nothing()}")
    return train_tokenizer(itertools.chain(first, rest), size)
