"""Opens the batches that a config describes, and prepares the token shards if there are none."""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping

from etils import epath

from llama_jax.config import Config
from llama_jax.data.batches import Batches, SyntheticBatches, ValidationBatches, recipes
from llama_jax.data.mixture import parse_shares
from llama_jax.data.prepare import new_tokenizer
from llama_jax.data.prepare.hold_out import why_no_validation
from llama_jax.data.prepare.job import prepare
from llama_jax.data.shards.layout import (
    MANIFEST,
    TOKENIZER,
    no_shards,
    read_manifest,
    source_folders,
)
from llama_jax.data.shards.reader import TokenDataset
from llama_jax.data.source import BatchSource
from llama_jax.data.sources.documents import read_source
from llama_jax.data.sources.listing import named_sources
from llama_jax.data.sources.part import Tally
from llama_jax.data.streaming import StreamingBatches
from llama_jax.data.vocabulary_size import check_ids, trained_size
from llama_jax.errors import UserError
from llama_jax.text.templates import BUILT_IN, end_ids, from_json, open_choice
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.text.tokenizer_files import open_tokenizer


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The batches to train and to validate on, and the identity of their data.

    `TrainingData(MySource())` is enough to train on your own batches.

    Attributes:
      train: the batches to train on.
      validation: the batches to validate on; None: no documents are held out.
      tokenizer: the tokenizer of the data; None for synthetic data, and for data that are not text.
      fingerprint: changes whenever the tokens do; by default the fingerprint of `train`.
      template: the chat template of instruction data, in the form of a tokenizer_config.json; empty
        for plain text.
      answers: number of answers in instruction data, and of those without an end token.
      former_fingerprint: the fingerprint of the same tokens in earlier versions, whose mixtures had
        shares of sequences; empty: it is the same.
      unchecked: folders of shards that an earlier version wrote without checksums of blocks.
      unvalidated: the reason for each source without held-out documents, by name of the source.
      sources: fingerprint of each source of shards, by name.
      start: where each source begins, in epochs, as the text of `data.start`.
    """

    train: BatchSource
    validation: BatchSource | None = None
    tokenizer: Tokenizer | None = None
    fingerprint: str = ""
    template: bytes = b""
    answers: tuple[int, int] = (0, 0)
    former_fingerprint: str = ""
    unchecked: tuple[str, ...] = ()
    unvalidated: dict[str, str] = dataclasses.field(default_factory=dict)
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    start: str = "0"

    def __post_init__(self) -> None:
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", self.train.fingerprint())

    @functools.cached_property
    def files(self) -> dict[str, bytes]:
        """Files to save with the tokenizer, by name: the chat template, and its end tokens."""
        if not self.template or self.tokenizer is None:
            return {}
        ends = end_ids(from_json(self.template, self.tokenizer))
        ids = {"bos_token_id": self.tokenizer.bos_id, "eos_token_id": ends}
        return {
            "tokenizer_config.json": self.template,
            "generation_config.json": json.dumps(ids).encode() + b"\n",
        }


def open_data(
    config: Config, default_folder: epath.Path, seen: Mapping[str, float] | None = None
) -> TrainingData:
    """Opens the batches of a run; prepares the token shards first if there are none.

    Args:
      config: the config of the run.
      default_folder: `data` in the work directory. The work directory is not part of a source, even
        if a source contains it.
      seen: how often the initial weights have seen each source, in epochs, by its fingerprint; with
        `data.start` = auto, each source begins after that.

    Raises:
      UserError: the source, the shards or the tokenizer are missing, are damaged or have another
        vocabulary.
    """
    train, data = config.train, config.data
    vocab_size = config.model.vocab_size
    first_recipe, *later = recipes(config)
    shape = (first_recipe.seq_len, first_recipe.global_batch, first_recipe.seed)
    if data.source == "synthetic":
        named = {"": SyntheticBatches(vocab_size, *shape).fingerprint()}
        begin = _begin(config, named, seen or {})
        batches = SyntheticBatches(vocab_size, *shape, later=later, begin=begin[""])
        why = {"": "random tokens have no held-out part"}
        return TrainingData(batches, unvalidated=why, start=_start_text(begin))
    if data.streaming:
        return _open_stream(config, default_folder)
    shares = parse_shares(data.mixture) if data.mixture else None
    mixtures = [recipe.shares for recipe in (first_recipe, *later)]
    mixed = list(shares or ()) if all(mixtures) else []
    if all(mixtures):  # the sources of the other stages, too
        mixed = list(dict.fromkeys([*mixed, *(name for one in mixtures for name in one or ())]))
    folder = epath.Path(data.path or default_folder)
    names = _source_names(config, mixed, folder)
    missing = [name for name in names if not (folder / name / MANIFEST).exists()]
    if missing and data.path:
        raise no_shards(folder / missing[0])
    if missing:
        prepare(config, folder, own=(default_folder.parent,))
    datasets = {name: TokenDataset.open(folder / name, "train") for name in names}
    first = datasets[names[0]]
    packed = data.packing == "best_fit"
    for dataset in datasets.values():
        if bool(dataset.pack_len) != packed:
            how = "best_fit" if dataset.pack_len else "concat"
            raise UserError(
                f"the shards in {dataset.folder} were made with data.packing={how}, but now it is "
                f"{data.packing}; use --config.data.packing={how}, or prepare other shards"
            )
        ids = dataset.vocab_size
        check_ids(ids, config, f"the shards in {dataset.folder} have a vocabulary of {ids}")
        if dataset.tokenizer_sha256 != first.tokenizer_sha256:
            raise UserError(
                f"{first.folder} and {dataset.folder} were made with different tokenizers; "
                "prepare them together, or with the same data.tokenizer"
            )
        if dataset.template_sha256 != first.template_sha256:
            raise UserError(
                f"{first.folder} and {dataset.folder} were made with different chat templates; "
                "prepare them together"
            )
        _check_template(data.template, dataset)
    _check_tokenizer(data.tokenizer, first)
    held_out = {name: TokenDataset.open(folder / name, "validation") for name in names}
    validation = ValidationBatches(held_out, train.seq_len, train.global_batch)
    former = _fingerprint(datasets)
    of_tokens = shares is not None and len(datasets) > 1
    fingerprints = {name: dataset.fingerprint for name, dataset in datasets.items()}
    begin = _begin(config, fingerprints, seen or {})
    return TrainingData(
        Batches(datasets, *shape, first_recipe.shares, later=later, begin=begin),
        validation if validation.n_sequences else None,
        first.tokenizer(),
        hashlib.sha256(f"shares of tokens {former}".encode()).hexdigest() if of_tokens else former,
        first.template(),
        (
            sum(dataset.answers for dataset in datasets.values()),
            sum(dataset.unended for dataset in datasets.values()),
        ),
        former_fingerprint=former if of_tokens else "",
        unchecked=tuple(str(dataset.folder) for dataset in datasets.values() if dataset.unchecked),
        unvalidated={
            name: why_no_validation(read_manifest(folder / name))
            for name in names
            if not held_out[name].n_tokens
        },
        sources=fingerprints,
        start=_start_text(begin),
    )


def _begin(
    config: Config, fingerprints: Mapping[str, str], seen: Mapping[str, float]
) -> dict[str, float]:
    """Returns where each source begins, in epochs, by its name.

    Args:
      config: the config of the run.
      fingerprints: fingerprint of each source, by name.
      seen: see `open_data`.

    Raises:
      UserError: `data.start` is malformed, or names a source that does not exist.
    """
    text = config.data.start
    if text == "auto":
        return {name: seen.get(found, 0.0) for name, found in fingerprints.items()}
    begin = dict.fromkeys(fingerprints, 0.0)
    for item in text.split(","):
        name, _, number = item.strip().rpartition("=")
        try:
            epochs = float(number)
        except ValueError:
            epochs = math.nan
        if (name and name not in begin) or not 0 <= epochs < 1e9:
            raise UserError(
                f"data.start={text}: {item.strip()!r} is not a number of epochs such as 0.5, or "
                f"NAME=EPOCHS with NAME one of {', '.join(filter(None, begin)) or '(no names)'}"
            )
        begin |= {name: epochs} if name else dict.fromkeys(begin, epochs)
    return begin


def _start_text(begin: Mapping[str, float]) -> str:
    """Returns the text of `data.start`; `_begin` is the inverse."""
    if not any(begin.values()):
        return "0"
    return ",".join(
        f"{name}={epochs!r}" if name else repr(epochs) for name, epochs in begin.items()
    )


def _check_tokenizer(choice: str, dataset: TokenDataset) -> None:
    """Checks that shards were made with the tokenizer that the config names, if it still exists.

    Raises:
      UserError: the same ids stand for other pieces of text.
    """
    if not choice or not epath.Path(choice).exists():
        return
    if not open_tokenizer(choice).same_ids(dataset.tokenizer()):
        raise UserError(
            f"the shards in {dataset.folder} were made with another tokenizer than {choice} "
            "(data.tokenizer, or the tokenizer of init_from); prepare them again with this one, or "
            f"use theirs: --config.data.tokenizer={dataset.folder / TOKENIZER}"
        )


def _check_template(choice: str, dataset: TokenDataset) -> None:
    """Checks that shards were made with the template that the config names, if it still exists.

    Raises:
      UserError: they were made with another template.
    """
    made = dataset.template()
    if not choice or not made:
        same = not choice and not made
    elif choice in BUILT_IN or epath.Path(choice).exists():
        given = open_choice(choice, dataset.tokenizer(), {})
        same = given.source == json.loads(made)["chat_template"]
    else:
        same = True
    if not same:
        was = "another" if choice and made else "a" if made else "no"
        raise UserError(
            f"the shards in {dataset.folder} were made with {was} chat template, but data.template "
            f"is {choice or 'empty'} now; restore the former value, or prepare other shards"
        )


def _source_names(config: Config, mixed: list[str], folder: epath.Path) -> list[str]:
    """Returns the names of the sources to open; data.mixture and data.source must name the same."""
    named = list(named_sources(config.data.source))
    there = [name for name in named if (folder / name / MANIFEST).exists()]
    if not there and (folder / MANIFEST).exists():
        named = [""]  # the source was one path that contains '=', and it no longer exists
    if named == [""] and mixed and config.data.path:  # shards that another config has prepared
        there = list(source_folders(folder))
        named = mixed if set(mixed) <= set(there) else there
    if mixed and set(mixed) != set(named):
        unknown = sorted(set(mixed) - set(named)) or sorted(set(named) - set(mixed))
        raise UserError(
            f"data.mixture has shares for {', '.join(mixed)}, but the sources are "
            f"{', '.join(name or 'one without a name' for name in named)}: see {unknown[0]!r}"
        )
    return mixed or named


def _fingerprint(datasets: dict[str, TokenDataset]) -> str:
    if len(datasets) == 1:
        return next(iter(datasets.values())).fingerprint
    parts = [f"{name} {dataset.fingerprint}" for name, dataset in datasets.items()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _open_stream(config: Config, folder: epath.Path) -> TrainingData:
    """Opens a stream of the source; its tokenizer is trained once and saved in `folder`."""
    data, size = config.data, trained_size(config)
    path = epath.Path(data.tokenizer or folder / "tokenizer.model")
    if not path.exists() and not data.tokenizer:
        print(f"training a tokenizer of {size:,} ids on {data.source}", flush=True)
        tally = Tally()
        texts = (
            text
            for name, source in named_sources(data.source).items()
            for text in read_source(source, data, tally, (folder.parent,), name)
        )
        tokenizer = new_tokenizer.train(texts, size, tally)
        if tally.skipped or tally.changed:
            print("\n".join(tally.lines("skipped", "changed")), flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(path)
    tokenizer = open_tokenizer(path)
    ids = tokenizer.vocab_size
    check_ids(ids, config, f"tokenizer {path} has {ids} ids")
    lengths = [(stage.start, stage.config.train.seq_len) for stage in config.stages]
    stream = StreamingBatches(data, tokenizer, lengths, (folder.parent,))
    why = {"": "data.streaming holds out no documents; prepare shards to validate"}
    return TrainingData(stream, tokenizer=tokenizer, unvalidated=why)
