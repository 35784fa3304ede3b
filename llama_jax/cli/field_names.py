"""Suggestions for a misspelt name of a config field: "did you mean ...?"."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping

from llama_jax.config import field_types

# Least similarity (see `difflib`) of two names: within a group, and among all fields.
ALIKE, _MUCH_ALIKE = 0.6, 0.75

# Names of fields in other programs. `~` after a name: its values have another unit.
FIELD_ALIASES = {
    "model.dim": "hidden_size d_model n_embd embed_dim emb_dim width",
    "model.n_layers": "num_layers num_hidden_layers n_layer layers depth",
    "model.n_heads": "num_heads num_attention_heads n_head heads",
    "model.n_kv_heads": "num_kv_heads num_key_value_heads kv_heads n_kv_head num_query_groups",
    "model.ffn_dim": "intermediate_size d_ff ffn_hidden_size hidden_dim mlp_dim",
    "model.explicit_head_dim": "head_dim head_size",
    "model.vocab_size": "vocab n_vocab vocabulary vocabulary_size",
    "model.norm_eps": "rms_norm_eps layer_norm_eps rmsnorm_eps",
    "model.rope_theta": "theta rope_base rope_freq_base",
    "model.tied_embeddings": "tie_word_embeddings tie_embeddings weight_tying",
    "model.compute_dtype": "dtype precision mixed_precision bf16~ fp16~",
    "model.attention": "attn attn_implementation attention_backend flash_attention~ flash_attn~",
    "model.remat": "gradient_checkpointing~ activation_checkpointing~ remat_policy",
    "model.sliding_window": "window window_size attention_window",
    "mesh.data": "dp data_parallel ddp",
    "mesh.fsdp": "zero zero3 sharded_data_parallel",
    "mesh.context": "cp sp context_parallel sequence_parallel",
    "mesh.tensor": "tp mp tensor_parallel model_parallel tensor_model_parallel_size",
    "data.source": "data dataset dataset_name train_file train_files data_files train_data corpus",
    "data.path": "dir folder data_dir shards dataset_path data_path",
    "data.tokenizer": "tokenizer_path tokenizer_name tokenizer_file vocab_file tokenizer_model",
    "data.validation_fraction": "val_fraction validation_split val_split eval_fraction",
    "data.workers": "num_workers num_proc n_workers dataloader_num_workers",
    "data.template": "chat_template prompt_template",
    "data.packing": "pack",
    "data.mixture": "weights mix blend data_mix",
    "optim.peak_lr": "lr learning_rate max_lr base_lr peak_learning_rate max_learning_rate",
    "optim.final_lr_fraction": "min_lr~ min_lr_ratio final_lr~ end_lr~ lr_min~",
    "optim.warmup_steps": "warmup num_warmup_steps warmup_iters warmup_ratio~ lr_warmup_steps",
    "optim.schedule": "scheduler lr_scheduler lr_scheduler_type lr_schedule scheduler_type "
    "schedule_type lr_decay_style",
    "optim.decay_steps": "cooldown cooldown_steps num_decay_steps lr_decay_steps "
    "lr_wsd_decay_iters cooldown_fraction~ decay_fraction~ decay_ratio~",
    "optim.decay_shape": "decay_type cooldown_type cooldown_shape lr_wsd_decay_style",
    "optim.beta1": "b1 adam_beta1 momentum betas~",
    "optim.beta2": "b2 adam_beta2",
    "optim.eps": "epsilon adam_eps adam_epsilon",
    "optim.weight_decay": "wd decay l2 adam_weight_decay",
    "optim.clip_norm": "clip grad_clip max_grad_norm gradient_clipping clip_grad_norm max_norm "
    "gradient_clip_val gradient_clip_norm clip_grad",
    "train.steps": "max_steps num_steps n_steps total_steps train_steps num_train_steps iters "
    "max_iters train_iters iterations num_iterations max_train_steps epochs~ "
    "num_epochs~ num_train_epochs~ tokens~ max_tokens~",
    "train.stages": "stage curriculum phases batch_size_schedule rampup_batch_size~ batch_ramp~",
    "branch_from": "resume_from_checkpoint fork_from branch",
    "train.seq_len": "context_length ctx ctx_len n_ctx context_len block_size sequence_length "
    "max_seq_len max_seq_length seq_length max_length max_position_embeddings context_size",
    "train.global_batch": "batch_size batch bs global_batch_size train_batch_size "
    "total_batch_size per_device_train_batch_size~ per_device_batch_size~",
    "train.grad_accum": "gradient_accumulation_steps grad_accum_steps accumulation_steps "
    "gradient_accumulation accumulate_grad_batches microbatches accum micro_batch_size~",
    "train.seed": "random_seed rng_seed",
    "train.log_every": "logging_steps log_interval log_freq log_steps print_every",
    "train.eval_every": "eval_steps eval_interval eval_freq val_every validate_every val_interval",
    "train.eval_batches": "eval_iters val_steps val_batches",
    "train.checkpoint_every": "save_steps save_every save_interval save_freq ckpt_every "
    "checkpoint_interval checkpoint_steps checkpoint_freq",
    "train.keep_checkpoints": "save_total_limit max_to_keep keep keep_last",
    "lora.rank": "r lora_r lora_rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.targets": "target_modules lora_target_modules lora_targets",
    "lora.base_dtype": "load_in_4bit~ quantization~ qlora~ bits~",
    "init_from": "model pretrained model_name_or_path load_from resume_from base_model",
}
# Names of groups of fields in other programs.
GROUP_ALIASES = {
    "optim": "optimizer optimiser opt adamw adam schedule",
    "train": "training trainer loop run",
    "data": "dataset datasets dataloader input",
    "model": "llama network arch architecture transformer",
    "mesh": "parallel parallelism sharding distributed",
    "lora": "peft adapter adapters qlora",
}
_ALIASES = FIELD_ALIASES | GROUP_ALIASES


def unknown_field(name: str, prefix: str) -> str:
    """Says which field the user may mean by a dotted name that does not exist.

    Args:
      name: the dotted name, such as `optim.lr`.
      prefix: the text before a dotted name where the user writes it, such as `--config.`.
    """
    fields = field_types()
    while name.startswith("config."):
        name = name.removeprefix("config.")
    if name in fields:
        return f"there is no {prefix}config.{name}; did you mean {prefix}{name}?"
    groups = list(dict.fromkeys(field.partition(".")[0] for field in fields if "." in field))
    group, _, field = name.partition(".")
    own = [one.partition(".")[2] for one in fields if one.startswith(f"{group}.")]
    if name.rstrip(".") in groups:
        return (
            f"{group} is a group of fields; set one of them with {prefix}{group}.FIELD: "
            f"{', '.join(own)}"
        )
    for whole in fields:
        if name.startswith(f"{whole}."):
            return f"{whole} is a field, not a group; did you mean {prefix}{whole}?"
    if group in groups:
        begin = f"{group} has no field {field}"
        inside = [f"{group}.{one}" for one in own]
        exact = same_names(field, own)
        if not exact:
            aliased = [one for one in inside if plain(field) in other_names(_ALIASES, one)]
            exact = [one.partition(".")[2] for one in aliased]
        if exact:
            return f"{begin}; did you mean {either(exact)}?"
        rest = [one for one in fields if one not in inside]
        last = field.rpartition(".")[2]
        if found := _exactly(last, rest):
            return f"{begin}; did you mean {either(prefix + one for one in found)}?"
        if found := alike_names(field, own, ALIKE):
            return f"{begin}; did you mean {either(found)}?"
        if found := fields_named(last, rest):
            return f"{begin}; did you mean {either(prefix + one for one in found)}?"
        return f"{begin}; it has {', '.join(own)}"
    similar = _groups_like(group, groups)
    kind = "group" if field or similar else "field"
    begin = f"the config has no {kind} {group or repr(group)}"
    found = fields_spelt(name, fields) or _in_groups(similar, field, fields)
    found = found or fields_named(field or name, fields)
    if found:
        return f"{begin}; did you mean {either(prefix + one for one in found)}?"
    if similar:
        return f"{begin}; did you mean {either(prefix + one for one in similar)}?"
    alone = [one for one in fields if "." not in one]
    return f"{begin}; its groups are {', '.join(groups)}, and {' and '.join(alone)} are in no group"


def _in_groups(groups: list[str], field: str, fields: Collection[str]) -> list[str]:
    """Finds the fields of these groups that a misspelt one may mean."""
    found = []
    for name in groups:
        own = [one for one in fields if one.startswith(f"{name}.")]
        inner = {one.partition(".")[2]: one for one in own}
        matches = [inner[one] for one in same_names(field, inner)]
        matches = matches or [one for one in own if plain(field) in other_names(_ALIASES, one)]
        found += matches or [inner[one] for one in alike_names(field, inner, ALIKE)]
    return found[:2] if field else []


def _groups_like(group: str, groups: list[str]) -> list[str]:
    """Finds the groups that a misspelt one may mean."""
    named = [name for name in groups if plain(group) in other_names(_ALIASES, name)]
    return same_names(group, groups) or named or alike_names(group, groups, ALIKE)


def fields_named(name: str, fields: Collection[str]) -> list[str]:
    """Finds the fields of any group that a name without its group may mean."""
    if found := _exactly(name, fields):
        return found
    last: dict[str, str] = {}
    for field in fields:
        last.setdefault(field.rpartition(".")[2], field)
    return [last[one] for one in alike_names(name, last, _MUCH_ALIKE)]


def _exactly(name: str, fields: Collection[str]) -> list[str]:
    """Finds the fields with this name; if there are none, those so named in other programs."""
    groups = {field.partition(".")[0] for field in fields if "." in field}
    same = [field for field in fields if plain(field.rpartition(".")[2]) == plain(name)]
    if same and name not in groups:
        # The groups dcn and mesh have the same fields; people set those of mesh.
        return [field for field in same if not field.startswith("dcn.")] or same
    return [field for field in fields if plain(name) in other_names(_ALIASES, field)]


def fields_spelt(name: str, fields: Collection[str], prefix: str = "") -> list[str]:
    """Finds the fields whose dotted names differ from `name` at most in case and punctuation.

    Args:
      name: a dotted name.
      fields: dotted names of fields.
      prefix: characters at the beginning of `name` that the names of the fields lack.
    """

    def letters(text: str) -> str:
        return re.sub("[^a-z0-9]", "", text.lower())

    return [field for field in fields if letters(name) == prefix + letters(field)]


def same_names(name: str, known: Iterable[str]) -> list[str]:
    """Finds the known names that differ from this one only in case, `_` and `-`."""
    return [one for one in known if plain(one) == plain(name)]


def alike_names(name: str, known: Iterable[str], cutoff: float) -> list[str]:
    """Finds the known name that is most similar to this one, or two if they tie.

    Args:
      name: a misspelt name.
      known: the names that exist.
      cutoff: the least similarity, from 0 to 1; see `difflib.get_close_matches`.
    """
    names, name = list(known), name.lower().replace("-", "_")
    found = difflib.get_close_matches(name, names, 2, cutoff)
    if len(found) > 1:
        best, next_best = (difflib.SequenceMatcher(None, one, name).ratio() for one in found)
        found = sorted(found) if best == next_best else found[:1]
    if not found and len(name) > 2:  # part of a name
        found = [one for one in names if one.startswith(name) or f"_{name}" in one][:2]
    return found


def other_names(table: Mapping[str, str], key: str) -> list[str]:
    """Returns the other names of a field, group or flag in a table, as `plain` writes them."""
    return [plain(word) for word in table.get(key, "").split()]


def plain(name: str) -> str:
    """Removes from a name what people write in different ways: case, `_` and `-`."""
    return re.sub("[-_~]", "", name.lower())


def either(names: Iterable[str]) -> str:
    """Joins names by `or`."""
    return " or ".join(names)
