"""Small configs, batches and texts, and functions that run the commands."""

import dataclasses
import json
import os
import pathlib
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from llama_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from llama_jax.parallel.mesh import make_mesh
from llama_jax.train.parts import LLAMA_PARTS
from llama_jax.train.step import jit_step
from tests.forks import Fork

ROOT = pathlib.Path(__file__).parent.parent
# A program that runs once needs little optimization; tests/README.md says how much time that saves.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):  # later versions of XLA have no such flag
    QUICK += " --xla_cpu_use_fusion_emitters=false"
# `make parity` and `make slow` compile with the optimizations of a real run.
XLA_FLAGS = os.environ.get("TEST_XLA_FLAGS", QUICK)
SPECIAL = ("begin_of_text", "end_of_text", "eot_id", "finetune_right_pad_id")
MESHES = ((1, 1, 1, 1), (8, 1, 1, 1), (1, 8, 1, 1), (1, 2, 1, 4), (2, 2, 1, 2), (1, 2, 2, 2))

TINY = Config(
    model=ModelConfig(
        vocab_size=64,
        dim=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=4,
        ffn_dim=48,
        compute_dtype="float32",
    ),
    data=DataConfig(source="synthetic"),
    optim=OptimConfig(peak_lr=1e-2, warmup_steps=2),
    train=TrainConfig(steps=20, seq_len=16, global_batch=32, loss_chunk=8, log_every=1),
)


TINY_FLAGS = (
    "--config=configs/tiny.py",
    "--config.model.vocab_size=300",
    "--config.model.dim=32",
    "--config.model.n_layers=2",
    "--config.model.ffn_dim=48",
    "--config.optim.warmup_steps=2",
    "--config.data.validation_fraction=0.2",
    "--config.train.seq_len=32",
    "--config.train.global_batch=8",
    "--config.train.log_every=2",
    "--config.train.eval_every=4",
    "--config.train.checkpoint_every=4",
    "--config.train.sample_prompt=",  # a prompt would have the decoder compiled, too
)


def replace(config, **changes):
    """Returns a changed config: `replace(config, train__steps=3)` has another `train.steps`."""
    for name, value in changes.items():
        group, _, field = name.partition("__")
        if not field:
            config = dataclasses.replace(config, **{group: value})
            continue
        part = dataclasses.replace(getattr(config, group), **{field: value})
        config = dataclasses.replace(config, **{group: part})
    return config


def with_adapters(config):
    """Returns the config as that of a run with LoRA."""
    return replace(config, init_from="hf:there", lora__rank=2)


def field_names(separator):
    """Returns the names of all fields of the config, `separator` between group and field."""
    found = set()
    for group in dataclasses.fields(Config):
        if dataclasses.is_dataclass(group.type):
            found |= {f"{group.name}{separator}{f.name}" for f in dataclasses.fields(group.type)}
        else:
            found.add(group.name)
    return found


def text_config(corpus, **changes):
    """Returns a config that trains on the files of a folder."""
    config = replace(
        TINY,
        model__vocab_size=300,
        data__source=str(corpus),
        data__validation_fraction=0.2,
        data__shard_tokens=1000,
        train__global_batch=8,
    )
    return replace(config, **changes)


def meshes(*default):
    """Returns all `MESHES` of several devices for a test; those not in `default` are slow."""
    return [
        shape if shape in default else pytest.param(shape, marks=pytest.mark.slow)
        for shape in MESHES[1:]
    ]


def mesh_of(shape):
    """Returns a mesh of fake devices; `shape` is (data, fsdp, context, tensor)."""
    n_devices = int(np.prod(shape))
    return make_mesh(MeshConfig(*shape), devices=jax.devices()[:n_devices])


# Fields of `train` that the loop reads and the compiled step does not.
LOOP_FIELDS = (
    *("log_every", "eval_every", "eval_batches", "sample_prompt", "profile_steps", "step_timeout"),
    *("checkpoint_every", "keep_checkpoints", "keep_every", "keep_best", "save_timeout"),
    *("max_failed_saves", "max_skipped", "max_rewinds", "rewind_steps", "stages"),
)
_steps = {}


def shared_step(config, mesh, parts=LLAMA_PARTS):
    """Returns the result of `jit_step`, made once per process for each different program."""
    defaults = {name: getattr(TrainConfig(), name) for name in LOOP_FIELDS}
    train = dataclasses.replace(config.train, **defaults)
    key = config.model, config.optim, config.lora, train, mesh, parts
    if key not in _steps:
        _steps[key] = jit_step(config, mesh, parts)
    return dataclasses.replace(_steps[key], config=config)


def random_batch(config, seed, masked=True):
    """Returns a host batch of random tokens, with about a fifth of the weights 0."""
    rng = np.random.default_rng(seed)
    shape = (config.train.global_batch, config.train.seq_len)
    tokens = rng.integers(0, config.model.vocab_size, (shape[0], shape[1] + 1), dtype=np.int32)
    weights = (rng.random(shape) > 0.2 if masked else np.ones(shape)).astype(np.float32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def random_params(config, seed=0):
    """Returns NumPy weights that give logits of about 5. No JAX code is involved."""
    c, rng = config, np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32) * 0.3

    def scale(*shape):
        return (1 + 0.2 * rng.standard_normal(shape)).astype(np.float32)

    n = c.n_layers
    params = {
        "embed": normal(c.vocab_size, c.dim),
        "layers": {
            "attn_norm": scale(n, c.dim),
            "attn": {
                "wq": normal(n, c.dim, c.n_heads, c.head_dim),
                "wk": normal(n, c.dim, c.n_kv_heads, c.head_dim),
                "wv": normal(n, c.dim, c.n_kv_heads, c.head_dim),
                "wo": normal(n, c.n_heads, c.head_dim, c.dim),
            },
            "mlp_norm": scale(n, c.dim),
            "mlp": {
                "w1": normal(n, c.dim, c.ffn_dim),
                "w2": normal(n, c.ffn_dim, c.dim),
                "w3": normal(n, c.dim, c.ffn_dim),
            },
        },
        "final_norm": scale(c.dim),
        "lm_head": normal(c.dim, c.vocab_size),
    }
    if c.tied_embeddings:
        del params["lm_head"]
    return params


def random_adapters(config, seed=1):
    """Returns NumPy adapters; both matrices of each one are nonzero."""
    from llama_jax.model.lora import init_adapters

    shapes = jax.eval_shape(
        lambda key: init_adapters(config.model, config.lora, key), jax.random.key(0)
    )
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32) * 0.2, shapes)


def frozen_base(config, params):
    """Returns NumPy parameters in the form of a frozen base of adapters."""
    from llama_jax.model.lora import to_frozen

    def leaf(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.startswith("layers/"):
            return to_frozen(name, x, config.lora)
        return jax.tree.map(
            lambda *layers: np.stack(layers), *(to_frozen(name, one, config.lora) for one in x)
        )

    return jax.tree.map_with_path(leaf, params)


def write_corpus(folder, files=40):
    """Writes text files of a made-up language; the text is the same every time."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(80)]
    for number in range(files):
        lines = (" ".join(rng.choices(words, k=8)) for _ in range(rng.randint(3, 12)))
        text = f"# file {number}\n" + "\n".join(lines) + "\n"
        (folder / f"{number:03d}.txt").write_text(text)
    return folder


def run_command(module, *arguments, **options):
    """Runs `python -m llama_jax.MODULE`. See `run_module`."""
    return run_module(f"llama_jax.{module}", *arguments, **options)


def run_module(
    module, *arguments, devices=1, timeout=600, stdin="", fresh=False, cwd=ROOT, **environment
):
    """Runs `python -m MODULE` in `cwd` as a fork, or with `fresh` in an interpreter of its own.

    Returns:
      The completed process, with its output as text.
    """
    env = {
        **os.environ,
        "XLA_FLAGS": f"{XLA_FLAGS} --xla_force_host_platform_device_count={devices}",
        **environment,
    }
    if fresh:
        command = [sys.executable, "-m", module, *map(str, arguments)]
        pipes = {"input": stdin, "capture_output": True, "text": True}
        return subprocess.run(command, cwd=cwd, env=env, timeout=timeout, **pipes)
    with tempfile.TemporaryFile("w+") as file:
        file.write(stdin)
        file.seek(0)
        process = Fork(module, arguments, env, file, cwd)
    with process:
        out, errors = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def start_train(corpus, workdir, *flags, module="llama_jax.train", **options):
    """Starts `python -m llama_jax.train`, or another module, on a tiny model. See `start`."""
    place = (f"--config.data.source={corpus}", f"--workdir={workdir}")
    return start(module, *TINY_FLAGS, *flags, *place, **options)


def free_port():
    """Returns a port of this machine that is not in use."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def start(module, *arguments, processes=1, devices=None, fresh=False, **environment):
    """Starts `python -m MODULE` in one or more processes, which connect on loopback.

    Args:
      module: name of the module.
      *arguments: arguments of the command.
      processes: number of processes.
      devices: number of fake devices of each process; default: 8 in all.
      fresh: start an interpreter for each process instead of a fork.
      **environment: further environment variables.

    Returns:
      The `Fork` or `Popen` of each process, with their output as text in pipes.
    """
    port = free_port()
    env = {
        **os.environ,
        "XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count={devices or 8 // processes}",
        # With a shared cache, a process that waits for another one's compiler would be taken for
        # dead.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **environment,
    }
    if processes > 1:
        env |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes)}
    started = []
    for number in range(processes):
        mine = {**env, "JAX_PROCESS_ID": str(number)} if processes > 1 else env
        if fresh:
            command = [sys.executable, "-m", module, *map(str, arguments)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(command, cwd=ROOT, env=mine, **pipes))
        else:
            started.append(Fork(module, arguments, mine))
    return started


def read_until(process, pattern):
    """Returns the first line of output that matches, after reading up to it."""
    for line in process.stdout:
        if re.match(pattern, line):
            return line
    raise AssertionError(f"ended without {pattern}: {process.stderr.read()}")


def outputs_of(processes, timeout=600):
    """Returns (stdout, stderr) of each process at its end; kills all that still run after an error.

    Reads all at once: a process with a full pipe stops, and so do the others that wait for it.
    """
    with ThreadPoolExecutor(len(processes)) as pool:
        try:
            return list(pool.map(lambda process: process.communicate(timeout=timeout), processes))
        finally:
            for process in processes:
                process.kill()


def without_gloo(output):
    """Returns the lines that do not come from Gloo, which carries the messages between CPUs.

    Threads of Gloo print piece by piece at the same time, so that its lines are broken and mixed.
    """
    for piece in (
        "[Gloo] Rank",
        "is connected to",
        "peer ranks. Expected number of connected peer ranks is :",
    ):
        output = output.replace(piece, "")
    return [line for line in output.splitlines() if line.strip(" 0123456789")]


def one_line_error(process):
    """Returns the error line of a command that failed with status 1, one line and no traceback."""
    lines = process.stderr.strip().splitlines()
    assert process.returncode == 1, (process.returncode, process.stdout, process.stderr)
    assert len(lines) == 1 and lines[0].startswith("error: "), process.stderr
    return lines[0]


def llama3_tokenizer(corpus):
    """Returns a small byte-level BPE `tokenizer.json` that splits text like LLaMA-3's; 404 ids."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    words = Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    made = Tokenizer(models.BPE(ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens([f"<|{name}|>" for name in SPECIAL])
    bos = "<|begin_of_text|>"
    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
    )
    return made.to_str().encode()


def released_json(tokenizer):
    """Returns the tokenizer.json of a SentencePiece model in the form that was released with LLaMA.

    It puts a space before every text, also after a special token.
    """
    from llama_jax.interchange.fast_tokenizer import fast_files

    described = json.loads(fast_files(tokenizer)["tokenizer.json"])
    normalizers = [{"type": "Prepend", "prepend": "▁"}, described["normalizer"]]
    described["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    described["pre_tokenizer"] = None
    return json.dumps(described).encode()


def made_state(config, params=None, step=0):
    """Returns a state with these weights and fresh moments, on one device, without compiling."""
    from llama_jax.train.optimizer import make_optimizer
    from llama_jax.train.step import TrainState

    params = random_params(config.model) if params is None else params
    params = jax.tree.map(jax.numpy.asarray, params)
    opt_state = make_optimizer(config.optim, config.train.steps).init(params)
    return TrainState(jax.numpy.full((), step, "int32"), params, opt_state)


def restored_state(saver, step, config, shardings):
    """Returns the state of a saved step, on the mesh of a `TrainState` of shardings."""
    from llama_jax.parallel.sharding import with_shardings
    from llama_jax.train.step import TrainState, abstract_state

    target = with_shardings(abstract_state(config), shardings.replace(frozen=None))
    return TrainState.from_items(saver.restore(step, target.to_items()))


def save_checkpoint(folder, config, params, tokenizer_model, step=0):
    """Writes one saved step of these weights to a work directory, and returns the directory."""
    from llama_jax.checkpoint.checkpointer import Checkpointer
    from llama_jax.checkpoint.saved_step import StepMeta

    folder.mkdir(parents=True, exist_ok=True)
    with Checkpointer(folder, config) as checkpointer:
        items = made_state(config, params, step).to_items()
        checkpointer.save(items, StepMeta(config, step, "made up", tokenizer_model))
    return folder


def write_manifest(folder, tokenizer, pack_len, vocab_size=None, **splits):
    """Completes a folder of shards that a `ShardWriter` has written, split by split."""
    from llama_jax.data.shards.layout import FORMAT_VERSION, MANIFEST, TOKENIZER, encode_manifest

    nothing = {"documents": 0, "tokens": 0, "text_bytes": 0, "shards": []}
    manifest = {
        "format_version": FORMAT_VERSION,
        "settings": {"pack_len": pack_len},
        "vocab_size": vocab_size or tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.fingerprint,
        "skipped": {},
        "splits": {"train": nothing, "validation": nothing, **splits},
    }
    tokenizer.save(folder / TOKENIZER)
    (folder / MANIFEST).write_bytes(encode_manifest(manifest))


def until(what):
    """Waits until `what()` is true, for at most ten minutes."""
    deadline = time.monotonic() + 600
    while not what():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def records(workdir):
    """Returns all records that a run wrote to its metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def flip_bit(path, position):
    """Inverts one bit of a file; a second call restores the file."""
    data = bytearray(path.read_bytes())
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)
