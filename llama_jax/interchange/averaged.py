"""The average of the weights of several saved steps, as a source.

Llama 3 averages its last checkpoints (arXiv:2407.21783, section 3.4.3). A step with adapters is
merged with its base first, and the merged weights are averaged: the mean of A times the mean of B
is not the mean of their products.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np
from etils import epath

from llama_jax.checkpoint.retention import saved_steps
from llama_jax.checkpoint.saved_step import steps_folder
from llama_jax.errors import UserError
from llama_jax.interchange import model_card
from llama_jax.interchange.formats import Source, differing_fields
from llama_jax.interchange.opening import open_source

_NUMBERS = re.compile("[0-9]{1,18}(,[0-9]{1,18})*")  # a step is below 10**18


class AveragedSource:
    """The average of the weights of several steps; its description is that of the newest step.

    It reads the same array of one step after another, and holds their sum and one more array.

    Attributes:
      steps: numbers of the steps, in ascending order.
    """

    def __init__(self, sources: Mapping[int, Source]) -> None:
        """Wraps the sources of two or more steps.

        Args:
          sources: source of each step, by its number.

        Raises:
          UserError: the steps hold different models.
        """
        self.steps = tuple(sorted(sources))
        self._sources = [sources[step] for step in self.steps]
        newest = self._sources[-1].description
        for step, source in zip(self.steps, self._sources, strict=True):
            found, wanted = source.description.config.model, newest.config.model
            if names := differing_fields(found, wanted):
                name = names[0]
                raise UserError(
                    f"--average: steps {step} and {self.steps[-1]} hold different models: "
                    f"model.{name} is {getattr(found, name)} and {getattr(wanted, name)}"
                )
        card = model_card.of_average(newest.card, self.steps)
        self.description = dataclasses.replace(newest, card=card)

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """Reads the array `path` of our tree; of a stacked array, the layer `layer`.

        Returns:
          The average as float32, computed in float64. If all steps hold the same bits, it has them.
        """
        total = self._sources[0].read(path, layer).astype(np.float64)
        for source in self._sources[1:]:
            total += source.read(path, layer)
        total /= len(self._sources)
        return total.astype(np.float32)


def open_average(folder: epath.Path, average: str, base: str = "") -> AveragedSource:
    """Opens the average of several steps of a run; `open_source` opens and checks each of them.

    Args:
      folder: the work directory, or its folder of steps.
      average: which steps, as in `--average`: a number N for the newest N, or a list.
      base: FORMAT:DIR of the base of adapters; empty: the base that training used.

    Raises:
      UserError: the steps do not exist, cannot be opened, or hold different models.
    """
    numbers = _parse(average)
    if not folder.exists():
        raise UserError(f"{folder} does not exist")
    if (folder / "params").exists():
        raise UserError(
            f"--average reads several steps of a work directory, but {folder} is a single step"
        )
    place = steps_folder(folder)
    steps = _choose(numbers, saved_steps(place), place)
    return AveragedSource(
        {step: open_source("ckpt", place / str(step), base=base) for step in steps}
    )


def _parse(average: str) -> list[int]:
    """Returns the numbers of `--average`: one is a count of steps, several are the steps."""
    numbers = list(map(int, average.split(","))) if _NUMBERS.fullmatch(average) else []
    if not numbers or numbers in ([0], [1]):
        raise UserError(
            "--average must be a number of steps, at least 2, such as 5, or a list of steps, such "
            f"as 400,500,600; got {average!r}"
        )
    if twice := [step for step in numbers if numbers.count(step) > 1]:
        raise UserError(f"--average names step {twice[0]} twice")
    return numbers


def _choose(numbers: list[int], saved: list[int], place: epath.Path) -> list[int]:
    """Returns the steps to average.

    Args:
      numbers: see `_parse`.
      saved: the complete steps, in ascending order.
      place: their folder, for an error.

    Raises:
      UserError: some of them do not exist.
    """
    there = f"{place} holds {'steps ' + ', '.join(map(str, saved)) if saved else 'no step'}"
    if len(numbers) > 1:
        missing = [str(step) for step in numbers if step not in saved]
        if missing:
            raise UserError(
                f"--average names steps that are not saved: {', '.join(missing)}; {there}"
            )
        return numbers
    (count,) = numbers
    if len(saved) < count:
        raise UserError(
            f"--average={count} needs {count} saved steps; {there}; a run keeps the newest "
            "train.keep_checkpoints steps"
        )
    return saved[-count:]
