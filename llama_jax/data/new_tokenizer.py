"""The tokenizer of shards that are prepared: a given one, one made before, or one trained here."""

from collections.abc import Callable, Iterator

from etils import epath

from llama_jax.config import Config
from llama_jax.data import shard_folder
from llama_jax.data.mixture import parse_shares
from llama_jax.data.reading import Reading
from llama_jax.data.rows import check_ids, trained_size
from llama_jax.data.sources import documents
from llama_jax.data.tokenizer import SAMPLE_BYTES, Tokenizer, train_tokenizer


def find_or_train(
    config: Config, sources: dict[str, str], output: epath.Path, log: Callable[[str], None]
) -> Tokenizer:
    """The given tokenizer, that of a source prepared before, or a new one from all sources.

    Args:
      config: of the run.
      sources: what to read, by name.
      output: folder of the shards.
      log: takes a line for the user.

    Raises:
      UserError: the given one cannot be read or does not fit the model, or there is no text.
    """
    size = trained_size(config)
    if config.data.tokenizer:
        tokenizer = Tokenizer.load(config.data.tokenizer)
        ids = tokenizer.vocab_size
        check_ids(ids, config, f"tokenizer {config.data.tokenizer} has {ids} ids")
        return tokenizer
    for name in filter(None, sources):
        if (output / name / shard_folder.TOKENIZER).exists():
            return Tokenizer.load(output / name / shard_folder.TOKENIZER)
    log(f"training a tokenizer of {size:,} ids on {config.data.source}")
    shares = dict.fromkeys(sources, 1 / len(sources))
    if config.data.mixture:
        given = parse_shares(config.data.mixture)
        shares = {name: float(given.get(name, 0)) for name in sources}

    def sample() -> Iterator[str]:
        for name, source in sources.items():
            taken = 0
            for text in documents(source, config.data, Reading()):
                if taken >= shares[name] * SAMPLE_BYTES:
                    break
                taken += len(text.encode())
                yield text

    return train_tokenizer(sample(), size)
