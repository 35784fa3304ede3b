"""The text of `train.stages`: fields that have other values in some steps of a run.

For example, Llama 3's batches, which grow while it trains (arXiv:2407.21783, section 3.4.1):

  until 252M tokens: train.seq_len=4096 train.global_batch=1024;
  until 2.87T tokens: train.global_batch=1024

Each stage begins where the one before it ends. A field that a stage does not name, and every field
after the last stage, has its value from the config. This module only reads and writes the text;
`Config.stages` has the config of each stage.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.errors import UserError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
# A word, whose parts in quotes may contain spaces and semicolons; or the end of a stage.
_TOKEN = re.compile(r"""(?:[^\s;'"]|'[^']*'|"[^"]*")+|[;\n]|['"]""")
_NUMBER = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,2})?)([KMBT]?)")
_EXAMPLE = "write stages such as 'until 1000: train.seq_len=1024; until 2B tokens: train.z_loss=0'"


@dataclasses.dataclass(frozen=True)
class StageText:
    """One stage as it is written.

    Attributes:
      until: number of steps or tokens, counted from the start of the run, at which it ends.
      in_tokens: whether `until` counts tokens.
      values: the texts of the fields that the stage sets, by name.
    """

    until: int
    in_tokens: bool
    values: Mapping[str, str]

    @property
    def end(self) -> str:
        """The end of the stage, such as `until 1000`."""
        return f"until {self.until}{' tokens' * self.in_tokens}"


def parse(text: str) -> list[StageText]:
    """Reads the text of `train.stages`.

    Raises:
      UserError: the text does not have the form `until N: NAME=VALUE ...; ...`.
    """
    stages: list[list[str]] = [[]]
    for token in _TOKEN.findall(text):
        if token in ("'", '"'):
            raise UserError(f"train.stages has a quote {token} without its end: {text!r:.100}")
        if token in (";", "\n"):
            stages.append([])
        else:
            stages[-1].append(token)
    return [_parse_stage(words) for words in stages if words]


def _parse_stage(words: list[str]) -> StageText:
    shown = repr(" ".join(words))
    colon = next((at for at, word in enumerate(words) if word.endswith(":")), None)
    if words[0] != "until" or colon is None:
        raise UserError(f"train.stages: {shown:.100} does not begin with 'until N:'; {_EXAMPLE}")
    head = [*words[1:colon], words[colon][:-1]]
    unit = head.pop() if head[-1] in ("step", "steps", "tokens", "") and len(head) > 1 else ""
    matched = _NUMBER.fullmatch(head[0]) if len(head) == 1 else None
    number = float(matched[1].replace("_", "")) * _UNITS[matched[2]] if matched else 0.0
    # Rounded first: 2.87 * 10**12 is not exact in floating point.
    if not 1 <= number < 2**62 or abs(number - round(number)) > 1e-3:
        raise UserError(
            f"train.stages: {shown:.100} must end at a whole number of steps or tokens, such as "
            "'until 1000:' or 'until 252M tokens:'"
        )
    values: dict[str, str] = {}
    for word in words[colon + 1 :]:
        name, equals, value = word.partition("=")
        if not equals or name in values:
            why = "occurs twice" if equals else "has no value"
            if word == "until":
                why = "begins a new stage; write a semicolon before it"
            raise UserError(f"train.stages: {name!r:.100} {why}; write NAME=VALUE, once per name")
        values[name] = value.replace("'", "").replace('"', "")
    return StageText(round(number), unit == "tokens", values)


def to_text(stages: Sequence[tuple[int, Mapping[str, Any]]]) -> str:
    """Returns the text of stages; `parse` is the inverse.

    Args:
      stages: the step at which each stage ends, and the values of its fields by name.
    """
    return "; ".join(
        " ".join(
            [f"until {until}:", *(f"{name}={_quoted(value)}" for name, value in values.items())]
        )
        for until, values in stages
    )


def _quoted(value: Any) -> str:
    text = str(value)
    return f"'{text}'" if re.search(r"[\s;]", text) else text
