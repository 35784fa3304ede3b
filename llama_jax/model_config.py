"""The shape of a LLaMA: its sizes, how many parameters and FLOPs they make, how it computes."""

import dataclasses
import math

from llama_jax.errors import require, require_float32, require_positive, require_types

REMAT_POLICIES = ("none", "full", "dots")
# Tensors inside a block that `remat = "save:..."` may keep; model.py gives them these names.
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
