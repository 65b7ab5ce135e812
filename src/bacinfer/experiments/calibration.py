"""The fastest way to sample a policy's actions that loses nothing, found by episodes.

Plans of all costs run the same episodes as the plain policy, in rounds: after each one the plans go that are refuted,
and those that three faster ones do at least as well as (successive halving with paired differences). What is left is
confirmed on episodes that chose nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch

from bacinfer.core.apply import left_as_found
from bacinfer.core.engines import AUTO
from bacinfer.core.handle import PolicyHandle
from bacinfer.core.plan import SamplingPlan
from bacinfer.experiments.candidates import default_methods
from bacinfer.experiments.plans import make_plans
from bacinfer.experiments.schedules import analysis_observations, found_at
from bacinfer.experiments.trials import Trials
from bacinfer.files import write_json
from bacinfer.measurement.latency import fast_enough
from bacinfer.measurement.statistics import CONFIDENCE, Estimate, estimate_paired_difference, estimate_score
from bacinfer.measurement.tables import format_table
from bacinfer.tasks import Task

FIRST_CALIBRATION_SEED = 200_000
FIRST_CONFIRMATION_SEED = 300_000
ROUNDS = (24, 48)
"""Episodes of each plan after each round."""

NUM_FRESH = 200
"""Episodes that a plan is confirmed on: with fewer, most plans that lose nothing cannot be shown to."""

MAX_CONFIRMED = 8
"""How many plans are tried on fresh episodes, the fastest one first."""


@dataclass(frozen=True)
class Target:
    """What is asked for.

    Attributes:
        latency: At most so many seconds a call (median, batch 1); None: the fastest plan that loses nothing.
        margin: A plan loses nothing where its score is below the plain policy's by less than this (with 95 %
            confidence).

    Raises:
        ValueError: a number that is not above 0.
    """

    latency: float | None = None
    margin: float = 0.02

    def __post_init__(self) -> None:
        for name in ("latency", "margin"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")


FASTEST = Target()


@dataclass(frozen=True)
class Candidate:
    """A plan, and what is known of it.

    Attributes:
        name: Its method.
        latency: Median of a call at batch 1, seconds; with a warm start, of one that follows another.
        speedup: The plain policy's median latency over this one's.
        num_steps: Denoising steps of such a call.
        score: Mean over the calibration episodes that it ran.
        difference: To the plain policy in those episodes; None of that policy itself.
        confirmed: The same difference in fresh episodes; None where it did not come to that.
    """

    name: str
    plan: SamplingPlan
    latency: float
    speedup: float
    num_steps: int
    score: Estimate | None = None
    difference: Estimate | None = None
    confirmed: Estimate | None = None


@dataclass(frozen=True)
class Calibration:
    """What was found; ``str()`` of it is a table.

    Attributes:
        chosen: The candidate to use.
        candidates: All of them, the fastest first.
        plain: The plain policy; its latency is that of its own code.
        precision: Of the candidates' products; None: the policy's own.
    """

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    plain: Candidate
    target: Target
    precision: str | None = None

    @property
    def loses_nothing(self) -> bool:
        """Whether fresh episodes showed that the chosen plan loses less than the margin."""
        return _loses_nothing(self.chosen, self.target)

    @property
    def plan(self) -> SamplingPlan:
        return self.chosen.plan

    def __str__(self) -> str:
        return "\n".join([format_candidates([*self.candidates, self.plain]), "", self.verdict])

    @property
    def verdict(self) -> str:
        """What can be said of the chosen plan, in a sentence."""
        chosen, found = self.chosen, self.chosen.confirmed
        assert found is not None
        name = chosen.name if self.precision is None else f"{chosen.name} in {self.precision}"
        what = f"{name}: {1e3 * chosen.latency:.2f} ms a call, {chosen.speedup:.0f} times the plain policy"
        shown = f"its score differs by {found.signed} in {found.count} fresh episodes"
        if self.loses_nothing:
            return f"{what}; {shown}: it loses less than {self.target.margin:g}, with {CONFIDENCE:.0%} confidence"
        needed = episodes_to_show(found, self.target.margin)
        would = "" if needed is None else f"; about {needed} would, if the difference stayed what it is"
        return f"{what}; {shown}, which does not show that it loses less than {self.target.margin:g}{would}"


def episodes_to_show(difference: Estimate, margin: float) -> int | None:
    """How many paired episodes show a loss below the margin, in hundreds, if their mean and spread are these; None: no
    number does."""
    room = difference.mean + margin
    if difference.low is None or room <= 0:
        return None
    return 100 * ceil(difference.count * ((difference.mean - difference.low) / room) ** 2 / 100)


HEADER = ("plan", "steps", "ms a call", "speedup", "episodes", "score", "difference to plain", "in fresh episodes")


def format_candidates(candidates: Sequence[Candidate]) -> str:
    """A table in Markdown, a row a candidate."""
    return format_table(HEADER, list(map(candidate_cells, candidates)), markdown=True)


def candidate_cells(candidate: Candidate) -> list[str]:
    """A candidate's row below `HEADER`; empty where nothing was measured."""
    score, difference, confirmed = candidate.score, candidate.difference, candidate.confirmed
    return [
        candidate.name,
        str(candidate.num_steps),
        f"{1e3 * candidate.latency:.2f}",
        f"{candidate.speedup:.1f}x",
        "" if score is None else str(score.count),
        "" if score is None else str(score),
        "" if difference is None else difference.signed,
        "" if confirmed is None else f"{confirmed.signed} ({confirmed.count})",
    ]


def calibrate(
    policy: Any,
    task: Task,
    output_dir: str | Path,
    target: Target = FASTEST,
    *,
    plans: Mapping[str, SamplingPlan] | None = None,
    stateful: bool = False,
    engine: str = AUTO,
    precision: str | None = None,
    rounds: Sequence[int] = ROUNDS,
    num_fresh: int = NUM_FRESH,
    noise_seed: int = 0,
    on_round: Any = print,
) -> Calibration:
    """Finds the plan of a policy for a target; the policy is left as it was.

    What was measured is kept in `output_dir`, so that the same call goes on after an interruption.

    Args:
        policy: A policy.
        task: Runs its episodes.
        output_dir: Gets ``plan.json``, ``calibration.json`` with all that was measured, and ``episodes/``.
        plans: Names to what is tried; None: own, DDIM and DPM-Solver++ steps of many numbers, some caches, and, if
            `stateful`, warm starts.
        stateful: Whether the plan may keep state between calls (see `bacinfer.apply`).
        engine: What runs the plans.
        precision: Of their products; None: the policy's own, which the plain policy has in any case.
        rounds: Episodes of each plan after each round.
        num_fresh: Episodes that a plan is confirmed on.
        on_round: Is told of the candidates after each round.

    Raises:
        ValueError: no plan reaches the target; says which one comes nearest.
        RuntimeError: the simulator is missing or failed.
    """
    if list(rounds) != sorted(set(rounds)) or min(rounds, default=0) < 2 or num_fresh < 2:
        raise ValueError(f"expected rounds of more and more episodes, at least 2, and fresh ones; got {rounds}")
    with left_as_found(policy):
        trials = Trials(policy, task, Path(output_dir) / "episodes", engine, precision, noise_seed)
        observations = analysis_observations(policy, task)
        if plans is None:
            plans = make_plans(policy, default_methods(policy, stateful=stateful), found_at(observations))
        plans = {name: trials.with_threshold(plan) for name, plan in plans.items()}
        plain, candidates = _timed(trials, plans, observations[0], PolicyHandle.of(policy).num_own_steps)
        candidates = _fast_enough(candidates, target)

        everyone = {candidate.name: candidate for candidate in candidates}
        for num_episodes in rounds:
            seeds = range(FIRST_CALIBRATION_SEED, FIRST_CALIBRATION_SEED + num_episodes)
            scores = trials.scores(plain.plan, seeds)
            plain = replace(plain, score=estimate_score(scores))
            candidates = [_judged(candidate, scores, trials.scores(candidate.plan, seeds)) for candidate in candidates]
            everyone |= {candidate.name: candidate for candidate in candidates}
            on_round(f"\nafter {num_episodes} episodes\n{format_candidates([*candidates, plain])}")
            candidates = survivors(candidates, target)

        fresh = range(FIRST_CONFIRMATION_SEED, FIRST_CONFIRMATION_SEED + num_fresh)
        scores = trials.scores(plain.plan, fresh)
        confirmed: list[Candidate] = []
        for candidate in _to_confirm(candidates, target):
            confirmed.append(_confirmed(candidate, trials, scores, fresh, target))
            everyone[candidate.name] = confirmed[-1]
            if _loses_nothing(confirmed[-1], target):
                break
    chosen = confirmed[-1]
    if not _loses_nothing(chosen, target):
        chosen = max(confirmed, key=lambda candidate: _low(candidate.confirmed))
    found = Calibration(chosen, _by_latency(everyone.values()), plain, target, precision)
    write_calibration(found, Path(output_dir))
    return found


def _timed(
    trials: Trials, plans: Mapping[str, SamplingPlan], observation: dict[str, torch.Tensor], K: int
) -> tuple[Candidate, Sequence[Candidate]]:
    """The plain policy, and the candidates, the fastest first."""
    plain_latency, latencies = trials.latencies(plans, observation)
    candidates = [
        Candidate(name, plan, latencies[name], plain_latency / latencies[name], _num_steps(plan, K))
        for name, plan in plans.items()
    ]
    return Candidate("plain", SamplingPlan(), plain_latency, 1.0, K), _by_latency(candidates)


def _num_steps(plan: SamplingPlan, K: int) -> int:
    sampler = plan.sampler if plan.warm_start is None else plan.warm_start.sampler
    return K if sampler is None else sampler.num_steps


def _judged(candidate: Candidate, plain_scores: Sequence[float], scores: Sequence[float]) -> Candidate:
    difference = estimate_paired_difference(plain_scores, scores)
    return replace(candidate, score=estimate_score(scores), difference=difference)


def _confirmed(
    candidate: Candidate, trials: Trials, plain_scores: Sequence[float], fresh: Sequence[int], target: Target
) -> Candidate:
    """In all fresh episodes, or in half of them if it loses the margin there: a slower one has better prospects."""
    for num_episodes in (max(2, len(fresh) // 2), len(fresh)):
        scores = trials.scores(candidate.plan, fresh[:num_episodes])
        difference = estimate_paired_difference(plain_scores[:num_episodes], scores)
        if target.latency is None and difference.mean <= -target.margin:
            break
    return replace(candidate, confirmed=difference)


def _by_latency(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    return tuple(sorted(candidates, key=lambda candidate: candidate.latency))


def survivors(candidates: Sequence[Candidate], target: Target) -> list[Candidate]:
    """Whom the next round is worth: those not refuted, unless three faster ones do at least as well; never none.

    Three, as one may do so by chance and be refuted later. For a latency that is asked for, all are fast enough: then
    it is the better half by score.
    """
    if target.latency is not None:
        by_score = sorted(candidates, key=lambda candidate: _mean(candidate.difference), reverse=True)
        return by_score[: max(1, (len(by_score) + 1) // 2)]
    kept: list[Candidate] = []
    for candidate in _by_latency(candidates):
        difference = candidate.difference
        refuted = difference is not None and difference.high is not None and difference.high < -target.margin
        if not refuted and sum(_mean(faster.difference) >= _mean(difference) for faster in kept) < 3:
            kept.append(candidate)
    return kept or [max(candidates, key=lambda candidate: _mean(candidate.difference))]


def _to_confirm(candidates: Sequence[Candidate], target: Target) -> Sequence[Candidate]:
    """The best one and the fastest of the likely ones, the fastest first; with a latency asked for, the best alone."""
    best = max(candidates, key=lambda candidate: _mean(candidate.difference))
    if target.latency is not None:
        return [best]
    likely = [c for c in _by_latency(candidates) if _mean(c.difference) >= -target.margin and c is not best]
    return _by_latency([best, *likely[: MAX_CONFIRMED - 1]])


def _fast_enough(candidates: Sequence[Candidate], target: Target) -> Sequence[Candidate]:
    if target.latency is None:
        return candidates
    fast = fast_enough({candidate.name: candidate.latency for candidate in candidates}, target.latency)
    return [candidate for candidate in candidates if candidate.name in fast]


def _loses_nothing(candidate: Candidate, target: Target) -> bool:
    return _low(candidate.confirmed) > -target.margin


def _mean(estimate: Estimate | None) -> float:
    return float("-inf") if estimate is None else estimate.mean


def _low(estimate: Estimate | None) -> float:
    return float("-inf") if estimate is None or estimate.low is None else estimate.low


def write_calibration(calibration: Calibration, output_dir: Path) -> None:
    """``plan.json`` and ``calibration.json``."""
    calibration.plan.save(output_dir / "plan.json")
    data = {
        "chosen": calibration.chosen.name,
        "loses_nothing": calibration.loses_nothing,
        "verdict": calibration.verdict,
        "target": asdict(calibration.target),
        "threads": torch.get_num_threads(),
        "precision": calibration.precision,
        "plain": _row(calibration.plain),
        "candidates": list(map(_row, calibration.candidates)),
    }
    write_json(output_dir / "calibration.json", data)


def _row(candidate: Candidate) -> dict[str, Any]:
    row = {name: value for name, value in vars(candidate).items() if name != "plan"}
    return {name: asdict(value) if isinstance(value, Estimate) else value for name, value in row.items()}
