"""What a calibration measures of plans, latencies and scores, each once: kept on disk for a run that goes on later."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bacinfer.core.apply import applied_to, apply, prepared, switch
from bacinfer.core.plan import Fingerprint, SamplingPlan
from bacinfer.files import read_json, write_json
from bacinfer.measurement.latency import measure_latencies
from bacinfer.tasks import Task

_PROBED_SEEDS = range(199_992, 200_000)
"""The episodes that thresholds are found in."""


class Trials:
    """Runs and times plans on a plain policy."""

    def __init__(
        self, policy: Any, task: Task, directory: Path, engine: str, precision: str | None, noise_seed: int
    ) -> None:
        self._policy = policy
        self._task = task
        self._directory = directory
        self._engine = engine
        self._precision = precision
        self._noise_seed = noise_seed
        self._made_for = Fingerprint.of(policy)

    def latencies(
        self, plans: Mapping[str, SamplingPlan], observation: dict[str, torch.Tensor]
    ) -> tuple[float, dict[str, float]]:
        """Median seconds of a call at batch 1, of the plain policy's own code and of each plan."""
        decides = [[name, plan.to_json()] for name, plan in plans.items()]
        path = self._path(f"{decides} {torch.get_num_threads()} threads", "latencies", self._precision)
        if not path.is_file():
            applied = prepared(self._policy, plans, engine=self._engine, precision=self._precision, stateful=True)
            measured = measure_latencies(self._policy, observation, {"": None, **applied}, 10)
            write_json(path, {name: latency.p50 for name, latency in measured.items()})
        found = read_json(path)
        return found.pop(""), found

    def with_threshold(self, plan: SamplingPlan) -> SamplingPlan:
        """A plan whose warm start, if it has one without a threshold, gets it: what undisturbed episodes stay below."""
        if plan.warm_start is None or plan.warm_start.max_disagreement is not None:
            return plan
        path = self._path(plan.to_json(), "threshold", self._precision)
        if not path.is_file():
            self._apply(plan)
            warm_loop = applied_to(self._policy).warm_loop  # type: ignore[union-attr]
            assert warm_loop is not None
            found: list[float] = []
            warm_loop.on_disagreement = lambda values: found.extend(values.tolist())
            self._task.rollout(self._policy, _PROBED_SEEDS, noise_seed=self._noise_seed)
            switch(self._policy, None)
            write_json(path, {"max_disagreement": round(max(found, default=1.0), 4)})
        return replace(plan, warm_start=replace(plan.warm_start, **read_json(path)))

    def scores(self, plan: SamplingPlan, seeds: Sequence[int]) -> list[float]:
        """Of one episode a seed: those on disk, and the others, which run now.

        Raises:
            RuntimeError: an episode failed, or the task scores none by itself.
        """
        path = self._path(plan.to_json(), "scores", self._precision_of(plan))
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

    def _path(self, subject: str, what: str, precision: str | None) -> Path:
        """Where something is kept, by its subject and all else that decides it."""
        decides = f"{subject} {self._task.name} {self._noise_seed} {self._engine} {asdict(self._made_for)}"
        if precision is not None:
            decides += f" {precision}"
        return self._directory / f"{hashlib.sha256(decides.encode()).hexdigest()[:16]}-{what}.json"

    def _apply(self, plan: SamplingPlan) -> None:
        apply(self._policy, plan, engine=self._engine, precision=self._precision_of(plan), stateful=True)

    def _precision_of(self, plan: SamplingPlan) -> str | None:
        """The plain policy's is its own, so that its episodes serve the plans of every precision."""
        return None if plan == SamplingPlan() else self._precision
