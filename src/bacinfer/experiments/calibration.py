"""The fastest way to sample a policy's actions that loses nothing, found by episodes.

Plans of all costs run the same episodes as the plain policy, in rounds: after each one the plans go that are refuted,
or that a faster one does at least as well as (successive halving with paired differences). What is left is confirmed on
episodes that chose nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bacinfer.core.apply import Applied, applied_to, apply, left_as_found, prepared, switch
from bacinfer.core.engines import AUTO
from bacinfer.core.plan import Fingerprint, SamplingPlan
from bacinfer.experiments.candidates import default_methods, plans_of
from bacinfer.files import read_json, write_json
from bacinfer.measurement.latency import measure_latencies
from bacinfer.measurement.statistics import CONFIDENCE, Estimate, estimate_paired_difference, estimate_score
from bacinfer.tasks import Task

FIRST_CALIBRATION_SEED = 200_000
FIRST_CONFIRMATION_SEED = 300_000
ROUNDS = (24, 48, 96)
"""Episodes of each plan after each round."""

MAX_CONFIRMED = 3
"""How many plans are tried on fresh episodes, the fastest one first."""

_OBSERVED_DEMOS = range(8)
_PROBED_EPISODES = 8


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
        evaluations: Denoising steps of such a call.
        score: Mean over the calibration episodes that it ran.
        difference: To the plain policy in those episodes.
        confirmed: The same difference in fresh episodes; None where it did not come to that.
    """

    name: str
    plan: SamplingPlan
    latency: float
    speedup: float
    evaluations: int
    score: Estimate | None = None
    difference: Estimate | None = None
    confirmed: Estimate | None = None


@dataclass(frozen=True)
class Calibration:
    """What was found; ``str()`` of it is a table.

    Attributes:
        chosen: The candidate to use.
        candidates: All of them, the fastest first.
        plain_latency: Of the plain policy's own code, seconds.
    """

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    plain_latency: float
    target: Target

    @property
    def loses_nothing(self) -> bool:
        """Whether fresh episodes showed that the chosen plan loses less than the margin."""
        return _loses_nothing(self.chosen, self.target)

    @property
    def plan(self) -> SamplingPlan:
        return self.chosen.plan

    def __str__(self) -> str:
        return "\n".join([format_candidates(self.candidates), "", self.verdict])

    @property
    def verdict(self) -> str:
        """What can be said of the chosen plan, in a sentence."""
        chosen, found = self.chosen, self.chosen.confirmed
        assert found is not None
        what = f"{chosen.name}: {1e3 * chosen.latency:.2f} ms a call, {chosen.speedup:.0f} times the plain policy"
        shown = f"its score differs by {found.signed} in {found.count} fresh episodes"
        if self.loses_nothing:
            return f"{what}; {shown}: it loses less than {self.target.margin:g}, with {CONFIDENCE:.0%} confidence"
        return f"{what}; {shown}, which does not show that it loses less than {self.target.margin:g}"


def format_candidates(candidates: Sequence[Candidate]) -> str:
    """A table, the fastest first."""
    width = max(len(candidate.name) for candidate in candidates)
    lines = [f"{'plan':{width}}  steps  ms a call  speedup  episodes  score  difference to plain      fresh episodes"]
    for candidate in candidates:
        score = candidate.score
        episodes, mean = (score.count, f"{score.mean:.3f}") if score else (0, "")
        lines.append(
            f"{candidate.name:{width}}  {candidate.evaluations:5}  {1e3 * candidate.latency:9.2f}"
            f"  {candidate.speedup:6.1f}x  {episodes:8}  {mean:>5}"
            f"  {_signed(candidate.difference):23}  {_signed(candidate.confirmed)}".rstrip()
        )
    return "\n".join(lines)


def _signed(estimate: Estimate | None) -> str:
    return "" if estimate is None else estimate.signed


def calibrate(
    policy: Any,
    task: Task,
    output_dir: str | Path,
    target: Target = FASTEST,
    *,
    plans: Mapping[str, SamplingPlan] | None = None,
    stateful: bool = False,
    engine: str = AUTO,
    rounds: Sequence[int] = ROUNDS,
    num_fresh: int = 100,
    noise_seed: int = 0,
    on_round: Any = print,
) -> Calibration:
    """Finds the plan of a policy for a target; the policy is left as it was.

    What was measured is kept in `output_dir`, so that the same call goes on after an interruption.

    Args:
        policy: A policy.
        task: Runs its episodes.
        output_dir: Gets ``plan.json``, ``calibration.json`` with all that was measured, and ``episodes/``.
        plans: Names to what is tried; None: own and DDIM steps of many numbers, some caches, and, if `stateful`, warm
            starts.
        stateful: Whether the plan may keep state between calls (see `bacinfer.apply`).
        engine: What runs the plans.
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
        search = _Search(policy, task, Path(output_dir), engine, noise_seed)
        observations = first_observations(policy, task)
        if plans is None:
            plans = plans_of(policy, default_methods(policy, stateful=stateful), observations)
        plans = {name: search.with_threshold(plan) for name, plan in plans.items()}
        plain_latency, candidates = search.timed(plans, observations[0])
        candidates = _fast_enough(candidates, target)

        everyone = {candidate.name: candidate for candidate in candidates}
        for num_episodes in rounds:
            seeds = range(FIRST_CALIBRATION_SEED, FIRST_CALIBRATION_SEED + num_episodes)
            candidates = [search.judged(candidate, seeds) for candidate in candidates]
            everyone |= {candidate.name: candidate for candidate in candidates}
            on_round(f"\nafter {num_episodes} episodes\n{format_candidates(candidates)}")
            candidates = survivors(candidates, target)

        fresh = range(FIRST_CONFIRMATION_SEED, FIRST_CONFIRMATION_SEED + num_fresh)
        confirmed: list[Candidate] = []
        for candidate in _to_confirm(candidates, target):
            confirmed.append(replace(candidate, confirmed=search.difference(candidate, fresh)))
            everyone[candidate.name] = confirmed[-1]
            if _loses_nothing(confirmed[-1], target):
                break
    chosen = confirmed[-1]
    if not _loses_nothing(chosen, target):
        chosen = max(confirmed, key=lambda candidate: _low(candidate.confirmed))
    found = Calibration(
        chosen,
        tuple(sorted(everyone.values(), key=lambda candidate: candidate.latency)),
        plain_latency,
        target,
    )
    write_calibration(found, Path(output_dir))
    return found


def first_observations(policy: Any, task: Task) -> list[dict[str, torch.Tensor]]:
    """The first observations of a few training episodes, where calls are timed and schedules found."""
    return [obs for demo in _OBSERVED_DEMOS for obs in task.observations(policy, demo)]


def survivors(candidates: Sequence[Candidate], target: Target) -> list[Candidate]:
    """Whom the next round is worth: those not refuted that no faster one does at least as well as; never none.

    For a latency that is asked for, all are fast enough: then it is the better half by score.
    """
    if target.latency is not None:
        by_score = sorted(candidates, key=lambda candidate: _mean(candidate.difference), reverse=True)
        return by_score[: max(1, (len(by_score) + 1) // 2)]
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda candidate: candidate.latency):
        difference = candidate.difference
        refuted = difference is not None and difference.high is not None and difference.high < -target.margin
        if not refuted and all(_mean(difference) > _mean(faster.difference) for faster in kept):
            kept.append(candidate)
    return kept or [max(candidates, key=lambda candidate: _mean(candidate.difference))]


def _to_confirm(candidates: Sequence[Candidate], target: Target) -> list[Candidate]:
    """The fastest first, and the best one; with a latency asked for, the best one alone."""
    best = max(candidates, key=lambda candidate: _mean(candidate.difference))
    if target.latency is not None:
        return [best]
    likely = [c for c in candidates if _mean(c.difference) >= -target.margin and c is not best]
    return [*sorted(likely, key=lambda candidate: candidate.latency)[: MAX_CONFIRMED - 1], best]


def _fast_enough(candidates: Sequence[Candidate], target: Target) -> list[Candidate]:
    if target.latency is None:
        return list(candidates)
    kept = [candidate for candidate in candidates if candidate.latency <= target.latency]
    if not kept:
        nearest = min(candidates, key=lambda candidate: candidate.latency)
        raise ValueError(
            f"no plan takes {1e3 * target.latency:.3g} ms a call or less on this machine; the nearest is "
            f"{nearest.name} with {1e3 * nearest.latency:.3g} ms ({1 / nearest.latency:.0f} calls a second)"
        )
    return kept


def _loses_nothing(candidate: Candidate, target: Target) -> bool:
    return _low(candidate.confirmed) > -target.margin


def _mean(estimate: Estimate | None) -> float:
    return float("-inf") if estimate is None else estimate.mean


def _low(estimate: Estimate | None) -> float:
    return float("-inf") if estimate is None or estimate.low is None else estimate.low


class _Search:
    """Runs and times plans on a plain policy, and keeps the scores."""

    def __init__(self, policy: Any, task: Task, output_dir: Path, engine: str, noise_seed: int) -> None:
        self._policy = policy
        self._task = task
        self._episodes_dir = output_dir / "episodes"
        self._engine = engine
        self._noise_seed = noise_seed
        self._plain = SamplingPlan()
        self._made_for = Fingerprint.of(policy)

    def timed(
        self, plans: Mapping[str, SamplingPlan], observation: dict[str, torch.Tensor]
    ) -> tuple[float, list[Candidate]]:
        """The plain policy's latency, and the candidates, the fastest first."""
        applied = prepared(self._policy, plans, engine=self._engine, stateful=True)
        steps = {name: each.phases[-1].schedule.num_inference_steps for name, each in applied.items()}
        variants: dict[str, Applied | None] = {"": None, **applied}
        become = {name: partial(switch, self._policy, each) for name, each in variants.items()}
        latencies = measure_latencies(self._policy, observation, become, 10)
        switch(self._policy, None)
        plain = latencies[""].p50
        found = [
            Candidate(name, plan, latencies[name].p50, plain / latencies[name].p50, steps[name])
            for name, plan in plans.items()
        ]
        return plain, sorted(found, key=lambda candidate: candidate.latency)

    def with_threshold(self, plan: SamplingPlan) -> SamplingPlan:
        """A plan whose warm start, if it has one without a threshold, gets it: what undisturbed episodes stay below."""
        if plan.warm_start is None or plan.warm_start.max_disagreement is not None:
            return plan
        path = self._path(plan, "threshold")
        if not path.is_file():
            seeds = range(FIRST_CALIBRATION_SEED - _PROBED_EPISODES, FIRST_CALIBRATION_SEED)
            self._apply(plan)
            warm_loop = applied_to(self._policy).warm_loop  # type: ignore[union-attr]
            assert warm_loop is not None
            found: list[float] = []
            warm_loop.on_disagreement = lambda values: found.extend(values.tolist())
            self._task.rollout(self._policy, seeds, noise_seed=self._noise_seed)
            switch(self._policy, None)
            write_json(path, {"max_disagreement": round(max(found, default=1.0), 4)})
        return replace(plan, warm_start=replace(plan.warm_start, **read_json(path)))

    def judged(self, candidate: Candidate, seeds: Sequence[int]) -> Candidate:
        """A candidate after the calibration episodes of `seeds`."""
        scores = self._scores(candidate.plan, seeds)
        return replace(candidate, score=estimate_score(scores), difference=self.difference(candidate, seeds))

    def difference(self, candidate: Candidate, seeds: Sequence[int]) -> Estimate:
        """The change of the score against the plain policy."""
        return estimate_paired_difference(self._scores(self._plain, seeds), self._scores(candidate.plan, seeds))

    def _scores(self, plan: SamplingPlan, seeds: Sequence[int]) -> list[float]:
        """Of one episode a seed: those on disk, and the others, which run now."""
        path = self._path(plan, "scores")
        known = {int(seed): score for seed, score in read_json(path).items()} if path.is_file() else {}
        missing = [seed for seed in seeds if seed not in known]
        if missing:
            self._apply(plan)
            rollout = self._task.rollout(self._policy, missing, noise_seed=self._noise_seed)
            switch(self._policy, None)
            if len(rollout.scores) < len(missing):
                raise RuntimeError(
                    f"{self._task.name} scored {len(rollout.scores)} of {len(missing)} episodes by themselves, and "
                    f"paired differences need all: {dict(rollout.failures)}"
                )
            known |= rollout.scores
            write_json(path, {str(seed): known[seed] for seed in sorted(known)})
        return [known[seed] for seed in seeds]

    def _path(self, plan: SamplingPlan, what: str) -> Path:
        """Where something of a plan is kept, by the plan and all else that decides it."""
        decides = f"{plan.to_json()} {self._task.name} {self._noise_seed} {self._engine} {asdict(self._made_for)}"
        return self._episodes_dir / f"{hashlib.sha256(decides.encode()).hexdigest()[:16]}-{what}.json"

    def _apply(self, plan: SamplingPlan) -> None:
        apply(self._policy, plan, engine=self._engine, stateful=True)


def write_calibration(calibration: Calibration, output_dir: Path) -> None:
    """``plan.json`` and ``calibration.json``."""
    calibration.plan.save(output_dir / "plan.json")
    rows = []
    for candidate in calibration.candidates:
        row = {name: value for name, value in vars(candidate).items() if name != "plan"}
        for name in ("score", "difference", "confirmed"):
            row[name] = None if row[name] is None else asdict(row[name])
        rows.append(row)
    data = {
        "chosen": calibration.chosen.name,
        "loses_nothing": calibration.loses_nothing,
        "verdict": calibration.verdict,
        "target": asdict(calibration.target),
        "plain_latency": calibration.plain_latency,
        "threads": torch.get_num_threads(),
        "candidates": rows,
    }
    write_json(output_dir / "calibration.json", data)
