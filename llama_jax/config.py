"""Every field of a run, with its meaning and its check; and the `ConfigDict` that sets them.

The groups are frozen dataclasses, in the order in which `Config` has them.

A file in `configs/` starts from `default()`, changes what it must, and returns a locked
`ml_collections.ConfigDict`. `from_config_dict` turns that into the frozen, validated `Config` that
everything else takes: after this boundary a misspelt or ill-typed field cannot exist.
"""

import dataclasses
import functools
import json
import math
import re
from typing import Any, cast

import ml_collections

from llama_jax.errors import (
    UserError,
    as_float32,
    check_type,
    require,
    require_float32,
    require_positive,
    require_types,
)
from llama_jax.files import expand_place, parse_json

REMAT_POLICIES = ("none", "full", "dots")
# Tensors inside a block that `remat = "save:..."` may keep; model/llama.py gives them these names.
REMAT_NAMES = ("block_in", "q", "k", "v", "attn_context", "attn_out", "mlp_gate", "mlp_up")
ATTENTION_BACKENDS = ("auto", "xla", "cudnn", "triton", "splash")
ATTENTION_BACKWARDS = ("auto", "split", "fused")
COMPUTE_DTYPES = ("bfloat16", "float32")
ROPE_SCALINGS = ("llama3", "linear", "dynamic", "yarn")


def _multiple_near(number: int, of: int) -> int:
    """The multiple of twice `of` that is nearest to a number: heads have even sizes."""
    return max(1, round(number / (2 * of))) * 2 * of


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A LLaMA (Touvron et al., 2023, arXiv:2302.13971). The defaults are those of the 7B model."""

    # Rows of embedding and output head. More than the tokenizer has ids are padding, so that the
    # vocabulary divides over mesh.tensor: they are never targets and never drawn.
    vocab_size: int = 32_000
    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 32  # fewer than n_heads: grouped-query attention (arXiv:2305.13245)
    ffn_dim: int = 11_008
    explicit_head_dim: int = 0  # size of one head; 0: dim // n_heads
    rope_theta: float = 10_000.0
    # How RoPE is stretched to long contexts, see rope.py: llama3 | linear | dynamic | yarn.
    rope_scaling: str = "llama3"
    rope_scaling_factor: float = 1.0  # 1: RoPE is not stretched (but by dynamic)
    rope_original_context: int = 8_192  # tokens before that; of llama3, dynamic and yarn
    # llama3: wavelengths over the original context / low are stretched by the factor, those under
    # the original context / high stay.
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    # yarn: pairs that turn less than `slow` times over the original context are stretched by the
    # factor, those that turn more than `fast` times stay.
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_truncate: bool = True  # yarn: its bounds are rounded to whole pairs
    rope_attention_factor: float = 0.0  # yarn: of cos and sin; 0: 0.1 ln(factor) + 1
    norm_eps: float = 1e-6
    sliding_window: int = 0  # attention sees so many tokens back (arXiv:2310.06825); 0: all
    tied_embeddings: bool = False
    compute_dtype: str = "bfloat16"  # weights, norms, softmax and loss stay float32
    attention: str = "auto"  # a backend of attention.py
    # Of the splash kernel on TPUs: tokens of a tile, a multiple of 128 that divides the sequence
    # (0: by its length and the chip), and the kernels of its gradients: auto | split | fused.
    attention_tile: int = 0
    attention_backward: str = "auto"
    # none | full | dots | save:NAME,NAME | offload:NAME,NAME (to the host) | save:NAME;offload:NAME
    remat: str = "none"
    scan_unroll: int = 1  # layers per iteration of the scan; more compile longer, may run faster

    def __post_init__(self) -> None:
        require_types("model", self)
        require_positive(
            "model", self, "vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim"
        )
        require_positive("model", self, "norm_eps", "scan_unroll")
        require(
            bool(self.explicit_head_dim) or self.dim % self.n_heads == 0,
            f"model.dim={self.dim} is not a multiple of model.n_heads={self.n_heads}; set "
            f"--config.model.dim={_multiple_near(self.dim, self.n_heads)}, or a size of the heads "
            "by --config.model.explicit_head_dim",
        )
        require(
            self.n_heads % self.n_kv_heads == 0,
            f"model.n_heads={self.n_heads} is not a multiple of model.n_kv_heads="
            f"{self.n_kv_heads}; set "
            f"--config.model.n_kv_heads={math.gcd(self.n_heads, self.n_kv_heads)}",
        )
        for name in ("sliding_window", "explicit_head_dim"):
            require(getattr(self, name) >= 0, f"model.{name} must not be negative")
        self._check_rope()
        require(
            self.head_dim % 2 == 0,
            f"RoPE needs an even head size, got {self.head_dim}; set "
            f"--config.model.explicit_head_dim={self.head_dim + 1}",
        )
        require(
            self.compute_dtype in COMPUTE_DTYPES,
            f"model.compute_dtype must be one of {COMPUTE_DTYPES}, got {self.compute_dtype!r}",
        )
        require(
            self.attention in ATTENTION_BACKENDS,
            f"model.attention must be one of {ATTENTION_BACKENDS}, got {self.attention!r}",
        )
        require(
            self.attention_tile >= 0 and self.attention_tile % 128 == 0,
            f"model.attention_tile must be a multiple of 128, or 0, got {self.attention_tile}",
        )
        require(
            self.attention_backward in ATTENTION_BACKWARDS,
            f"model.attention_backward must be one of {ATTENTION_BACKWARDS}, got "
            f"{self.attention_backward!r}",
        )
        if ":" not in self.remat:
            require(
                self.remat in REMAT_POLICIES,
                f"model.remat must be one of {REMAT_POLICIES}, save:NAME,... or offload:NAME,..., "
                f"got {self.remat!r}",
            )
        for part in self.remat.split(";") if ":" in self.remat else ():
            action, _, names = part.partition(":")
            require(
                action in ("save", "offload"),
                f"model.remat: {part!r} is neither save:NAME,... nor offload:NAME,...",
            )
            for name in names.split(","):
                require(
                    name in REMAT_NAMES,
                    f"model.remat names an unknown tensor {name!r}; there are "
                    f"{', '.join(REMAT_NAMES)}",
                )
        require_float32("model", self)

    def _check_rope(self) -> None:
        require_positive("model", self, "rope_theta", "rope_original_context")
        require(
            self.rope_scaling in ROPE_SCALINGS,
            f"model.rope_scaling must be one of {ROPE_SCALINGS}, got {self.rope_scaling!r}",
        )
        require(
            self.rope_scaling_factor >= 1,
            f"model.rope_scaling_factor must be 1 (off) or more, got {self.rope_scaling_factor}",
        )
        require(
            self.rope_original_context * self.rope_scaling_factor < 2**31,
            f"model.rope_scaling_factor={self.rope_scaling_factor} stretches "
            f"model.rope_original_context={self.rope_original_context} beyond 2**31 tokens",
        )
        for low, high in (
            ("rope_low_freq_factor", "rope_high_freq_factor"),
            ("rope_beta_slow", "rope_beta_fast"),
        ):
            require(
                0 < getattr(self, low) < getattr(self, high),
                f"model.{low} must be positive and less than {high}, got "
                f"{getattr(self, low)} and {getattr(self, high)}",
            )
        require(
            self.rope_attention_factor >= 0,
            f"model.rope_attention_factor must not be negative, got {self.rope_attention_factor}",
        )
        require(
            self.rope_scaling != "yarn" or self.rope_theta > 1,
            f"model.rope_theta must be greater than 1 for yarn, got {self.rope_theta}",
        )
        require(
            self.rope_scaling != "dynamic" or self.head_dim > 2,
            "dynamic RoPE needs heads of more than 2 numbers",
        )

    @property
    def rope_is_stretched(self) -> bool:
        """Whether RoPE differs from the plain one; a factor of 1 switches llama3 and linear off."""
        return self.rope_scaling_factor != 1 or self.rope_scaling in ("dynamic", "yarn")

    @property
    def rope_amplitude(self) -> float:
        """Factor of cos and sin; only yarn has one, which sharpens attention by its square."""
        if self.rope_scaling != "yarn":
            return 1.0
        return self.rope_attention_factor or 0.1 * math.log(self.rope_scaling_factor) + 1.0

    @property
    def stretched_context(self) -> int:
        """Tokens that RoPE is stretched to: the original context times the factor."""
        return int(self.rope_original_context * self.rope_scaling_factor)

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.explicit_head_dim or self.dim // self.n_heads

    def remat_names(self, action: str) -> tuple[str, ...]:
        """Tensors that `remat` keeps from the forward pass: `save` on the device, or `offload`."""
        parts = dict(part.split(":") for part in self.remat.split(";") if ":" in part)
        return tuple(parts[action].split(",")) if action in parts else ()


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 (one axis at most) takes what is left."""

    data: int = 1  # replicas of the weights
    fsdp: int = -1  # shards of the weights, gathered layer by layer (ZeRO-3)
    context: int = 1  # shards of the sequence
    tensor: int = 1  # shards of heads, ffn and vocabulary (Megatron)

    def __post_init__(self) -> None:
        require_types("mesh", self)
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(size == -1 or size > 0, f"mesh axis {name} must be positive or -1, got {size}")
        rest = [f"{name}=-1" for name, size in sizes.items() if size == -1]
        require(
            len(rest) <= 1,
            f"only one mesh axis may be -1, got {', '.join(rest)}; give the other ones a number, "
            f"such as {rest[-1][:-2] if rest else ''}1",
        )


@dataclasses.dataclass(frozen=True)
class DcnConfig(MeshConfig):
    """Slices (or hosts) along each mesh axis, over the slower data-centre network."""

    fsdp: int = 1


PACKINGS = ("concat", "best_fit")
MOST_WORKERS = 4096  # each is a process


def _expand(config: Any, field: str, name: str) -> None:
    """Puts the home folder in the place of a first `~` in a field of a config that is made."""
    value = getattr(config, field)
    try:
        expanded = expand_place(value)
    except UserError as error:
        raise UserError(f"{name}={value}: {error}") from error
    object.__setattr__(config, field, expanded)  # the dataclass is frozen


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where tokens come from.

    `source` is `stdlib` (Python's own library, on every machine), `synthetic` (random tokens, for
    benchmarks), `tfds:NAME`, or a comma-separated list of files, folders and globs. What a file is,
    its first bytes decide: JSON lines or a JSON list with a text field, Parquet, or plain text; all
    but Parquet also compressed (gzip, zstandard, xz, bzip2). Several sources have names:
    `web=web/*.jsonl.zst; books=books/*.txt`. With a `template`, files are JSON lines or JSON lists
    of instructions or conversations, see docs/finetuning.md.
    """

    source: str = "stdlib"
    path: str = ""  # folder of prepared shards; empty: WORKDIR/data
    # SentencePiece .model, tokenizer.json, or a folder of Hugging Face; empty: train one on the
    # source. It may have fewer ids than model.vocab_size, never more.
    tokenizer: str = ""
    tokenizer_size: int = 0  # ids of a tokenizer that is trained; 0: model.vocab_size
    # Of a JSON record, a Parquet table or a TFDS example; meta.text is field text within meta.
    text_field: str = "text"
    # Where plain-text files are cut into documents, such as <|endoftext|>, in which \n and \t stand
    # for a line end and a tab. Empty: a file is a document, and one of more than
    # max_document_bytes is cut at blank lines, about every 100,000 bytes.
    separator: str = ""
    # Instruction data instead of text, written as alpaca, vicuna, llama2 or llama3 have it, or as a
    # FILE.jinja or tokenizer_config.json says; the loss is that of the answers.
    template: str = ""
    tfds_split: str = "train"
    tfds_data_dir: str = ""  # where TFDS datasets are; empty: TFDS's own default
    # Shares of the tokens that count in the loss: web=0.7,books=0.3, web=70%,books=30%, weights
    # such as web=3,books=2,code=1, or llama; empty: by size.
    mixture: str = ""
    packing: str = "concat"  # LLaMA's; or best_fit: whole documents, that see only themselves
    streaming: bool = False  # tokenise while training, without shards
    accept_other_data: bool = False  # go on although the checkpoint was trained on other data
    # Of the documents, chosen by their contents; of the tokens, where that is no document, or all.
    validation_fraction: float = 0.01
    shard_tokens: int = 100_000_000  # tokens per shard
    part_bytes: int = 64_000_000  # of the source, that one worker takes at a time
    workers: int = 0  # processes that tokenise; 0: one per core
    # Longer documents are skipped and counted; longer plain-text files are cut (see separator).
    max_document_bytes: int = 10_000_000

    def __post_init__(self) -> None:
        require_types("data", self, wide=("shard_tokens", "part_bytes"))
        for name in ("path", "tokenizer", "template", "tfds_data_dir"):
            _expand(self, name, f"data.{name}")
        require(bool(self.source), "data.source is empty; try stdlib or a path")
        require(bool(self.text_field), "data.text_field is empty")
        require_positive("data", self, "shard_tokens", "max_document_bytes", "part_bytes")
        for name in ("workers", "tokenizer_size"):
            require(getattr(self, name) >= 0, f"data.{name} must not be negative")
        require(
            self.workers <= MOST_WORKERS,
            f"data.workers must be at most {MOST_WORKERS}, got {self.workers}",
        )
        require(
            self.packing in PACKINGS,
            f"data.packing must be one of {PACKINGS}, got {self.packing!r}",
        )
        require(
            not self.streaming or (self.packing == "concat" and not self.mixture),
            "data.streaming goes with data.packing=concat and without data.mixture",
        )
        require(
            not self.template or (self.packing == "best_fit" and self.source != "synthetic"),
            "data.template needs data.packing=best_fit, so that conversations stay whole, and "
            f"files to read; got data.packing={self.packing}, data.source={self.source}",
        )
        require(
            0 <= self.validation_fraction < 1,
            f"data.validation_fraction must be in [0, 1), got {self.validation_fraction}",
        )
        require_float32("data", self)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up and cosine decay, as in the LLaMA paper, section 2.3."""

    peak_lr: float = 3e-4
    final_lr_fraction: float = 0.1  # of the peak, at the last step
    warmup_steps: int = 2_000
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # global norm of the gradient
    moment_dtype: str = "float32"  # of the first moment; the second stays float32

    def __post_init__(self) -> None:
        require_types("optim", self)
        require_positive("optim", self, "peak_lr", "eps", "clip_norm")
        require(
            0 <= self.final_lr_fraction <= 1,
            f"optim.final_lr_fraction must be in [0, 1], got {self.final_lr_fraction}",
        )
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            # AdamW divides by 1 - beta**step.
            require(
                value >= 0 and as_float32(value) < 1,
                f"optim.{name} must be in [0, 1) in float32, got {value}",
            )
        require(self.warmup_steps >= 0, "optim.warmup_steps must not be negative")
        require(self.weight_decay >= 0, "optim.weight_decay must not be negative")
        require(
            self.moment_dtype in COMPUTE_DTYPES,
            f"optim.moment_dtype must be one of {COMPUTE_DTYPES}, got {self.moment_dtype!r}",
        )
        require_float32("optim", self)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop. Steps are optimiser steps; batches are counted in sequences."""

    steps: int = 250_000
    seq_len: int = 2048
    global_batch: int = 2048  # sequences per optimiser step, over all hosts: 4M tokens
    grad_accum: int = 1  # microbatches per optimiser step
    loss_chunk: int = 512  # positions whose logits exist at once
    z_loss: float = 0.0  # weight of log(Z)^2 (PaLM uses 1e-4)
    seed: int = 0
    log_every: int = 10
    eval_every: int = 1_000
    eval_batches: int = 20
    checkpoint_every: int = 1_000
    keep_checkpoints: int = 3  # the newest
    keep_every: int = 0  # also those at multiples of so many steps; 0: none
    keep_best: int = 0  # also so many with the lowest validation loss
    max_failed_saves: int = 3  # in a row, that a run survives
    save_timeout: int = 1_800  # seconds after which a save is told to be slow; 0: never
    sample_prompt: str = ""  # if set, a continuation of it is printed after training
    step_timeout: int = 1_800  # seconds without a step after which a process ends itself; 0: never
    max_skipped: int = 10  # updates skipped in a row, after which the run stops
    # Deviations of loss or gradient norm above their medians that skip an update; 0: none does.
    spike_factor: float = 0.0
    max_rewinds: int = 0  # times that a run goes back to a checkpoint before it stops so; 0: none
    rewind_steps: int = 100  # that lie at least between that checkpoint and the first skipped step
    norm_stats: bool = False  # log norms of gradients and updates by group of weights
    profile_steps: str = ""  # first,last step that is traced for TensorBoard; empty: none

    def __post_init__(self) -> None:
        require_types("train", self, wide=("seed",))
        require_positive("train", self, "steps", "seq_len", "global_batch", "grad_accum")
        require_positive("train", self, "loss_chunk", "log_every", "eval_every", "eval_batches")
        require_positive("train", self, "checkpoint_every", "keep_checkpoints")
        require_positive("train", self, "max_skipped", "rewind_steps")
        require(
            self.spike_factor == 0 or self.spike_factor >= 1,
            f"train.spike_factor must be 0 (off) or at least 1, got {self.spike_factor}",
        )
        names = ("keep_every", "keep_best", "max_failed_saves", "max_rewinds")
        for name in (*names, "step_timeout", "save_timeout"):
            require(getattr(self, name) >= 0, f"train.{name} must not be negative")
        require(self.z_loss >= 0, "train.z_loss must not be negative")
        require(0 <= self.seed < 2**32, "train.seed must be in [0, 2**32)")
        require(
            self.global_batch % self.grad_accum == 0,
            f"train.global_batch={self.global_batch} is not a multiple of "
            f"train.grad_accum={self.grad_accum}; set --config.train.grad_accum="
            f"{math.gcd(self.global_batch, self.grad_accum)}, or a multiple of it as "
            "train.global_batch",
        )
        require_float32("train", self)
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
            f"{min(2, self.steps)},{min(5, self.steps)}, or nothing to trace none",
        )

    @property
    def profile_window(self) -> range:
        """Steps that are traced, numbered from 1 as in the log."""
        if not self.profile_steps:
            return range(0)
        first, last = map(int, self.profile_steps.split(","))
        return range(first, last + 1)

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimiser step, over all hosts."""
        return self.global_batch * self.seq_len


# The matrices of a layer, by the module that has them.
MATRICES = {
    **dict.fromkeys(("wq", "wk", "wv", "wo"), "attn"),
    **dict.fromkeys(("w1", "w2", "w3"), "mlp"),
}
BASE_DTYPES = ("float32", "bfloat16", "nf4")
NF4_BLOCK = 64  # inputs that share a scale
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # of a weight, with its shares of both scales, see nf4.py


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """LoRA (arXiv:2106.09685), and QLoRA (arXiv:2305.14314) where the base is in NF4."""

    rank: int = 0  # of the adapters; 0: none, all weights are trained
    alpha: float = 16.0  # an adapter's product counts alpha / rank
    dropout: float = 0.0  # of what enters an adapter
    targets: str = "wq,wk,wv,wo,w1,w2,w3"  # the matrices that have one
    base_dtype: str = "bfloat16"  # of the frozen matrices: float32 | bfloat16 | nf4

    def __post_init__(self) -> None:
        require_types("lora", self)
        require(self.rank >= 0, f"lora.rank must not be negative, got {self.rank}")
        require(self.alpha > 0, f"lora.alpha must be positive, got {self.alpha}")
        good = self.dropout >= 0 and as_float32(self.dropout) < 1
        require(good, f"lora.dropout must be in [0, 1), got {self.dropout}")
        require(
            self.base_dtype in BASE_DTYPES,
            f"lora.base_dtype must be one of {BASE_DTYPES}, got {self.base_dtype!r}",
        )
        names = self.names
        require(
            set(names) <= set(MATRICES) and len(set(names)) == len(names),
            f"lora.targets must be some of {','.join(MATRICES)}, each once, got {self.targets!r}",
        )
        require_float32("lora", self)

    @property
    def names(self) -> tuple[str, ...]:
        """The matrices that have an adapter."""
        return tuple(name.strip() for name in self.targets.split(","))

    @property
    def scale(self) -> float:
        """What the product of an adapter counts."""
        return self.alpha / self.rank

    def check(self, model: ModelConfig, init_from: str) -> None:
        """Checks what depends on the rest of a config.

        Raises:
          UserError: adapters have no base, or its matrices cannot be cut into blocks; fields are
            set, but there are no adapters.
        """
        if not self.rank:
            names = (f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
            name = next(names, "")
            require(
                not name,
                f"lora.{name} is of adapters, and lora.rank is 0: "
                "all weights would be trained; try --config.lora.rank=16",
            )
            return
        require(
            bool(init_from),
            "lora.rank needs weights to adapt; try --config.init_from=hf:DIR",
        )
        if self.base_dtype != "nf4":
            return
        inputs = {
            "model.dim": model.dim,
            "model.ffn_dim": model.ffn_dim,
            "the heads together": model.n_heads * model.head_dim,
        }
        for name, size in inputs.items():
            require(
                size % NF4_BLOCK == 0,
                f"lora.base_dtype=nf4 has blocks of {NF4_BLOCK} inputs: {name} = {size} is no "
                "multiple of it",
            )


INIT_FORMATS = ("hf", "meta", "ckpt")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that defines a run; saved as `config.json` and inside each checkpoint."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    dcn: DcnConfig = dataclasses.field(default_factory=DcnConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    # Weights to begin with: hf:DIR, meta:DIR or ckpt:DIR, as of `convert`; empty: random ones.
    init_from: str = ""

    def __post_init__(self) -> None:
        check_type("init_from", self.init_from, str)
        _expand(self, "init_from", "init_from")
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

    def to_json(self) -> str:
        """The config as indented JSON; `from_json` is the inverse."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


@functools.cache
def field_types() -> dict[str, type]:
    """The type of every field by its dotted name, such as `train.steps`."""
    found: dict[str, type] = {}
    for group in dataclasses.fields(Config):
        if dataclasses.is_dataclass(group.type):
            inner = dataclasses.fields(cast(Any, group.type))
            found |= {f"{group.name}.{field.name}": cast(type, field.type) for field in inner}
        else:
            found[group.name] = cast(type, group.type)
    return found


def default() -> ml_collections.ConfigDict:
    """The LLaMA-7B recipe as a locked ConfigDict, the starting point of every `configs/*.py`."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config())).lock()


class UnknownField(UserError):
    """A group or field that `Config` does not have.

    Attributes:
      name: its dotted name, such as `optim.lr`.
    """

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


def require_fields(config: ml_collections.ConfigDict) -> None:
    """Checks that a config has the groups and fields of `Config`, whatever their values.

    Raises:
      UserError: one is unknown or missing.
    """
    _require_names(config.to_dict())


def from_config_dict(config: ml_collections.ConfigDict) -> Config:
    """Converts and validates what a config file and the command line gave.

    Raises:
      UserError: an unknown group or field, a missing group, or a value out of range.
    """
    return _from_dict(config.to_dict())


def from_json(text: bytes | str) -> Config:
    """Reads what `Config.to_json` wrote; what an older version had no field for has its default.

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
    known = {field.name: field.type for field in dataclasses.fields(Config)}
    _require_same_names("config groups", "", set(values), set(known))
    for name, group in known.items():
        if dataclasses.is_dataclass(group):
            given, own = values[name], {field.name for field in dataclasses.fields(group)}
            require(isinstance(given, dict), f"config group {name} is not a mapping, but {given!r}")
            _require_same_names(f"fields of config group {name}", f"{name}.", set(given), own)


def _from_dict(values: dict[str, Any]) -> Config:
    _require_names(values)
    built: dict[str, Any] = {}
    for field in dataclasses.fields(Config):
        name, group = field.name, field.type
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
    """Fields in which two configs differ: dotted name -> (left value, right value)."""
    found = {}
    for group, values in dataclasses.asdict(left).items():
        others = getattr(right, group)
        if not isinstance(values, dict):
            if values != others:
                found[group] = (values, others)
            continue
        for name, value in values.items():
            other = getattr(others, name)
            if value != other:
                found[f"{group}.{name}"] = (value, other)
    return found
