"""Measures time and memory of the data path, from tokenising to loading; prints lines of JSON.

Rates are per CPU second of this process, which other jobs on the machine affect little.

Example:
  python benchmarks/data.py
  python benchmarks/data.py --only=loader,checksums,startup,verify
  python benchmarks/data.py --only=memory --megabytes=250
"""

import hashlib
import json
import multiprocessing
import pathlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import sentencepiece
from absl import flags
from etils import epath

from llama_jax.cli import command
from llama_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from llama_jax.data.batches import Batches
from llama_jax.data.mixture import parse_shares
from llama_jax.data.prepare import job
from llama_jax.data.shards import layout
from llama_jax.data.shards.block_checksums import BLOCK_BYTES, BlockSums, encode_sums
from llama_jax.data.shards.packing import pack_documents
from llama_jax.data.shards.reader import TokenDataset
from llama_jax.data.show import plot, summary
from llama_jax.data.show.rows import Screen
from llama_jax.data.sources.documents import read_source
from llama_jax.data.sources.part import Tally
from llama_jax.errors import UserError
from llama_jax.text.tokenizer import Tokenizer, train_tokenizer

SEQ_LEN, BATCH, VOCAB = 2048, 64, 8192
TRAIN = TrainConfig(seq_len=SEQ_LEN, global_batch=BATCH)


def config_for(source: str, tokenizer: str, **data: object) -> Config:
    """Makes a config that tokenises `source` in one process."""
    fields = {"source": source, "tokenizer": tokenizer, "workers": 1, **data}
    return Config(
        model=ModelConfig(vocab_size=VOCAB),
        data=DataConfig(**fields),  # type: ignore[arg-type]
        optim=OptimConfig(),
        train=TRAIN,
    )


def write_fake_shards(
    folder: pathlib.Path,
    tokenizer: Tokenizer,
    count: int,
    tokens: int,
    *,
    pack_len: int = 0,
    checksums: bool = True,
) -> None:
    """Writes shards of random tokens, one document per shard, and their manifest.

    Args:
      folder: the folder to make.
      tokenizer: tokenizer to save with the shards.
      count: number of shards.
      tokens: tokens per shard.
      pack_len: sequence length to pack for, in tokens; 0: do not pack.
      checksums: whether to write checksums of blocks; earlier versions wrote none.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    listed = []
    for number in range(count):
        name = f"train-{number:05d}-000"
        arrays = {
            "bin": rng.integers(3, VOCAB, tokens, dtype=np.uint16),
            "idx": np.zeros(1, "<i8"),
        }
        if pack_len:
            arrays["pack"], sequences = pack_documents([0], tokens, pack_len)
        ends, digests = {}, {}
        for kind, array in arrays.items():
            path = epath.Path(folder) / f"{name}.{kind}"
            array.tofile(path)
            ends[kind] = layout.ends_sha256(path, array.nbytes)
            digests[kind] = hashlib.sha256(array.tobytes()).hexdigest()
        shard = {
            "name": name,
            "tokens": tokens,
            "documents": 1,
            "sha256": digests["bin"],
            "index_sha256": digests["idx"],
            "ends_sha256": ends,
        }
        if pack_len:
            shard |= {"sequences": sequences, "pack_sha256": digests["pack"]}
        if checksums:
            sums = BlockSums()
            sums.add(arrays["bin"].tobytes())
            content = encode_sums({"bin": sums})
            (folder / f"{name}.{layout.CRC}").write_bytes(content)
            shard["crc_sha256"] = hashlib.sha256(content).hexdigest()
        listed.append(shard)
    tokenizer.save(folder / layout.TOKENIZER)
    empty: dict[str, object] = {"documents": 0, "tokens": 0, "text_bytes": 0, "shards": []}
    manifest = {
        "format_version": layout.FORMAT_VERSION,
        "settings": {"pack_len": pack_len},
        "vocab_size": VOCAB,
        "tokenizer_sha256": tokenizer.fingerprint,
        "skipped": {},
        "splits": {
            "train": {**empty, "documents": count, "tokens": count * tokens, "shards": listed},
            "validation": empty,
        },
    }
    (folder / layout.MANIFEST).write_bytes(layout.encode_manifest(manifest))


def cpu_seconds(work: Callable[[], object]) -> float:
    """Returns the CPU seconds of one call, summed over all threads."""
    began = time.process_time()
    work()
    return time.process_time() - began


def measure_loader(root: pathlib.Path, tokenizer: Tokenizer, _: int) -> Iterator[dict]:
    """Measures tokens per CPU second for one source and LLaMA's mixture, with and without tf.data.

    Args:
      root: folder for the data; the arguments are those of all functions in `MEASURES`.
      tokenizer: tokenizer of the data.
      _: unused.
    """
    write_fake_shards(root / "one", tokenizer, 4, 25_000_000)
    one = TokenDataset.open(root / "one", "train")
    shares = parse_shares("llama")
    cases = {
        "one source": Batches({"": one}, SEQ_LEN, BATCH, 0),
        "llama mixture": Batches(dict.fromkeys(shares, one), SEQ_LEN, BATCH, 0, shares=shares),
    }
    steps = 300
    for name, batches in cases.items():

        def bare(batches: Batches = batches) -> None:
            for step in range(steps):
                batches.rows(step, range(BATCH))

        def through_tf(batches: Batches = batches) -> None:
            for _ in batches.batches(range(BATCH), 0, steps):
                pass

        bare()  # warms the page cache
        loader_tokens = steps * BATCH * SEQ_LEN
        through_tf()
        yield {
            "benchmark": "loader",
            "case": name,
            "tokens_per_cpu_second": round(loader_tokens / cpu_seconds(bare)),
            "tokens_per_cpu_second_tf_data": round(loader_tokens / cpu_seconds(through_tf)),
        }
    batches = cases["one source"]
    for start in (0, 500_000):
        began = time.perf_counter()
        next(batches.batches(range(BATCH), start, start + 10))
        yield {
            "benchmark": "first batch",
            "step": start,
            "seconds": round(time.perf_counter() - began, 4),
        }


def measure_checksums(root: pathlib.Path, tokenizer: Tokenizer, _: int) -> Iterator[dict]:
    """Measures tokens per CPU second with and without checksums of blocks.

    Each turn opens the shards again, so that it checks each block again.

    Args:
      root: folder for the data.
      tokenizer: tokenizer of the data.
      _: unused.
    """
    count, tokens, turns = 8, 12_500_000, 7
    for name in ("with", "without"):
        write_fake_shards(root / name, tokenizer, count, tokens, checksums=name == "with")

    def speed(name: str, epochs: float, tf_data: bool) -> float:
        dataset = TokenDataset.open(root / name, "train")
        batches = Batches({"": dataset}, SEQ_LEN, BATCH, 0)
        steps = int(batches.n_sequences * epochs) // BATCH

        def work() -> None:
            if tf_data:
                for _ in batches.batches(range(BATCH), 0, steps):
                    pass
            else:
                for step in range(steps):
                    batches.rows(step, range(BATCH))

        return steps * BATCH * SEQ_LEN / cpu_seconds(work)

    for tf_data in (False, True):
        for epochs in (0.02, 1, 3):
            speed("with", 0.1, tf_data)  # warms the page cache
            pairs = [
                (speed("with", epochs, tf_data), speed("without", epochs, tf_data))
                for _ in range(turns)
            ]
            yield {
                "benchmark": "checksums",
                "block_bytes": BLOCK_BYTES,
                "tf_data": tf_data,
                "epochs": epochs,
                "tokens_per_cpu_second": round(statistics.median(one for one, _ in pairs)),
                "without": round(statistics.median(other for _, other in pairs)),
                "ratio_median": round(statistics.median(one / other for one, other in pairs), 3),
            }


def measure_tokenise(root: pathlib.Path, tokenizer: Tokenizer, _: int) -> Iterator[dict]:
    """Compares `prepare` (read, tokenise, hash, write) with SentencePiece's own batch call.

    Args:
      root: folder for the data.
      tokenizer: tokenizer of the data.
      _: unused.
    """
    texts = 3 * list(read_source("stdlib", DataConfig(), Tally()))
    with (root / "texts.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    library = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    n_bytes = sum(len(text.encode()) for text in texts)
    config = config_for(str(root / "texts.jsonl"), str(root / "tokenizer.model"))
    ratios, ours, theirs = [], [], []
    for number in range(5):
        theirs.append(cpu_seconds(lambda: library.encode(texts, num_threads=1)))
        output = root / f"tokenise{number}"
        ours.append(
            cpu_seconds(lambda: job.prepare(config, output, log=lambda line: None))  # noqa: B023
        )
        ratios.append(theirs[-1] / ours[-1])
    yield {
        "benchmark": "tokenise",
        "mb_per_cpu_second": round(n_bytes / 1e6 / sorted(ours)[2], 2),
        "sentencepiece_mb_per_cpu_second": round(n_bytes / 1e6 / sorted(theirs)[2], 2),
        "ratio_median": round(sorted(ratios)[2], 3),
    }


def measure_startup(root: pathlib.Path, tokenizer: Tokenizer, _: int) -> Iterator[dict]:
    """Measures the seconds from a manifest of 10,000 shards to the first batch and a summary.

    Args:
      root: folder for the data.
      tokenizer: tokenizer of the data.
      _: unused.
    """
    count = 10_000
    for name, pack_len in (("many", 0), ("many packed", SEQ_LEN)):
        write_fake_shards(root / name, tokenizer, count, SEQ_LEN + 1, pack_len=pack_len)
        began, cpu = time.perf_counter(), time.process_time()
        dataset = TokenDataset.open(root / name, "train")
        Batches({"": dataset}, SEQ_LEN, BATCH, 0).rows(0, range(BATCH))
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        yield {
            "benchmark": "startup",
            "shards": count,
            "packed": bool(pack_len),
            "seconds": round(seconds, 3),
            "cpu_seconds": round(cpu, 3),
        }
    began = time.perf_counter()
    prepared = summary.open_prepared(root / "many")
    summary.summary(prepared, 0, Screen())
    list(summary.show_rows(prepared, 0, 3, Screen()))
    plot.plot(prepared, epath.Path(root / "many.png"))
    seconds = time.perf_counter() - began
    yield {"benchmark": "show", "shards": count, "seconds": round(seconds, 3)}


def measure_verify(root: pathlib.Path, tokenizer: Tokenizer, _: int) -> Iterator[dict]:
    """Measures GB per second of `prepare --verify`, with all threads, from the page cache.

    Args:
      root: folder for the data.
      tokenizer: tokenizer of the data.
      _: unused.
    """
    write_fake_shards(root / "verify", tokenizer, 16, 50_000_000)
    began, cpu = time.perf_counter(), time.process_time()
    assert layout.verify(root / "verify") == []
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    gigabytes = sum(layout.file_sizes(epath.Path(root / "verify")).values()) / 1e9
    yield {
        "benchmark": "verify",
        "gb": round(gigabytes, 2),
        "gb_per_second": round(gigabytes / seconds, 2),
        "gb_per_cpu_second": round(gigabytes / cpu, 2),
    }


def _peak_of(target: str, megabytes: int, root: str, queue: multiprocessing.Queue) -> None:
    folder = pathlib.Path(root)
    if target == "prepare":
        config = config_for(
            str(folder / f"corpus{megabytes}.jsonl"),
            str(folder / "tokenizer.model"),
            validation_fraction=0.0,
        )
        job.prepare(config, folder / f"prepared{megabytes}", log=lambda line: None)
    else:
        dataset = TokenDataset.open(folder / f"prepared{megabytes}", "train")
        batches = Batches({"": dataset}, SEQ_LEN, BATCH, 0)
        for step in range(batches.n_sequences // BATCH):
            batches.rows(step, range(BATCH))
    # Linux only: getrusage would also count the parent's memory at the start of this process. The
    # kernel may drop pages of mapped files, but until then they count as resident.
    lines = (line.split() for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    sizes = {words[0]: int(words[1]) // 1024 for words in lines if words[-1] == "kB"}
    names = {"VmHWM:": "peak_mib", "RssAnon:": "anonymous_mib", "RssFile:": "mapped_files_mib"}
    queue.put({names[name]: sizes[name] for name in names})


def measure_memory(root: pathlib.Path, tokenizer: Tokenizer, megabytes: int) -> Iterator[dict]:
    """Measures the peak memory of preparing and loading a corpus and one ten times larger.

    Args:
      root: folder for the data.
      tokenizer: unused.
      megabytes: size of the smaller corpus, in MB.
    """
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(5000)]
    for size in (megabytes, 10 * megabytes):
        with (root / f"corpus{size}.jsonl").open("w") as file:
            written = 0
            while written < size * 1_000_000:
                text = " ".join(rng.choices(words, k=rng.randint(50, 2000)))
                written += file.write(json.dumps({"text": text}) + "\n")
        for target in ("prepare", "load"):
            context = multiprocessing.get_context("spawn")
            queue = context.Queue()
            child = context.Process(target=_peak_of, args=(target, size, str(root), queue))
            child.start()
            yield {"benchmark": f"memory: {target}", "corpus_mb": size, **queue.get()}
            child.join()


MEASURES = {
    "loader": measure_loader,
    "checksums": measure_checksums,
    "tokenise": measure_tokenise,
    "startup": measure_startup,
    "verify": measure_verify,
    "memory": measure_memory,
}


def main() -> None:
    """Runs the command."""
    unknown = set(_ONLY.value) - set(MEASURES)
    if unknown:
        raise UserError(f"--only knows {', '.join(MEASURES)}, not {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        data = DataConfig(source="stdlib")
        tokenizer = train_tokenizer(read_source("stdlib", data, Tally()), VOCAB)
        tokenizer.save(root / "tokenizer.model")
        for name in _ONLY.value:
            for record in MEASURES[name](root, tokenizer, _MEGABYTES.value):
                print(json.dumps(record))
                sys.stdout.flush()


if __name__ == "__main__":
    _ONLY = flags.DEFINE_list("only", list(MEASURES), "Measurements to run.")
    _MEGABYTES = flags.DEFINE_integer(
        "megabytes", 100, "Size of the smaller corpus of the memory measurement.", lower_bound=1
    )
    command.run(main, __doc__)
