"""What `generate` and `evaluate` share: a model read from a checkpoint, on a mesh of its own."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from llama_jax.checkpoint import saved_step
from llama_jax.config import NF4_BLOCK, Config, LoraConfig, MeshConfig, ModelConfig
from llama_jax.errors import UserError
from llama_jax.interchange.formats import Source
from llama_jax.interchange.loading import check_base, load_init
from llama_jax.interchange.opening import no_adapters, open_base
from llama_jax.model.llama import LLAMA, Architecture
from llama_jax.model.nf4 import NF4
from llama_jax.model.weights import abstract_frozen, abstract_trained, combined
from llama_jax.parallel.mesh import make_mesh, parse_mesh
from llama_jax.parallel.sharding import param_shardings, with_shardings
from llama_jax.parameters import PARAMETERS, Table, path_of
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.text.tokenizer_config import adds_bos, special_ids, with_base_files


@dataclasses.dataclass(frozen=True)
class InferenceModel:
    """A model to write or to score with.

    Attributes:
      folder: the step that it was read from.
      config: of the run.
      params: on the mesh; matrices in the compute dtype, norms in float32. Of a run with adapters
        these and their base, not merged (`lora.Adapted`).
      tokenizer: of the run.
      mesh: set it with `jax.set_mesh` around all uses.
      context: longest sequence that the weights are for, in tokens.
      files: that came with imported weights, by name: `generation_config.json`, chat templates.
      turn_ends: further tokens that end an answer: of a chat template.
    """

    folder: epath.Path
    config: Config
    params: Any
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    context: int
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    turn_ends: tuple[int, ...] = ()

    @functools.cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: `generation_config.json`'s, or EOS; and those of turns."""
        found = special_ids(self.files, self.config.model.vocab_size)[1]
        found = self.tokenizer.eos_id if found is None else found
        ends = [found] if isinstance(found, int) else found
        return tuple(dict.fromkeys([*ends, *self.turn_ends]))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text as the model is to read it: `Tokenizer.encode_text`."""
        return self.tokenizer.encode_text(text, special=special)


def open_model(
    checkpoint: epath.PathLike | None,
    mesh: str = "",
    base: str = "",
    architecture: Architecture = LLAMA,
) -> InferenceModel:
    """Reads a checkpoint.

    Args:
      checkpoint: a work directory, or the folder of one step.
      mesh: as `mesh.parse_mesh`; empty: as many devices along `tensor` as it divides over.
      base: FORMAT:DIR of the weights below adapters; empty: where they were in training.
      architecture: with which it was trained.

    Raises:
      UserError: there is no checkpoint, none with a tokenizer, or it does not fit the mesh; its
        adapters belong to another base, or it has none but a base is given.
    """
    if checkpoint is None:
        raise UserError("--checkpoint is missing; try --checkpoint=runs/tiny")
    folder = saved_step.find_step(checkpoint)
    meta = saved_step.load_meta(folder, architecture.name)
    if base:
        if not meta.config.lora.rank:
            raise no_adapters(folder)
        config = dataclasses.replace(meta.config, init_from=base)
        meta = dataclasses.replace(meta, config=config)
    # Old checkpoints have Llama 3's own format only there.
    model_bytes = meta.tokenizer_model or meta.tokenizer_files.get("tokenizer.model", b"")
    if not model_bytes:
        reason = (
            "its weights were imported without a tokenizer; put tokenizer.model or tokenizer.json "
            "beside them, and convert them again"
            if meta.data_fingerprint == saved_step.IMPORTED
            else "it was trained on synthetic data"
            if meta.config.data.source == "synthetic"
            else "its run had none"
        )
        raise UserError(f"{folder} has no tokenizer to read text: {reason}")
    tokenizer = Tokenizer(model_bytes, f"the tokenizer of {folder}")
    size = meta.config.model.vocab_size
    if tokenizer.vocab_size > size:  # beyond the embedding, JAX would take its last row
        raise UserError(
            f"the tokenizer of {folder} has {tokenizer.vocab_size} ids, but model.vocab_size is "
            f"{size}: convert the weights again with a tokenizer of {size} ids at most"
        )
    source = open_base(meta.config, folder) if meta.config.lora.rank else None
    files = meta.tokenizer_files
    if source is not None:  # what was not learnt, such as special ids, is the base's
        files = with_base_files(files, source.description.files)
    begins = adds_bos(files, tokenizer, str(folder))
    if begins is not None:
        tokenizer = Tokenizer(model_bytes, f"the tokenizer of {folder}", adds_bos=begins)
    devices = parse_mesh(mesh) if mesh else decoding_mesh(meta.config.model, meta.config.lora)
    with jax.set_mesh(devices):
        shapes = abstract_trained(meta.config, architecture)
        rows = architecture.parameters
        shardings = param_shardings(shapes, devices, rows=rows, any_vocabulary=True)
        params = saved_step.load_params(folder, with_shardings(shapes, shardings))
        base_params = None
        if source is None:
            params = cast_matrices(meta.config.model, params, rows)
        else:
            base_params = _read_base(source, folder, meta, devices)
        params = combined(params, base_params, meta.config, architecture)
    return InferenceModel(folder, meta.config, params, tokenizer, devices, meta.context, files)


def _read_base(
    source: Source, folder: epath.Path, meta: saved_step.StepMeta, mesh: jax.sharding.Mesh
) -> Any:
    """Reads the base that the adapters of a step are for."""
    config = meta.config
    shardings = param_shardings(abstract_frozen(config), mesh, any_vocabulary=True)
    base = load_init(source, config, shardings)
    check_base(meta.base, base, config, folder)
    return cast_matrices(config.model, base)


def cast_matrices(config: ModelConfig, params: Any, rows: Table = PARAMETERS) -> Any:
    """Casts matrices to the dtype that the model computes in, once and not at each token.

    Args:
      config: the model.
      params: its parameters; vectors stay float32.
      rows: the table of the model.
    """

    def cast(keys: tuple[Any, ...], x: Any) -> Any:
        kept = isinstance(x, NF4) or rows[path_of(keys)].is_vector
        return x if kept else x.astype(config.compute_dtype)

    return jax.tree.map_with_path(cast, params, is_leaf=lambda x: isinstance(x, NF4))


def decoding_mesh(config: ModelConfig, lora: LoraConfig | None = None) -> jax.sharding.Mesh:
    """As many devices along `tensor` as heads, ffn and blocks of NF4 divide over."""
    devices = jax.devices()
    tensor = math.gcd(len(devices), config.n_kv_heads, config.ffn_dim)
    if lora is not None and lora.base_dtype == "nf4" and lora.rank:
        inputs = (config.ffn_dim, config.n_heads * config.head_dim)
        tensor = math.gcd(tensor, *(size // NF4_BLOCK for size in inputs))
    return make_mesh(MeshConfig(fsdp=1, tensor=tensor), devices=devices[:tensor])
