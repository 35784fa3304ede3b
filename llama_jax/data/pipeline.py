"""From a config to batches: prepares the shards where there are none, opens them, splits them."""

import dataclasses

from etils import epath

from llama_jax.config import Config
from llama_jax.data import loader
from llama_jax.data.prepare import prepare
from llama_jax.data.shards import TokenDataset
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Batches to train and to validate on, and who they are.

    Attributes:
      train: batches by step.
      validation: None without held-out documents.
      tokenizer: None for synthetic data.
      fingerprint: changes whenever the tokens do.
    """

    train: loader.BatchSource
    validation: loader.Batches | None
    tokenizer: Tokenizer | None
    fingerprint: str


def open_data(config: Config, default_folder: epath.Path) -> TrainingData:
    """Opens the token shards, preparing them first where there are none.

    Raises:
      UserError: source, shards or tokenizer are missing, damaged or of another vocabulary.
    """
    train = config.train
    shape = (train.seq_len, train.global_batch, train.seed)
    if config.data.source == "synthetic":
        batches = loader.SyntheticBatches(config.model.vocab_size, *shape)
        return TrainingData(batches, None, None, f"synthetic-{config.model.vocab_size}")
    folder = epath.Path(config.data.path or default_folder)
    if not (folder / "manifest.json").exists():
        if config.data.path:
            raise UserError(f"no token shards in {folder}; make them with llama_jax.prepare")
        prepare(config, folder)
    dataset = TokenDataset.open(folder, "train")
    if dataset.vocab_size != config.model.vocab_size:
        raise UserError(
            f"the shards in {folder} have a vocabulary of {dataset.vocab_size}, "
            f"but model.vocab_size is {config.model.vocab_size}"
        )
    held_out = TokenDataset.open(folder, "validation")
    validation = loader.Batches(held_out, *shape, shuffle=False) if held_out.n_tokens > 1 else None
    return TrainingData(
        loader.Batches(dataset, *shape), validation, dataset.tokenizer(), dataset.fingerprint
    )
