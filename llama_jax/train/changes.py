"""Decides what may change in a run that goes on, from which step, and records it.

- Fields in `FREE` do not change what is trained: they may always differ.
- Fields in `ACCEPTABLE` change the steps that follow: they may differ if the user accepts it with
  `--accept_changes`, or in a branch. The steps before the change stay what they were: `with_past`
  writes them into `train.stages`, so the saved config describes the whole run.
- All other fields would make it another model.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
from etils import epath

from llama_jax.config import (
    STAGED,
    Config,
    all_fields,
    changed_fields,
    field_types,
    replaced,
)
from llama_jax.errors import UserError, one_line
from llama_jax.files import append_jsonl, read_jsonl
from llama_jax.stages import to_text

# Prefixes of the fields that may always change.
FREE = (
    *("mesh.", "dcn.", "model.attention", "model.remat", "model.scan_unroll", "data.path"),
    *("train.grad_accum", "train.loss_chunk"),
    *("data.tfds_data_dir", "data.workers", "data.part_bytes", "data.shard_tokens"),
    # Where the tokenizer is and how it was made; the checkpoint holds the tokenizer itself.
    *("data.accept_other_data", "data.tokenizer", "data.tokenizer_size"),
    *("train.log_every", "train.eval_every", "train.eval_batches", "train.checkpoint_every"),
    *("train.keep_checkpoints", "train.sample_prompt", "train.profile_steps"),
    *("train.step_timeout", "train.save_timeout"),
    # The handling of faults: a user must be able to change it after a fault.
    *("train.max_skipped", "train.spike_factor", "train.norm_stats"),
    *("train.max_rewinds", "train.rewind_steps"),
    *("train.keep_every", "train.keep_best", "train.max_failed_saves"),
)
# Fields that select the text to train on; they may also change with `ACCEPT_DATA`.
OTHER_DATA = (
    *("data.source", "data.text_field", "data.tfds_split", "data.mixture", "data.packing"),
    "data.separator",
    *("data.validation_fraction", "data.max_document_bytes", "data.template"),
)
ACCEPT_DATA = "--config.data.accept_other_data=True"
# Fields that change the result from the step on at which they change.
_RESULT = tuple(name for name in STAGED if not name.startswith(FREE))
ACCEPTABLE = (*_RESULT, "train.stages", *(n for n in OTHER_DATA if n not in _RESULT))
CHANGES = "changes.jsonl"  # accepted changes: a line for each resume with changes

# The step at which a stage ends, and the values of its fields.
_Piece = tuple[int, dict[str, Any]]
Changes = dict[str, tuple[Any, Any]]  # old and new value of each changed field


def accepted_fields(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the fields that `--accept_changes` names; a group, such as `optim`, is all of its.

    Raises:
      UserError: there is no such field, or it must not change in a run.
    """
    found: list[str] = []
    for name in filter(None, names):
        group = name.removesuffix("*").removesuffix(".")
        fields = [f for f in ACCEPTABLE if f == name or f.startswith(f"{group}.")]
        if not fields:
            near = [f for f in ACCEPTABLE if f.rpartition(".")[2] == name]
            if name in all_fields() and name.startswith(FREE):
                why = "may always change, and needs no flag"
            elif name in all_fields():
                why = "must not change in a run: that would be another run"
            elif near:
                why = f"is not a field; did you mean {near[0]}?"
            else:
                why = f"is not a field; the fields that may change are {', '.join(ACCEPTABLE)}"
            raise UserError(f"--accept_changes: {name} {why}")
        found += fields
    return tuple(dict.fromkeys(found))


def changed_since(saved: Config, now: Config, step: int) -> Changes:
    """Returns the fields whose values differ for the steps that follow.

    Args:
      saved: the config of the run until now.
      now: the config that it shall go on with.
      step: number of steps taken. Stages before it are the past, which does not change.
    """
    changes = changed_fields(saved, now)
    if _pieces(saved, step, _RESULT) == _pieces(now, step, _RESULT):
        changes.pop("train.stages", None)
    if _future(saved, step) == _future(now, step):
        changes = {
            name: values
            for name, values in changes.items()
            if name != "train.stages" and name not in _RESULT
        }
    if now.data.start == "auto" or {saved.data.start, now.data.start} == {"auto", "0"}:
        changes.pop("data.start", None)
    return changes


def _future(config: Config, step: int) -> list[tuple[int, dict[str, Any]]]:
    """Returns the values of `_RESULT` in the steps from `step` on: (first step, values)."""
    found: list[tuple[int, dict[str, Any]]] = []
    for stage in config.stages:
        values = _values(stage.config, _RESULT)
        if stage.stop > step and (not found or found[-1][1] != values):
            found.append((max(stage.start, step), values))
    return found


def _values(config: Config, names: Collection[str]) -> dict[str, Any]:
    groups = {name: name.partition(".") for name in names}
    return {name: getattr(getattr(config, g), inner) for name, (g, _, inner) in groups.items()}


def with_past(saved: Config, now: Config, step: int) -> Config:
    """Returns `now` with the past of a run as its first stages.

    The result describes the whole run: the steps before `step` as they were made, the others as
    `now` has them. A run that starts with it makes the same steps.

    Args:
      saved: the config of the run until now.
      now: the config that it goes on with.
      step: number of steps taken.
    """
    base = replaced(now, {"train.stages": ""})
    kept = _RESULT
    if any(name in OTHER_DATA and name not in _RESULT for name in changed_fields(saved, now)):
        kept = tuple(name for name in _RESULT if name != "data.mixture")  # of other sources
    pieces: list[_Piece] = []
    for stage in saved.stages:
        if stage.start < step:
            values = _difference(stage.config, base, kept)
            if values:  # the config of a stage must be valid: its batch must divide
                values |= _difference(stage.config, base, ("train.grad_accum",))
            pieces.append((min(stage.stop, step), values))
    whole = _merged([*pieces, *_pieces(now, step, STAGED)])
    result = replaced(base, {"train.stages": to_text(whole[:-1])})
    return now if result.stages == now.stages else result


def _pieces(config: Config, step: int, names: Collection[str]) -> list[_Piece]:
    """Returns the stages that end after a step, with those of the fields that they change."""
    base = config.stages[-1].config
    later = [stage for stage in config.stages if stage.stop > step]
    return _merged([(stage.stop, _difference(stage.config, base, names)) for stage in later])


def _merged(pieces: list[_Piece]) -> list[_Piece]:
    """Joins neighbours that set the same values."""
    found: list[_Piece] = []
    for stop, values in pieces:
        if found and found[-1][1] == values:
            found.pop()
        found.append((stop, values))
    return found


def _difference(config: Config, base: Config, names: Collection[str]) -> dict[str, Any]:
    old = _values(base, names)
    return {name: value for name, value in _values(config, names).items() if value != old[name]}


def refused(changes: Changes, config: Config, accept: Collection[str]) -> Changes:
    """Returns the changes that are neither free nor accepted.

    Args:
      changes: the changes.
      config: the config that the run goes on with.
      accept: the fields that the user accepts, see `accepted_fields`.
    """
    others = OTHER_DATA if config.data.accept_other_data else ()
    # With adapters, only the place of the base: the checkpoint has fingerprints of its arrays.
    place = ("init_from",) if config.lora.rank or config.branch_from else ()
    return {
        name: values
        for name, values in changes.items()
        if not name.startswith(FREE) and name not in (*accept, *others, *place)
    }


def listed(changes: Changes) -> str:
    """Returns the changes as one line."""
    shown = {name: [value if value != "" else "''" for value in v] for name, v in changes.items()}
    texts = [f"{name} is {was}, now {now}" for name, (was, now) in shown.items()]
    return one_line("; ".join(texts))  # a text such as train.stages may have several lines


def mend(changes: Changes, otherwise: str) -> str:
    """Returns the advice for refused changes, with the flag that accepts them if there is one.

    Args:
      changes: the refused changes.
      otherwise: the advice without a flag.
    """
    if not all(name in ACCEPTABLE for name in changes):
        fixed = [name for name in changes if name in field_types() and name not in ACCEPTABLE]
        return f"{otherwise}{f' ({fixed[0]} cannot change in a run)' if fixed else ''}"
    if all(name in OTHER_DATA for name in changes) and "data.mixture" not in changes:
        return f"{otherwise}, or accept the other data with {ACCEPT_DATA}"
    return f"{otherwise}, or go on with the new ones: --accept_changes={','.join(changes)}"


def last_change(workdir: epath.Path) -> int:
    """Returns the number of steps before the last recorded change; 0: none is recorded.

    Raises:
      UserError: the record cannot be read.
    """
    path = workdir / CHANGES
    records = read_jsonl(path)[0] if path.exists() else []
    return int(records[-1]["step"]) if records else 0


def record_changes(
    workdir: epath.Path, step: int, changes: Mapping[str, Any], branch_from: str = ""
) -> str:
    """Records in `changes.jsonl` the changes that a run goes on with; a repetition is left out.

    Args:
      workdir: the work directory.
      step: number of steps before the first one with the new values.
      changes: the changes that were allowed.
      branch_from: the saved step that a branch begins with; empty: the run is resumed.

    Returns:
      A line for the log; empty without changes.
    """
    if not changes and not branch_from:
        return ""
    record: dict[str, Any] = {"step": step, "changes": {n: list(v) for n, v in changes.items()}}
    if branch_from:
        record["branch_from"] = branch_from
    path = workdir / CHANGES
    if jax.process_index() == 0:
        known = read_jsonl(path)[0] if path.exists() else []
        if not known or known[-1] != record:
            append_jsonl(path, [record])
    return f"changed from step {step + 1} on: {listed(dict(changes))}" if changes else ""
