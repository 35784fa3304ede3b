"""Which matrices are fine-tuned by adapters of low rank, and how the weights below are kept."""

import dataclasses

from llama_jax.errors import as_float32, require, require_float32, require_types
from llama_jax.model_config import ModelConfig

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
