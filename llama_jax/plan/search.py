"""Search for the fastest config that fits: mesh shapes, remat policies, microbatches.

An analytic estimate chooses the candidates. For TPUs the compiler schedules each of them, which
takes seconds and gives memory and network time, and only the best ones are compiled completely. For
GPUs all candidates are compiled.
"""

import dataclasses
import math
import sys
from collections.abc import Iterable
from typing import Any

import jax

from llama_jax.config import Config
from llama_jax.errors import UserError, first_line
from llama_jax.hardware.chips import GIB
from llama_jax.hardware.topology import Topology
from llama_jax.plan import tpu_schedule
from llama_jax.plan.candidates import candidates, flags_for, with_dcn
from llama_jax.plan.estimate import Estimate, estimate
from llama_jax.plan.report import plan

# Fraction of the memory that a candidate may take by the estimate, whose error is a few percent: a
# scheduled program that does not fit costs seconds, a compiled one minutes.
MARGIN, SCHEDULED_MARGIN = 0.97, 1.05
FINALS = 2  # scheduled candidates that are compiled to the end
Rated = tuple[Estimate, Config]


def search(config: Config, topology: Topology, limit: int, price: float) -> dict[str, Any]:
    """Tries the candidates with the best estimates; prints each result on standard error.

    Args:
      config: the run; the search varies its mesh, remat policy and microbatches.
      topology: the machine.
      limit: number of candidates.
      price: dollars for one chip for one hour; 0: unknown.

    Returns:
      The plan of the fastest candidate that fits, with its `options`, and `tried`, which has for
      each candidate: `options`, `kind` (`scheduled` or `compiled`: how far the compiler went),
      `fits`, `total` (bytes per chip), `step_seconds` and `mfu_6n` (null if it was not compiled to
      the end), `scheduled_seconds` (approximate; null without a schedule), `estimate`, and `error`
      if the compiler failed.

    Raises:
      UserError: no candidate fits, divides or compiles.
    """
    config = with_dcn(config, topology)
    rated = [(estimate(one, topology), one) for one in candidates(config, topology)]
    if not rated:
        raise UserError(
            f"train.global_batch={config.train.global_batch} divides over no mesh of "
            f"{topology.devices} devices; try a multiple of {topology.devices}"
        )
    quick = tpu_schedule.available(topology)
    most = (SCHEDULED_MARGIN if quick else MARGIN) * topology.chip.hbm_bytes
    fitting = [pair for pair in rated if pair[0].total <= most]
    fitting = fitting or [min(rated, key=lambda pair: pair[0].total)]
    fitting.sort(key=lambda pair: pair[0].seconds)
    chosen = _whole_slice_first(fitting, limit) if topology.chip.torus else _varied(fitting, limit)
    if not quick:
        chosen.sort(key=lambda pair: pair[0].seconds)
    tries = [
        _Candidate(f"{number}/{len(chosen)}", topology, *pair)
        for number, pair in enumerate(chosen, 1)
    ]
    best = _finals(tries, price) if quick else _fastest(tries, len(tries), price)
    if best is None:
        errors = [str(one.told["error"]) for one in tries if "error" in one.told]
        if len(errors) == len(tries):
            raise UserError(f"none of {len(tries)} candidates compiles: {errors[0]}")
        raise UserError(f"none of {len(tries)} candidates fits {topology}; take more chips")
    return {**best, "tried": [one.told for one in tries]}


class _Candidate:
    """One candidate and its results.

    Attributes:
      number: its number and the number of candidates, such as `2/6`.
      guess: its estimate.
      told: the entry in `tried` that reports it.
    """

    def __init__(self, number: str, topology: Topology, guess: Estimate, config: Config):
        self.number, self.topology, self.guess, self.config = number, topology, guess, config
        self.told: dict[str, Any] = {
            **{"options": flags_for(config), "kind": "compiled", "fits": False, "total": None},
            **{"step_seconds": None, "mfu_6n": None, "scheduled_seconds": None},
            "estimate": dataclasses.asdict(guess),
        }

    def schedule(self) -> None:
        """Compiles the candidate up to the schedule."""
        self.told["kind"] = "scheduled"
        try:
            found = tpu_schedule.schedule(self.config, self.topology)
        except UserError as error:
            self._failed(error)
            return
        total = found.total * self.topology.chip.devices_per_chip
        self.told |= {"fits": found.fits, "total": total, "scheduled_seconds": found.seconds}
        self._say("about ", f"about {found.seconds:.3f} s" if found.seconds else "")

    def compile(self, price: float) -> dict[str, Any] | None:
        """Compiles the candidate to the end; returns its plan, or None if it does not fit."""
        self.told["kind"] = "compiled"
        try:
            result = plan(self.config, self.topology, price)
        except (UserError, jax.errors.JaxRuntimeError) as error:
            if "no topology" in str(error):  # no compiler, for any candidate
                raise
            self._failed(error)
            return None
        step, mfu = result["step_seconds"], result["mfu_6n"]
        self.told |= {"fits": result["fits"], "total": result["bytes_per_chip"]["total"]}
        self.told |= {"step_seconds": step, "mfu_6n": mfu}
        self._say("", f"{step:.3f} s, MFU {mfu:.1%}" if step else "does not compile")
        return {**result, "options": self.told["options"]} if result["fits"] else None

    def _say(self, about: str, speed: str) -> None:
        fits = "fits" if self.told["fits"] else "does NOT fit"
        parts = [f"{about}{self.told['total'] / GIB:.2f} GiB", fits, speed]
        self._print(", ".join(filter(None, parts)))

    def _failed(self, error: Exception) -> None:
        self.told |= {"fits": False, "error": first_line(error)}
        self._print(f"skipped, the compiler fails: {self.told['error']}")

    def _print(self, said: str) -> None:
        print(f"{self.number} {self.told['options']}: {said}", file=sys.stderr, flush=True)


def _finals(tries: list[_Candidate], price: float) -> dict[str, Any] | None:
    """Schedules all candidates, and compiles those with the best schedules to the end.

    The second one to be compiled is the best of those with the fewest microbatches, because
    schedules do not show the costs of a microbatch other than its matrix products.
    """
    for one in tries:
        one.schedule()
    fitting = [one for one in tries if one.told["fits"]]
    fitting.sort(key=lambda one: one.told["scheduled_seconds"])
    fewest = min((one.config.train.grad_accum for one in fitting), default=0)
    few = [one for one in fitting if one.config.train.grad_accum == fewest]
    if few and few[0] is not fitting[0]:
        fitting.remove(few[0])
        fitting.insert(1, few[0])
    return _fastest(fitting, FINALS, price)


def _fastest(tries: list[_Candidate], wanted: int, price: float) -> dict[str, Any] | None:
    """Returns the fastest plan among the first `wanted` candidates that fit; None if none fits."""
    plans: list[dict[str, Any]] = []
    for one in tries:
        if len(plans) < wanted:
            result = one.compile(price)
            plans += [result] if result else []
    return min(plans, key=lambda plan: plan["step_seconds"], default=None)


def _varied(rated: Iterable[Rated], limit: int) -> list[Rated]:
    """Picks at most two per mesh, so that one error of the estimate does not fill the list."""
    seen: dict[tuple[int, ...], int] = {}
    picked: list[Rated] = []
    for pair in rated:
        mesh = dataclasses.astuple(pair[1].mesh)
        seen[mesh] = seen.get(mesh, 0) + 1
        if seen[mesh] <= 2 and len(picked) < limit:
            picked.append(pair)
    return picked


def _whole_slice_first(rated: list[Rated], limit: int) -> list[Rated]:
    """Orders TPU candidates: half have fsdp over the whole slice and the fewest microbatches.

    Such a mesh uses all links of the torus, and its speed depends on what it keeps for the backward
    pass, so the fastest policies come first. Two other numbers of microbatches follow, with which
    more can be kept, and one candidate of each other mesh.
    """
    fewest: dict[tuple[int, ...], int] = {}
    for _, one in rated:
        mesh = dataclasses.astuple(one.mesh)
        fewest[mesh] = min(one.train.grad_accum, fewest.get(mesh, one.train.grad_accum))
    whole: list[Rated] = []
    more: dict[int, Rated] = {}
    others: dict[tuple[int, ...], Rated] = {}
    for pair in rated:
        mesh = dataclasses.astuple(pair[1].mesh)
        least = pair[1].train.grad_accum == fewest[mesh]
        if pair[1].mesh.data == 1 and pair[1].mesh.tensor == 1:
            if least:
                whole.append(pair)
            else:
                more.setdefault(pair[1].train.grad_accum, pair)
        elif least:
            others.setdefault(mesh, pair)
    half = math.ceil(limit / 2)
    again = list(more.values())
    order = [*whole[:half], *again[:2], *others.values(), *whole[half:], *again[2:]]
    return order[:limit]
