"""Finds the matrices that PEFT's adapter_config.json names, with the rank and alpha of each.

PEFT compares the names of all modules of a model with suffixes and regular expressions. This module
does the same with the names of the modules in Hugging Face's LLaMA and Mistral.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from llama_jax.errors import UserError, check_type, require
from llama_jax.interchange import hf
from llama_jax.parameters import layer_matrices

MATRICES = layer_matrices()  # that may have adapters
MATCH_SECONDS = 10  # of processor time, for the expressions of one field
# An expression from a foreign file may take years. `re` has no time limit, but a process has one.
_MATCHER = """
import json, re, resource, sys
seconds = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
if sys.platform != "darwin":  # macOS has no such limit
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
how, expressions, names = json.load(sys.stdin)
try:
    compiled = [re.compile(expression) for expression in expressions]
    found = [[getattr(e, how)(name) for name in names] for e in compiled]
except Exception as error:
    sys.exit(f"{error}"[:200])
json.dump([[m and (m.groupdict().get("idx") or "") for m in row] for row in found], sys.stdout)
"""
# Modules outside the layers, and those modules of a layer that are not matrices.
_AROUND = ("model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb")
_INSIDE = ("", ".self_attn", ".mlp", ".mlp.act_fn", ".input_layernorm", ".post_attention_layernorm")
_DEFAULT = ["q_proj", "v_proj"]  # PEFT's default for llama and mistral


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """The adapter of one matrix: its rank, and its alpha (its scale is alpha / rank)."""

    rank: int
    alpha: float


def module_of(name: str, layer: int) -> str:
    """Returns Hugging Face's name of one of our matrices: model.layers.0.self_attn.q_proj."""
    return hf.name_of(MATRICES[name].path, layer).removesuffix(".weight")


def short_name(name: str) -> str:
    """Returns Hugging Face's name of one of our matrices within its layer: q_proj."""
    return module_of(name, 0).split(".")[-1]


def targets_of(values: Mapping[str, Any], n_layers: int) -> dict[tuple[str, int], AdapterSpec]:
    """Returns the matrices that have adapters, by our name and the layer.

    Args:
      values: content of adapter_config.json.
      n_layers: number of layers of the base.

    Raises:
      UserError: a value is malformed, or names modules that cannot have adapters here.
    """
    layers = range(n_layers)
    matrices = {module_of(name, layer): (name, layer) for layer in layers for name in MATRICES}
    around = [f"model.layers.{layer}{module}" for layer in layers for module in _INSIDE]
    names = [*matrices, *around, *_AROUND, "lm_head"]
    found = _chosen(values, names, list(matrices))
    other = [name for name in found if name not in matrices]
    if other or not found:
        known = ", ".join(map(short_name, MATRICES))
        also = f"; it names {other[0]}, too" if other else ""
        raise UserError(
            f"target_modules={values.get('target_modules')!r:.200} must be some of {known}{also}"
        )
    ranks = _by_pattern(values, "rank_pattern", "r", int, found)
    alphas = _by_pattern(values, "alpha_pattern", "lora_alpha", float, found)
    return {matrices[name]: AdapterSpec(ranks[name], alphas[name]) for name in found}


def _chosen(values: Mapping[str, Any], names: list[str], linear: list[str]) -> list[str]:
    """Returns the modules to which PEFT adds adapters (see its `check_target_module_exists`)."""
    targets = values.get("target_modules")
    layers = values.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers or []
    if isinstance(targets, str):
        require(not layers, "layers_to_transform needs a list of target_modules")
        whole = targets.lower() == "all-linear"
        found = linear if whole else _matched(targets, names)
    else:
        suffixes = set(_texts("target_modules", _DEFAULT if targets is None else targets))
        full = [name for name in names if name in suffixes]  # full names, in any layer
        rest = [name for name in names if name not in suffixes and _ends(name, suffixes)]
        found = full + (_in_layers(rest, layers, values) if layers else rest)
    excluded = values.get("exclude_modules") or []
    if isinstance(excluded, str):
        left_out = set(_matched(excluded, found))
    else:
        suffixes = set(_texts("exclude_modules", excluded))
        left_out = {name for name in found if _ends(name, suffixes)}
    return [name for name in found if name not in left_out]


def _in_layers(names: list[str], layers: Any, values: Mapping[str, Any]) -> list[str]:
    """Returns the names that lie in the layers of `layers_to_transform`."""
    numbers = {check_type("layers_to_transform", layer, int) for layer in layers}
    patterns = values.get("layers_pattern") or []
    patterns = _texts("layers_pattern", [patterns] if isinstance(patterns, str) else patterns)
    expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns]
    rows = _match("match", expressions or [r".*?\.[^.]*\.(?P<idx>\d+)\."], names)
    columns = zip(*rows, strict=True)
    indices = [next((x for x in column if x is not None), None) for column in columns]
    return [n for n, index in zip(names, indices, strict=True) if index and int(index) in numbers]


def _by_pattern(
    values: Mapping[str, Any], patterns: str, default: str, kind: type, names: list[str]
) -> dict[str, Any]:
    """Returns module -> rank or alpha, from the first pattern that matches it, or the default."""
    found = values.get(patterns) or {}
    require(isinstance(found, dict), f"{patterns} must be numbers by module, got {found!r:.200}")
    choices = [check_type(f"{patterns}[{key!r:.200}]", value, kind) for key, value in found.items()]
    choices.append(check_type(default, values.get(default), kind))
    rows = _match("match", [rf"(.*\.)?({key})$" for key in found], names)
    rows.append([""] * len(names))
    columns = zip(*rows, strict=True)
    first = [[match is not None for match in column].index(True) for column in columns]
    return {name: choices[index] for name, index in zip(names, first, strict=True)}


def _texts(name: str, values: Any) -> list[str]:
    right = isinstance(values, list) and all(isinstance(value, str) for value in values)
    require(right, f"{name} must be a list of names, got {values!r:.200}")
    return values


def _ends(name: str, suffixes: set[str]) -> bool:
    """Returns whether a name, or its part after one of the dots, is one of the suffixes."""
    parts = name.split(".")
    return any(".".join(parts[start:]) in suffixes for start in range(len(parts)))


def _matched(expression: str, names: list[str]) -> list[str]:
    """Returns the names that a regular expression matches as a whole."""
    matches = _match("fullmatch", [expression], names)[0]
    return [name for name, match in zip(names, matches, strict=True) if match is not None]


def _match(how: str, expressions: list[str], names: list[str]) -> list[list[str | None]]:
    """Matches each expression with each name; gives None, or the group `idx` ('' without it).

    Args:
      how: method of a compiled expression: match or fullmatch.
      expressions: regular expressions in Python's syntax.
      names: names of modules.

    Raises:
      UserError: an expression is malformed, or takes too long.
    """
    if not expressions:
        return []
    process = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _MATCHER, str(MATCH_SECONDS)],
        input=json.dumps([how, expressions, names]),
        capture_output=True,
        text=True,
        check=False,
    )
    expression = f"the regular expression {expressions[0]!r:.200}"
    if process.returncode < 0:
        raise UserError(f"{expression} takes more than {MATCH_SECONDS} s of processor time")
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or ["it cannot be used"])[-1]
        raise UserError(f"{expression} is malformed: {reason}")
    return json.loads(process.stdout)
