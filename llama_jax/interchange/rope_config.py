"""Reads and writes RoPE in Hugging Face's `config.json`, by the rules of transformers 5.

Version 5 has `rope_parameters`; version 4 has `rope_theta` and `rope_scaling`.
"""

import math
from typing import Any

from llama_jax.config import ModelConfig
from llama_jax.errors import UserError
from llama_jax.interchange.fields import Fields, short

_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_ORIGINAL = "original_max_position_embeddings"
# Fields of each kind; other fields raise an error.
_FIELDS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"},
    "yarn": {
        *("factor", _ORIGINAL, "beta_fast", "beta_slow", "truncate"),
        *("attention_factor", "mscale", "mscale_all_dim"),
    },
}
# Our field -> name of the field in config.json, if the names differ.
NAMES = {
    "rope_scaling_factor": "the factor of RoPE",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_context": _ORIGINAL,
    "rope_beta_fast": "beta_fast",
    "rope_beta_slow": "beta_slow",
    "rope_attention_factor": "attention_factor",
}


def read(fields: Fields, context: int) -> dict[str, Any]:
    """Returns our fields of RoPE.

    Args:
      fields: fields of config.json.
      context: its max_position_embeddings, in tokens.

    Raises:
      UserError: the kind is unknown, or a field is missing, unknown, or has a wrong value.
    """
    rope, theta = _parameters(fields)
    kind = _kind(rope)
    found: dict[str, Any] = {"rope_theta": theta}
    plain: dict[str, tuple[Any, ...]] = {"factor": (1, 1.0), "finetuned": (True, False)}
    if kind in ("linear", "dynamic"):  # they use max_position_embeddings instead
        plain[_ORIGINAL] = (context,) if kind == "dynamic" else (rope.values.get(_ORIGINAL),)
    rope.refuse_others(_COMMON | _FIELDS[kind], plain)
    if kind == "default":
        return found
    if kind == "yarn":
        return found | _yarn(fields, rope, context)
    factor = rope.positive("factor")
    if factor == 1 and kind != "dynamic":
        return found
    found |= {"rope_scaling": kind, "rope_scaling_factor": factor}
    if kind == "dynamic":
        found["rope_original_context"] = context
    if kind == "llama3":
        found |= {
            "rope_low_freq_factor": rope.positive("low_freq_factor"),
            "rope_high_freq_factor": rope.positive("high_freq_factor"),
            "rope_original_context": _original(fields, rope, context),
        }
    return found


def _parameters(fields: Fields) -> tuple[Fields, float]:
    """Returns the object that has the parameters of RoPE, and theta."""
    found = []
    for field in ("rope_parameters", "rope_scaling"):
        if fields.values.get(field) not in (None, {}):
            found.append(Fields(fields.values[field], fields.file, field))
    if len(found) == 2:
        new, old = (_normal(rope.values) for rope in found)
        for field in sorted(new.keys() | old.keys()):
            if new.get(field) != old.get(field):
                raise UserError(
                    f"{fields.file}: rope_scaling and rope_parameters disagree on {field}"
                )
    rope = found[0] if found else Fields({}, fields.file, "rope_parameters")
    thetas = [group for group in (*found, fields) if "rope_theta" in group.values]
    theta = thetas[0].positive("rope_theta") if thetas else 10_000.0
    for group in thetas[1:]:
        if group.positive("rope_theta") != theta:
            raise UserError(f"{fields.file}: rope_theta and rope_parameters disagree")
    for group in (rope, fields):  # refuses models that rotate only a part of each head
        if group.given("partial_rotary_factor") and group.values["partial_rotary_factor"] != 1:
            value = short(group.values["partial_rotary_factor"])
            raise UserError(f"{group.name('partial_rotary_factor')}={value} is not supported")
    return rope, theta


def _normal(rope: dict[str, Any]) -> dict[str, Any]:
    """Converts parameters to a common form for comparison, whichever version wrote them."""
    kept = {name: value for name, value in rope.items() if value is not None}
    kind = kept.pop("type", "default")
    return {"rope_type": kind, **kept, "rope_theta": None}


def _kind(rope: Fields) -> str:
    kinds = [rope.get(field, str) for field in ("rope_type", "type") if rope.given(field)]
    if len(set(kinds)) > 1:
        raise UserError(f"{rope.name('rope_type')} and type disagree")
    kind = kinds[0] if kinds else "default"
    if kind not in _FIELDS:
        raise UserError(
            f"{rope.file}: RoPE of type {short(kind)} is not supported; known: {', '.join(_FIELDS)}"
        )
    return kind


def _original(fields: Fields, rope: Fields, context: int) -> int:
    """Returns the context before stretching, in tokens; `context` if no field gives it."""
    sizes = [group.size(_ORIGINAL) for group in (fields, rope) if group.given(_ORIGINAL)]
    if len(set(sizes)) > 1:
        raise UserError(f"{rope.name(_ORIGINAL)} and {_ORIGINAL} disagree")
    return sizes[0] if sizes else context


def _yarn(fields: Fields, rope: Fields, context: int) -> dict[str, Any]:
    original = _original(fields, rope, context)
    stretched = fields.given(_ORIGINAL) or rope.given(_ORIGINAL)
    implied = stretched and not rope.given("factor")
    factor = context / original if implied else rope.positive("factor")
    attention = 0.0
    if rope.given("attention_factor"):
        attention = rope.positive("attention_factor")
    elif rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        scales = (rope.positive(field) for field in ("mscale", "mscale_all_dim"))
        over, under = (0.1 * scale * math.log(max(factor, 1)) + 1 for scale in scales)
        attention = over / under
    # null is False in transformers; an absent field is True.
    truncate = rope.values.get("truncate", True)
    if not isinstance(truncate, bool | None):
        raise UserError(f"{rope.name('truncate')} must be of type bool, got {short(truncate)}")
    betas = {"beta_fast": 32.0, "beta_slow": 1.0}
    given = {name: rope.positive(name) for name in betas if rope.values.get(name)}
    return {
        "rope_scaling": "yarn",
        "rope_scaling_factor": factor,
        "rope_original_context": original,
        "rope_attention_factor": attention,
        "rope_truncate": bool(truncate),
        **{f"rope_{name}": value for name, value in (betas | given).items()},
    }


def parameters(model: ModelConfig) -> dict[str, Any]:
    """Returns the content of `rope_scaling` (version 4), or `rope_parameters` without theta (5)."""
    kind, factor = model.rope_scaling, model.rope_scaling_factor
    if not model.rope_is_stretched:
        return {"rope_type": "default"}
    found: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind in ("linear", "dynamic"):
        found["type"] = kind  # for versions before 4.43
    else:
        found[_ORIGINAL] = model.rope_original_context
    if kind == "llama3":
        found["low_freq_factor"] = model.rope_low_freq_factor
        found["high_freq_factor"] = model.rope_high_freq_factor
    if kind == "yarn":
        found |= {"beta_fast": model.rope_beta_fast, "beta_slow": model.rope_beta_slow}
        if model.rope_attention_factor:
            found["attention_factor"] = model.rope_attention_factor
        if not model.rope_truncate:
            found["truncate"] = False
    return found
