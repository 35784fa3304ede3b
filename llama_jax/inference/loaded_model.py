"""A model that is read from a checkpoint onto its own mesh, for `generate` and `evaluate`."""

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
    """A model for generation or scoring.

    Attributes:
      folder: folder of the step that the model was read from.
      config: config of the run.
      params: parameters on the mesh; matrices in the compute dtype, norms in float32. For a run
        with adapters, these and their base, not merged (`lora.Adapted`).
      tokenizer: tokenizer of the run.
      mesh: the devices; use the model inside `jax.set_mesh(mesh)`.
      context: longest sequence that the model supports, in tokens.
      files: contents of the files that came with imported weights, such as
        `generation_config.json` and chat templates, by name.
      turn_ends: tokens of a chat template that end an answer as well.
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
        """Tokens that end an answer: those of `generation_config.json` or EOS, and turn ends."""
        found = special_ids(self.files, self.config.model.vocab_size)[1]
        found = self.tokenizer.eos_id if found is None else found
        ends = [found] if isinstance(found, int) else found
        return tuple(dict.fromkeys([*ends, *self.turn_ends]))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Converts a text to the token ids that the model reads; see `Tokenizer.encode_text`."""
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
      mesh: the devices, see `mesh.parse_mesh`; empty: see `decoding_mesh`.
      base: FORMAT:DIR of the base of the adapters; empty: the place that training read it from.
      architecture: the architecture that it was trained with.

    Raises:
      UserError: there is no checkpoint, it has no tokenizer, it does not fit the mesh, its adapters
        belong to another base, or `base` is given but the checkpoint has no adapters.
    """
    if checkpoint is None:
        raise UserError("--checkpoint is missing; try --checkpoint=runs/tiny")
    folder = saved_step.find_step(checkpoint)
    meta = saved_step.load_meta(folder, architecture.name)
    if base:
        if not meta.of_weights.lora.rank:
            raise no_adapters(folder)
        config = dataclasses.replace(meta.config, init_from=base)
        meta = dataclasses.replace(meta, config=config)
    # In old checkpoints, a tokenizer in Llama 3's own format is only among the files.
    model_bytes = meta.tokenizer_model or meta.tokenizer_files.get("tokenizer.model", b"")
    if not model_bytes:
        reason = (
            "its weights were imported without a tokenizer; put tokenizer.model or tokenizer.json "
            "next to them, and convert them again"
            if meta.data_fingerprint == saved_step.IMPORTED
            else "it was trained on synthetic data"
            if meta.of_weights.data.source == "synthetic"
            else "its run had no tokenizer"
        )
        raise UserError(f"{folder} has no tokenizer to read text: {reason}")
    tokenizer = Tokenizer(model_bytes, f"the tokenizer of {folder}")
    size = meta.of_weights.model.vocab_size
    if tokenizer.vocab_size > size:  # for a larger id, JAX would use the last row of the embedding
        raise UserError(
            f"the tokenizer of {folder} has {tokenizer.vocab_size} ids, but model.vocab_size is "
            f"{size}: convert the weights again with a tokenizer of {size} ids at most"
        )
    source = open_base(meta.of_weights, folder) if meta.of_weights.lora.rank else None
    files = meta.tokenizer_files
    if source is not None:  # settings that training does not change, such as special ids
        files = with_base_files(files, source.description.files)
    begins = adds_bos(files, tokenizer, str(folder))
    if begins is not None:
        tokenizer = Tokenizer(model_bytes, f"the tokenizer of {folder}", adds_bos=begins)
    devices = (
        parse_mesh(mesh) if mesh else decoding_mesh(meta.of_weights.model, meta.of_weights.lora)
    )
    with jax.set_mesh(devices):
        shapes = abstract_trained(meta.of_weights, architecture)
        rows = architecture.parameters
        shardings = param_shardings(shapes, devices, rows=rows, any_vocabulary=True)
        params = saved_step.load_params(folder, with_shardings(shapes, shardings))
        base_params = None
        if source is None:
            params = cast_matrices(meta.of_weights.model, params, rows)
        else:
            base_params = _read_base(source, folder, meta, devices)
        params = combined(params, base_params, meta.of_weights, architecture)
    return InferenceModel(folder, meta.of_weights, params, tokenizer, devices, meta.context, files)


def _read_base(
    source: Source, folder: epath.Path, meta: saved_step.StepMeta, mesh: jax.sharding.Mesh
) -> Any:
    """Reads the base that the adapters of a step are for."""
    config = meta.of_weights
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
    """Makes a mesh of the most devices along `tensor` that divide heads, ffn and NF4 blocks."""
    devices = jax.devices()
    tensor = math.gcd(len(devices), config.n_kv_heads, config.ffn_dim)
    if lora is not None and lora.base_dtype == "nf4" and lora.rank:
        inputs = (config.ffn_dim, config.n_heads * config.head_dim)
        tensor = math.gcd(tensor, *(size // NF4_BLOCK for size in inputs))
    return make_mesh(MeshConfig(fsdp=1, tensor=tensor), devices=devices[:tensor])
