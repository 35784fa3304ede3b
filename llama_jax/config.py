"""The config of a run: every field with its default, its check and its meaning.

The groups are frozen dataclasses, in the order in which `Config` has them. `field` declares a
default, a check and a meaning; `help(TrainConfig)` and `--help` show all three. `__post_init__`
checks the rules that involve several fields.

A file in `configs/` starts from `default()`, changes some fields, and returns a locked
`ml_collections.ConfigDict`. `from_config_dict` converts that to the frozen, validated `Config` that
the rest of the code takes: after this boundary no field is misspelt or has the wrong type.
"""

import dataclasses
import difflib
import functools
import json
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import ml_collections

from llama_jax.errors import (
    ANY,
    NOT_EMPTY,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_INT64,
    Check,
    UserError,
    as_float32,
    check_fields,
    check_type,
    field,
    one_of,
    require,
    with_attributes,
)
from llama_jax.files import expand_place, parse_json
from llama_jax.stages import StageText, parse

_N = TypeVar("_N", int, float)

REMAT_POLICIES = ("none", "full", "dots")
# Tensors inside a block that `remat = "save:..."` may keep; model/llama.py gives them these names.
REMAT_NAMES = ("block_in", "q", "k", "v", "attn_context", "attn_out", "mlp_gate", "mlp_up")
ATTENTION_BACKENDS = ("auto", "xla", "cudnn", "triton", "splash")

AT_LEAST_1 = Check("at least 1", lambda value: value >= 1)
FRACTION = Check("in [0, 1]", lambda value: 0 <= value <= 1)
BELOW_1 = Check("in [0, 1)", lambda value: 0 <= value < 1)
# The code divides by 1 - RATE, which must not be 0 in float32.
RATE = Check("in [0, 1) in float32", lambda value: value >= 0 and as_float32(value) < 1)
TILE = Check("0 or a multiple of 128", lambda value: value >= 0 and value % 128 == 0)
AXIS = Check("positive or -1", lambda value: value > 0 or value == -1)
WORKERS = Check("from 0 to 4096", lambda value: 0 <= value <= 4096)  # each is a process
SOURCE = Check("non-empty, such as stdlib or a path", bool)
SEED = Check("in [0, 2**32)", lambda value: 0 <= value < 2**32, bits=63)
SPIKE = Check("0 or at least 1", lambda value: value == 0 or value >= 1)
SCHEDULE = one_of("cosine", "linear", "constant", "wsd", "inverse_sqrt")
FLOAT = one_of("bfloat16", "float32")
ROPE_SCALING = one_of("llama3", "linear", "dynamic", "yarn")


def _multiple_near(number: int, of: int) -> int:
    """Rounds to a multiple of twice `of`, so that heads have even sizes."""
    return max(1, round(number / (2 * of))) * 2 * of


@with_attributes
@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Describes a LLaMA (arXiv:2302.13971); the defaults are those of the 7B model.

    The vocabulary may have more rows than the tokenizer has ids, so that `mesh.tensor` divides it;
    the extra rows are never targets and never sampled. `splash` is the attention kernel for TPUs;
    the size of its tiles must divide the sequence length.
    """

    vocab_size: int = field(
        32_000,
        POSITIVE,
        "Rows of the embedding and of the output head; at least the tokenizer's number of ids.",
    )
    dim: int = field(4096, POSITIVE, "Size of a token's hidden state.")
    n_layers: int = field(32, POSITIVE, "Number of transformer blocks.")
    n_heads: int = field(32, POSITIVE, "Number of query heads.")
    n_kv_heads: int = field(
        32, POSITIVE, "Number of key and value heads; must divide n_heads (arXiv:2305.13245)."
    )
    ffn_dim: int = field(11_008, POSITIVE, "Size of the hidden layer of the MLP.")
    explicit_head_dim: int = field(0, NOT_NEGATIVE, "Size of one head; 0: dim // n_heads.")
    rope_theta: float = field(10_000.0, POSITIVE, "Base of RoPE's frequencies.")
    rope_scaling: str = field(
        "llama3", ROPE_SCALING, "How RoPE is stretched to longer contexts; see model/rope.py."
    )
    rope_scaling_factor: float = field(
        1.0, AT_LEAST_1, "Factor by which RoPE is stretched; 1 switches llama3 and linear off."
    )
    rope_original_context: int = field(
        8_192, POSITIVE, "Context length in tokens before stretching, for llama3, dynamic and yarn."
    )
    rope_low_freq_factor: float = field(
        1.0,
        POSITIVE,
        "llama3 fully stretches wavelengths above rope_original_context / this value.",
    )
    rope_high_freq_factor: float = field(
        4.0,
        POSITIVE,
        "llama3 does not stretch wavelengths below rope_original_context / this value.",
    )
    rope_beta_fast: float = field(
        32.0,
        POSITIVE,
        "yarn does not stretch pairs of dimensions that make more than this many turns in the "
        "original context.",
    )
    rope_beta_slow: float = field(
        1.0,
        POSITIVE,
        "yarn fully stretches pairs of dimensions that make fewer than this many turns in the "
        "original context.",
    )
    rope_truncate: bool = field(
        True, ANY, "Round the bounds that yarn computes from both betas to whole pairs."
    )
    rope_attention_factor: float = field(
        0.0, NOT_NEGATIVE, "Factor of cos and sin in yarn; 0: use 0.1 ln(rope_scaling_factor) + 1."
    )
    norm_eps: float = field(1e-6, POSITIVE, "Added to the mean square in RMSNorm.")
    sliding_window: int = field(
        0,
        NOT_NEGATIVE,
        "Number of keys that a query attends to: its own and those just before (arXiv:2310.06825); "
        "0: all keys up to its own.",
    )
    tied_embeddings: bool = field(False, ANY, "Use the embedding as the output head, too.")
    compute_dtype: str = field(
        "bfloat16",
        FLOAT,
        "Type of activations and matrix products; weights, norms and the loss stay float32.",
    )
    attention: str = field(
        "auto", one_of(*ATTENTION_BACKENDS), "Backend of attention; see model/attention.py."
    )
    attention_tile: int = field(
        0, TILE, "Tokens per tile of the splash kernel; 0: chosen by sequence length and chip."
    )
    attention_backward: str = field(
        "auto", one_of("auto", "split", "fused"), "How the splash kernel computes gradients."
    )
    remat: str = field(
        "none",
        ANY,
        "What the backward pass recomputes. none: nothing; full: the whole block; dots: all but "
        "matrix products; save:NAME,NAME: all but these tensors; offload:NAME,NAME: the same, but "
        "these tensors are kept in the host's memory; save:NAME;offload:NAME: both. Each NAME is "
        "one of "
        f"{', '.join(REMAT_NAMES)}.",
    )
    scan_unroll: int = field(
        1,
        POSITIVE,
        "Layers per iteration of the scan; more layers take longer to compile and may run faster.",
    )

    def __post_init__(self) -> None:
        check_fields("model", self)
        require(
            bool(self.explicit_head_dim) or self.dim % self.n_heads == 0,
            f"model.dim={self.dim} is not a multiple of model.n_heads={self.n_heads}; set "
            f"--config.model.dim={_multiple_near(self.dim, self.n_heads)}, or set the size of "
            "a head with --config.model.explicit_head_dim",
        )
        require(
            self.n_heads % self.n_kv_heads == 0,
            f"model.n_heads={self.n_heads} is not a multiple of model.n_kv_heads="
            f"{self.n_kv_heads}; set "
            f"--config.model.n_kv_heads={math.gcd(self.n_heads, self.n_kv_heads)}",
        )
        require(
            self.head_dim % 2 == 0,
            f"RoPE needs an even head size, got {self.head_dim}; set "
            f"--config.model.explicit_head_dim={self.head_dim + 1}",
        )
        self._check_rope()
        self._check_remat()

    def _check_rope(self) -> None:
        require(
            self.rope_original_context * self.rope_scaling_factor < 2**31,
            f"model.rope_scaling_factor={self.rope_scaling_factor} stretches "
            f"model.rope_original_context={self.rope_original_context} beyond 2**31 tokens",
        )
        for low, high in (
            ("rope_low_freq_factor", "rope_high_freq_factor"),
            ("rope_beta_slow", "rope_beta_fast"),
        ):
            small, large = getattr(self, low), getattr(self, high)
            require(
                small < large,
                f"model.{low} must be positive and less than {high}, got {small} and {large}",
            )
        require(
            self.rope_scaling != "yarn" or self.rope_theta > 1,
            f"model.rope_theta must be greater than 1 for yarn, got {self.rope_theta}",
        )
        require(
            self.rope_scaling != "dynamic" or self.head_dim > 2,
            "dynamic RoPE needs a head size of more than 2",
        )

    def _check_remat(self) -> None:
        if ":" not in self.remat:
            require(
                self.remat in REMAT_POLICIES,
                f"model.remat must be one of {', '.join(REMAT_POLICIES)}, save:NAME,... or "
                f"offload:NAME,..., got {self.remat!r}",
            )
            return
        for part in self.remat.split(";"):
            action, _, names = part.partition(":")
            require(
                action in ("save", "offload"),
                f"model.remat: {part!r} is neither save:NAME,... nor offload:NAME,...",
            )
            for name in names.split(","):
                require(
                    name in REMAT_NAMES,
                    f"model.remat names an unknown tensor {name!r}; the known ones are "
                    f"{', '.join(REMAT_NAMES)}",
                )

    @property
    def rope_is_stretched(self) -> bool:
        """Says whether RoPE is stretched; a factor of 1 switches llama3 and linear off."""
        return self.rope_scaling_factor != 1 or self.rope_scaling in ("dynamic", "yarn")

    @property
    def rope_amplitude(self) -> float:
        """The factor of cos and sin: 1 except in yarn. Attention scores grow by its square."""
        if self.rope_scaling != "yarn":
            return 1.0
        return self.rope_attention_factor or 0.1 * math.log(self.rope_scaling_factor) + 1.0

    @property
    def stretched_context(self) -> int:
        """Context length in tokens after stretching: the original one times the factor."""
        return int(self.rope_original_context * self.rope_scaling_factor)

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.explicit_head_dim or self.dim // self.n_heads

    def remat_names(self, action: str) -> tuple[str, ...]:
        """Returns the names of the tensors that `remat` keeps from the forward pass.

        Args:
          action: `save` (kept on the device) or `offload` (kept in the host's memory).
        """
        parts = dict(part.split(":") for part in self.remat.split(";") if ":" in part)
        return tuple(parts[action].split(",")) if action in parts else ()


@with_attributes
@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sets the devices along each mesh axis; one axis may be -1 and takes all the rest."""

    data: int = field(1, AXIS, "Devices that hold the same weights and get different sequences.")
    fsdp: int = field(-1, AXIS, "Devices that divide the weights; each layer is gathered (ZeRO-3).")
    context: int = field(1, AXIS, "Devices that divide each sequence.")
    tensor: int = field(1, AXIS, "Devices that divide heads, ffn and vocabulary (Megatron).")

    def __post_init__(self) -> None:
        check_fields("dcn" if isinstance(self, DcnConfig) else "mesh", self)
        rest = [f"{name}=-1" for name, size in dataclasses.asdict(self).items() if size == -1]
        require(
            len(rest) <= 1,
            f"only one mesh axis may be -1, got {', '.join(rest)}; give the other ones a number, "
            f"such as {rest[-1][:-2] if rest else ''}1",
        )


@with_attributes
@dataclasses.dataclass(frozen=True)
class DcnConfig(MeshConfig):
    """Sets the slices (or groups of hosts) along each mesh axis, joined by a slower network."""

    data: int = field(1, AXIS, "Slices along the axis data.")
    fsdp: int = field(1, AXIS, "Slices along the axis fsdp.")
    context: int = field(1, AXIS, "Slices along the axis context.")
    tensor: int = field(1, AXIS, "Slices along the axis tensor.")


def _expand(config: Any, name: str, shown: str) -> None:
    """Replaces a leading `~` in a field of a config by the home folder.

    Args:
      config: the group, which is changed in place.
      name: the name of the field.
      shown: the dotted name of the field, for messages.
    """
    value = getattr(config, name)
    try:
        expanded = expand_place(value)
    except UserError as error:
        raise UserError(f"{shown}={value}: {error}") from error
    object.__setattr__(config, name, expanded)  # the dataclass is frozen


@with_attributes
@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Sets where the tokens come from.

    The first bytes of a file of `source` decide its format: JSON lines or a JSON list with a text
    field, Parquet, or plain text; all but Parquet may be compressed (gzip, zstandard, xz, bzip2).
    With a `template`, the files are JSON lines or JSON lists of instructions or conversations; see
    docs/finetuning.md.
    """

    source: str = field(
        "stdlib",
        SOURCE,
        "stdlib (the Python files of the standard library, on every machine), synthetic (random "
        "tokens, for benchmarks), tfds:NAME, or files, folders and globs, separated by commas. "
        "Several sources need names: 'web=web/*.jsonl.zst; books=books/*.txt'.",
    )
    path: str = field("", ANY, "Folder of prepared shards; '': WORKDIR/data.")
    tokenizer: str = field(
        "",
        ANY,
        "A SentencePiece .model, a tokenizer.json or a Hugging Face folder, with at most "
        "model.vocab_size ids; '': train a tokenizer on the source.",
    )
    tokenizer_size: int = field(
        0, NOT_NEGATIVE, "Number of ids of a tokenizer trained on the source; 0: model.vocab_size."
    )
    text_field: str = field(
        "text",
        NOT_EMPTY,
        "Field of a record, or column of a table, with the text; a.b is the field b inside a.",
    )
    separator: str = field(
        "",
        ANY,
        r"Text that separates the documents of a plain-text file, such as <|endoftext|>; \n is a "
        r"line end, \t a tab. '': a file is one document; one longer than max_document_bytes is "
        "cut at blank lines, about every 100,000 bytes.",
    )
    template: str = field(
        "",
        ANY,
        "Template of instruction data: alpaca, vicuna, llama2, llama3, or a FILE.jinja or "
        "tokenizer_config.json; only the answers count in the loss. '': the source is text.",
    )
    tfds_split: str = field("train", ANY, "Split of a TFDS dataset.")
    tfds_data_dir: str = field("", ANY, "Folder of TFDS datasets; '': TFDS's own default.")
    mixture: str = field(
        "",
        ANY,
        "Each source's share of the tokens that count in the loss: web=0.7,books=0.3, or "
        "web=70%,books=30%, or weights such as web=3,books=2,code=1, or llama (the shares of the "
        "LLaMA paper); '': in proportion to the sizes of the sources.",
    )
    packing: str = field(
        "concat",
        one_of("concat", "best_fit"),
        "How documents fill sequences. concat: one after another, cut where a sequence ends, as in "
        "LLaMA; best_fit: a document that fits into a sequence stays whole, and each attends only "
        "to itself.",
    )
    streaming: bool = field(False, ANY, "Tokenise during training, without shards.")
    start: str = field(
        "auto",
        ANY,
        "Where each source begins, in epochs, such as 0, 0.5 or web=0.5,books=1.25. auto: where a "
        "run stopped whose checkpoint init_from names, if it read the same tokens; otherwise 0.",
    )
    accept_other_data: bool = field(
        False, ANY, "Resume even if the checkpoint was trained on other data."
    )
    validation_fraction: float = field(
        0.01,
        BELOW_1,
        "Fraction of the documents that is held out for validation, chosen by their contents; if "
        "this selects no document or all of them, the same fraction of the tokens is held out; "
        "0: no validation.",
    )
    shard_tokens: int = field(100_000_000, POSITIVE_INT64, "Tokens per shard.")
    part_bytes: int = field(
        64_000_000, POSITIVE_INT64, "Bytes of the source that one worker tokenises at a time."
    )
    workers: int = field(0, WORKERS, "Processes that tokenise; 0: one per core.")
    max_document_bytes: int = field(
        10_000_000,
        POSITIVE,
        "Longer documents are skipped and counted; plain-text files are cut, see separator.",
    )

    def __post_init__(self) -> None:
        check_fields("data", self)
        for name in ("path", "tokenizer", "template", "tfds_data_dir"):
            _expand(self, name, f"data.{name}")
        require(
            not self.streaming or (self.packing == "concat" and not self.mixture),
            "data.streaming needs data.packing=concat, and no data.mixture",
        )
        require(
            not self.template or (self.packing == "best_fit" and self.source != "synthetic"),
            "data.template needs data.packing=best_fit, so that conversations stay whole, and "
            f"files to read; got data.packing={self.packing}, data.source={self.source}",
        )


@with_attributes
@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Sets AdamW and its learning rate; the defaults are those of the LLaMA paper, section 2.3."""

    peak_lr: float = field(3e-4, POSITIVE, "Highest learning rate, reached after the warm-up.")
    final_lr_fraction: float = field(
        0.1,
        FRACTION,
        "Learning rate at the last step, as a fraction of peak_lr; for the schedules cosine, "
        "linear and wsd.",
    )
    warmup_steps: int = field(
        2_000, NOT_NEGATIVE, "Steps over which the learning rate rises to peak_lr; 0: no warm-up."
    )
    schedule: str = field(
        "cosine",
        SCHEDULE,
        "Learning rate after the warm-up. cosine, linear: it falls to final_lr_fraction at "
        "train.steps; constant: it stays at peak_lr; wsd: it stays at peak_lr, then falls to "
        "final_lr_fraction over the last decay_steps (arXiv:2405.18392); inverse_sqrt: it is "
        "peak_lr * sqrt(warmup_steps / step).",
    )
    decay_steps: int = field(
        0,
        NOT_NEGATIVE,
        "Steps of the decay of wsd at the end of the run; 0: a fifth of train.steps.",
    )
    decay_shape: str = field(
        "1-sqrt",
        one_of("1-sqrt", "linear"),
        "How the learning rate of wsd falls; t is the fraction of the decay that is done. 1-sqrt: "
        "as 1 - sqrt(t); linear: as 1 - t.",
    )
    beta1: float = field(0.9, RATE, "Decay of the first moment per step.")
    beta2: float = field(0.95, RATE, "Decay of the second moment per step.")
    eps: float = field(1e-8, POSITIVE, "Added to the square root of the second moment.")
    weight_decay: float = field(
        0.1,
        NOT_NEGATIVE,
        "Each step shrinks all weights, except the scales of norms, by this fraction times the "
        "learning rate; 0: no decay.",
    )
    clip_norm: float = field(
        1.0, POSITIVE, "A gradient with a larger global norm is scaled down to this norm."
    )
    moment_dtype: str = field(
        "float32", FLOAT, "Type of the first moment; the second moment stays float32."
    )

    def __post_init__(self) -> None:
        check_fields("optim", self)

    def decay_length(self, steps: int) -> int:
        """Returns the number of steps of the decay of `wsd` in a run of `steps` steps."""
        return self.decay_steps or max(1, steps // 5)

    def check_decay(self, steps: int) -> None:
        """Checks that warm-up and decay of `wsd` fit into a run of `steps` steps.

        Raises:
          UserError: they do not fit.
        """
        length = self.decay_length(steps)
        default = "" if self.decay_steps else " (its default, a fifth of train.steps)"
        require(
            self.schedule != "wsd" or self.warmup_steps + length <= steps,
            f"optim.warmup_steps={self.warmup_steps} and optim.decay_steps={length}{default} are "
            f"more than train.steps={steps}; set "
            f"--config.optim.decay_steps={steps - self.warmup_steps}",
        )


@with_attributes
@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Sets the training loop. Steps are optimiser steps, counted from 1."""

    steps: int = field(250_000, POSITIVE, "Steps of the whole run.")
    seq_len: int = field(2048, POSITIVE, "Tokens per sequence.")
    global_batch: int = field(
        2048, POSITIVE, "Sequences per step, over all hosts; 2048 of 2048 tokens are 4M tokens."
    )
    grad_accum: int = field(1, POSITIVE, "Microbatches per step, a divisor of global_batch.")
    loss_chunk: int = field(
        512, POSITIVE, "Positions of a sequence whose logits are in memory at the same time."
    )
    z_loss: float = field(
        0.0, NOT_NEGATIVE, "Weight of log(Z)^2 in the loss (PaLM uses 1e-4); 0: no such term."
    )
    stages: str = field(
        "",
        ANY,
        "Values that fields have only in some steps, such as 'until 252M tokens: "
        "train.global_batch=1024; until 9000: data.mixture=web=0.5,books=0.5 train.seq_len=8192'. "
        "Each stage begins where the one before it ends; after the last one, and for fields that a "
        "stage does not name, the config holds. See docs/stages.md.",
    )
    seed: int = field(0, SEED, "Seed of the initial weights, the order of the data, and dropout.")
    log_every: int = field(10, POSITIVE, "Steps between log lines.")
    eval_every: int = field(
        1_000, POSITIVE, "Steps between evaluations; the last step is also evaluated."
    )
    eval_batches: int = field(
        20, POSITIVE, "Maximum number of batches per evaluation, each of global_batch sequences."
    )
    checkpoint_every: int = field(
        1_000, POSITIVE, "Steps between checkpoints; the last step is also saved."
    )
    keep_checkpoints: int = field(3, POSITIVE, "Keep this many of the newest checkpoints.")
    keep_every: int = field(
        0, NOT_NEGATIVE, "Also keep checkpoints of steps that are multiples of this; 0: none."
    )
    keep_best: int = field(
        0, NOT_NEGATIVE, "Also keep this many checkpoints with the lowest validation loss; 0: none."
    )
    max_failed_saves: int = field(
        3,
        NOT_NEGATIVE,
        "Failed saves in a row that a run tolerates; 0: the first one ends the run.",
    )
    save_timeout: int = field(
        1_800, NOT_NEGATIVE, "Seconds after which a running save is reported as slow; 0: never."
    )
    sample_prompt: str = field(
        "", ANY, "Print a continuation of this text after training; '': none."
    )
    step_timeout: int = field(
        1_800, NOT_NEGATIVE, "Seconds without a step after which a process ends itself; 0: never."
    )
    max_skipped: int = field(
        10, POSITIVE, "Skipped updates in a row after which the run stops or rewinds."
    )
    spike_factor: float = field(
        0.0,
        SPIKE,
        "Skip an update whose loss or gradient norm is more than this many robust standard "
        "deviations above its median; 0: never.",
    )
    max_rewinds: int = field(
        0, NOT_NEGATIVE, "Number of rewinds to a checkpoint before the run stops; 0: never rewind."
    )
    rewind_steps: int = field(
        100,
        POSITIVE,
        "Rewind to a checkpoint at least this many steps before the first skipped one.",
    )
    norm_stats: bool = field(
        False, ANY, "Log the norms of gradients and updates of each group of weights."
    )
    profile_steps: str = field(
        "", ANY, "First and last step to trace for TensorBoard, such as 10,15; '': none."
    )

    def __post_init__(self) -> None:
        check_fields("train", self)
        require(
            self.global_batch % self.grad_accum == 0,
            f"train.global_batch={self.global_batch} is not a multiple of "
            f"train.grad_accum={self.grad_accum}; set --config.train.grad_accum="
            f"{math.gcd(self.global_batch, self.grad_accum)}, or make train.global_batch a "
            "multiple of train.grad_accum",
        )
        if self.profile_steps:
            self._check_profile_steps()

    def _check_profile_steps(self) -> None:
        require(
            re.fullmatch(r"[0-9]{1,9},[0-9]{1,9}", self.profile_steps) is not None,
            "train.profile_steps must be the first and the last step to trace, such as 10,15, "
            f"got {self.profile_steps!r}",
        )
        window = self.profile_window
        require(
            1 <= window.start < window.stop and window.start <= self.steps,
            f"train.profile_steps={self.profile_steps} must be two steps in 1..{self.steps} "
            "(train.steps), the first not after the last; set --config.train.profile_steps="
            f"{min(2, self.steps)},{min(5, self.steps)}, or leave it empty",
        )

    @property
    def profile_window(self) -> range:
        """The steps to trace, numbered from 1 as in the log."""
        if not self.profile_steps:
            return range(0)
        first, last = map(int, self.profile_steps.split(","))
        return range(first, last + 1)

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimiser step, over all hosts."""
        return self.global_batch * self.seq_len


# The matrices of a layer, by the names that `parameters.layer_matrices` has.
MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
NF4_BLOCK = 64  # inputs that share a scale
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # of a weight and its shares of both scales; nf4.py


@with_attributes
@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Sets LoRA (arXiv:2106.09685), or QLoRA (arXiv:2305.14314) if the base is in NF4."""

    rank: int = field(
        0, NOT_NEGATIVE, "Rank of the adapters; 0: no adapters, and all weights are trained."
    )
    alpha: float = field(16.0, POSITIVE, "The output of an adapter is scaled by alpha / rank.")
    dropout: float = field(0.0, RATE, "Dropout rate of the input of an adapter.")
    targets: str = field(
        ",".join(MATRICES), ANY, "Matrices that have an adapter, separated by commas."
    )
    base_dtype: str = field(
        "bfloat16", one_of("float32", "bfloat16", "nf4"), "Type of the frozen matrices."
    )

    def __post_init__(self) -> None:
        check_fields("lora", self)
        names = self.names
        require(
            set(names) <= set(MATRICES) and len(set(names)) == len(names),
            f"lora.targets must be some of {','.join(MATRICES)}, each once, got {self.targets!r}",
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The matrices that have an adapter."""
        return tuple(name.strip() for name in self.targets.split(","))

    @property
    def scale(self) -> float:
        """The factor of an adapter's output."""
        return self.alpha / self.rank

    def check(self, model: ModelConfig, init_from: str) -> None:
        """Checks the fields against the rest of a config.

        Raises:
          UserError: the adapters have no base, NF4 blocks do not divide its matrices, or a field
            is set although there are no adapters.
        """
        if not self.rank:
            names = (f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
            name = next(names, "")
            require(
                not name,
                f"lora.{name} has no effect: lora.rank is 0, so all weights would be trained; "
                "try --config.lora.rank=16",
            )
            return
        require(bool(init_from), "lora.rank needs weights to adapt; try --config.init_from=hf:DIR")
        if self.base_dtype != "nf4":
            return
        inputs = {
            "model.dim": model.dim,
            "model.ffn_dim": model.ffn_dim,
            "model.n_heads x head size": model.n_heads * model.head_dim,
        }
        for name, size in inputs.items():
            require(
                size % NF4_BLOCK == 0,
                f"lora.base_dtype=nf4 has blocks of {NF4_BLOCK} inputs, which do not divide "
                f"{name} = {size}",
            )


INIT_FORMATS = ("hf", "meta", "ckpt")

# Fields that a stage of `train.stages` may set. `train.steps` there is the length of the schedule
# of the learning rate only.
STAGED = (
    *("data.mixture", "train.steps", "train.seq_len", "train.global_batch", "train.grad_accum"),
    *("train.loss_chunk", "train.z_loss", "train.seed", "lora.dropout"),
    *(
        f"optim.{one.name}"
        for one in dataclasses.fields(OptimConfig)
        if one.name != "moment_dtype"  # the dtype of arrays in the state
    ),
    *(f"model.{one.name}" for one in dataclasses.fields(ModelConfig) if "rope_" in one.name),
    *("model.attention", "model.attention_tile", "model.attention_backward", "model.remat"),
    *("model.scan_unroll", "model.compute_dtype"),
)
MAX_STEPS = 2**62  # above every step of a run


@dataclasses.dataclass(frozen=True)
class Stage:
    """Consecutive steps of a run that have one config.

    Attributes:
      start: the first step, counted from 0.
      stop: the step after the last one; the last stage of a run ends at `MAX_STEPS`.
      config: the config of these steps; its `train.stages` is empty.
      values: the fields that the stage sets, by dotted name.
    """

    start: int
    stop: int
    config: "Config"
    values: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)


@with_attributes
@dataclasses.dataclass(frozen=True)
class Config:
    """Defines a run; it is saved as `config.json` and inside each checkpoint."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    dcn: DcnConfig = dataclasses.field(default_factory=DcnConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    init_from: str = field(
        "", ANY, "Weights to start from: hf:DIR, meta:DIR or ckpt:DIR; '': random weights."
    )
    branch_from: str = field(
        "",
        ANY,
        "A saved step of another run to go on from, with its weights, moments, step and position "
        "in the data: RUN/checkpoints/N, or RUN for its newest step; '': none.",
    )

    def __post_init__(self) -> None:
        for name in ("init_from", "branch_from"):
            check_type(name, getattr(self, name), str)
            _expand(self, name, name)
        kind, _, folder = self.init_from.partition(":")
        require(
            not self.init_from or (kind in INIT_FORMATS and bool(folder)),
            f"init_from must be FORMAT:DIR with FORMAT one of {', '.join(INIT_FORMATS)}, "
            f"got {self.init_from!r}",
        )
        self.lora.check(self.model, self.init_from)
        require(
            self.data.tokenizer_size <= self.model.vocab_size,
            f"data.tokenizer_size={self.data.tokenizer_size} is more than model.vocab_size="
            f"{self.model.vocab_size}: each id needs a row of the model; set "
            f"--config.model.vocab_size={self.data.tokenizer_size}",
        )
        require(
            self.optim.warmup_steps < self.train.steps,
            f"optim.warmup_steps={self.optim.warmup_steps} must be less than "
            f"train.steps={self.train.steps}; set "
            f"--config.optim.warmup_steps={self.train.steps // 10}",
        )
        self.optim.check_decay(self.train.steps)

        staged = {name for stage in self.stages for name in stage.values}
        require(
            not self.lora.rank or not any(name.startswith("model.rope_") for name in staged),
            "with adapters (lora.rank), no stage of train.stages may set model.rope_*: adapters "
            "are released without their base, which has one RoPE",
        )

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the run, from step 0 to `MAX_STEPS`.

        Raises:
          UserError: `train.stages` is malformed, has a stage that ends before it begins, or sets a
            field that is unknown, fixed or out of range.
        """
        if not self.train.stages:
            return (Stage(0, MAX_STEPS, self),)
        base = replaced(self, {"train.stages": ""})
        found: list[Stage] = []
        start = tokens = 0
        for number, text in enumerate(parse(self.train.stages), start=1):
            where = f"train.stages, stage {number} ({text.end})"
            values = {}
            for name, value in text.values.items():
                name, kind = _staged(name, where)
                require(name not in values, f"{where}: {name} occurs twice")
                values[name] = _parsed(value, kind, f"{where}: {name}")
            try:
                config = replaced(base, values)
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
            stop = _end(text, start, tokens, config.train.tokens_per_step, where)
            tokens += (stop - start) * config.train.tokens_per_step
            found.append(Stage(start, stop, config, values))
            start = stop
        return (*found, Stage(start, MAX_STEPS, base))

    def at(self, step: int) -> "Config":
        """Returns the config of the step after `step` steps; without stages, the config itself."""
        return self.stage_at(step).config

    def stage_at(self, step: int) -> Stage:
        """Returns the stage of the step after `step` steps."""
        return next(stage for stage in self.stages if step < stage.stop)

    def of_weights(self, step: int) -> "Config":
        """Returns the config of the last step that changed the weights of step `step`."""
        return self.at(max(step - 1, 0))

    def total(self, per_step: Callable[["Config"], _N], steps: int) -> _N:
        """Adds up a quantity over the first steps of the run.

        Args:
          per_step: returns the quantity of one step, given its config.
          steps: number of steps.
        """
        return sum(
            (min(stage.stop, steps) - stage.start) * per_step(stage.config)
            for stage in self.stages
            if stage.start < steps
        )

    def to_json(self) -> str:
        """Returns the config as indented JSON; `from_json` is the inverse."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def replaced(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns a config in which some fields have other values.

    Args:
      config: the config.
      values: the values, by dotted name.

    Raises:
      UserError: the result is not valid.
    """
    own: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        group, _, inner = name.rpartition(".")
        (groups.setdefault(group, {}) if group else own)[inner] = value
    for group, inner_values in groups.items():
        own[group] = dataclasses.replace(getattr(config, group), **inner_values)
    return dataclasses.replace(config, **own)


def _staged(name: str, where: str) -> tuple[str, type]:
    """Returns the dotted name and the type of a field that a stage sets; short names are unique."""
    full = [one for one in STAGED if name in (one, one.rpartition(".")[2])]
    if not full:
        known = name in field_types() or any(one.endswith(f".{name}") for one in field_types())
        near = difflib.get_close_matches(
            name, [*STAGED, *(n.rpartition(".")[2] for n in STAGED)], 1
        )
        if known:
            why = "cannot change in a run; docs/stages.md lists the fields that can"
        elif near:
            why = f"is not a field; did you mean {near[0]}?"
        else:
            why = "is not a field; docs/stages.md lists the fields of a stage"
        raise UserError(f"{where}: {name} {why}")
    return full[0], field_types()[full[0]]


def _parsed(text: str, kind: type, what: str) -> Any:
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError) as error:
        raise UserError(f"{what} must be of type {kind.__name__}, got {text!r}") from error


def _end(text: StageText, start: int, tokens: int, per_step: int, where: str) -> int:
    """Returns the step at which a stage ends.

    Args:
      text: the stage.
      start: the step at which it begins.
      tokens: tokens before it.
      per_step: tokens in each of its steps.
      where: names the stage in an error.
    """
    stop = start - (tokens - text.until) // per_step if text.in_tokens else text.until
    if stop <= start:
        begins = f"{tokens:,} tokens, step {start:,}" if text.in_tokens else f"step {start:,}"
        raise UserError(
            f"{where} ends before it begins, at {begins}; list the stages in their order, each "
            "with a larger number"
        )
    return stop


@functools.cache
def all_fields() -> dict[str, dataclasses.Field[Any]]:
    """Returns every field by its dotted name, such as `train.steps`."""
    named: dict[str, dataclasses.Field[Any]] = {}
    for group in dataclasses.fields(Config):
        if dataclasses.is_dataclass(group.type):
            named |= {f"{group.name}.{one.name}": one for one in dataclasses.fields(group.type)}
        else:
            named[group.name] = group
    return named


@functools.cache
def field_types() -> dict[str, type]:
    """Returns the type of every field by its dotted name."""
    return {name: cast(type, one.type) for name, one in all_fields().items()}


def default() -> ml_collections.ConfigDict:
    """Returns the LLaMA-7B recipe as a locked ConfigDict; each `configs/*.py` starts from it."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config())).lock()


class UnknownField(UserError):
    """The error for a group or field that `Config` does not have.

    Attributes:
      name: the dotted name, such as `optim.lr`.
    """

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


def require_fields(config: ml_collections.ConfigDict) -> None:
    """Checks that a config has exactly the groups and fields of `Config`; ignores their values.

    Raises:
      UnknownField: a group or field does not exist in `Config`.
      UserError: a group or field is missing.
    """
    _require_names(config.to_dict())


def from_config_dict(config: ml_collections.ConfigDict) -> Config:
    """Converts a ConfigDict to a `Config`, and checks every value.

    Raises:
      UnknownField: a group or field does not exist in `Config`.
      UserError: a group or field is missing, or a value is out of range.
    """
    return _from_dict(config.to_dict())


def from_json(text: bytes | str) -> Config:
    """Reads the output of `Config.to_json`; a field that it lacks gets its default.

    Raises:
      UserError: the text is not such a config.
    """
    values = parse_json(text, "the config")
    defaults = dataclasses.asdict(Config())
    for name, group in defaults.items():
        given = values.setdefault(name, {} if isinstance(group, dict) else group)
        if isinstance(group, dict) and isinstance(given, dict):
            values[name] = {**group, **given}
    return _from_dict(values)


def _require_names(values: dict[str, Any]) -> None:
    known = {one.name: one.type for one in dataclasses.fields(Config)}
    _require_same_names("config groups", "", set(values), set(known))
    for name, group in known.items():
        if dataclasses.is_dataclass(group):
            given, own = values[name], {one.name for one in dataclasses.fields(group)}
            require(isinstance(given, dict), f"config group {name} is not a mapping, but {given!r}")
            _require_same_names(f"fields of config group {name}", f"{name}.", set(given), own)


def _from_dict(values: dict[str, Any]) -> Config:
    _require_names(values)
    built: dict[str, Any] = {}
    for one in dataclasses.fields(Config):
        name, group = one.name, one.type
        if not dataclasses.is_dataclass(group):
            built[name] = check_type(name, values[name], group)
            continue
        types = {inner.name: inner.type for inner in dataclasses.fields(group)}
        fields = {n: check_type(f"{name}.{n}", values[name][n], types[n]) for n in types}
        built[name] = cast(Any, group)(**fields)
    return Config(**built)


def _require_same_names(what: str, prefix: str, given: set[str], known: set[str]) -> None:
    unknown = sorted(map(str, given - known))
    if unknown:
        message = f"unknown {what}: {', '.join(unknown)}"
        raise UnknownField(message, f"{prefix}{unknown[0]}")
    require(given >= known, f"missing {what}: {', '.join(sorted(known - given))}")


def changed_fields(left: Config, right: Config) -> dict[str, tuple[Any, Any]]:
    """Returns the fields in which two configs differ: dotted name -> (left, right value)."""
    pairs = {name: tuple(map(operator.attrgetter(name), (left, right))) for name in all_fields()}
    return {name: (mine, other) for name, (mine, other) in pairs.items() if mine != other}
