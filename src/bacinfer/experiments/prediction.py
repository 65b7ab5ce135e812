"""The best plan for a latency where there is no simulator: a prediction from actions alone.

Of what can be measured without episodes, the distance of the executed actions' distribution from the plain policy's
ordered plans by their scores best (see the measurements in the documentation); the action error draw by draw did not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bacinfer.core.apply import apply, left_as_found, prepared, switch
from bacinfer.core.calls import CallStream, timed_call
from bacinfer.core.engines import AUTO
from bacinfer.core.handle import PolicyHandle
from bacinfer.core.plan import SamplingPlan
from bacinfer.experiments.candidates import default_methods
from bacinfer.experiments.plans import make_plans
from bacinfer.experiments.schedules import found_at
from bacinfer.files import write_json
from bacinfer.measurement.action_error import actions_of, as_batch
from bacinfer.measurement.distribution import sliced_wasserstein
from bacinfer.measurement.latency import fast_enough, measure_latencies
from bacinfer.measurement.tables import format_table

NUM_DRAWS = 16
"""Of the sampling noise, at each observation."""


@dataclass(frozen=True)
class Prediction:
    """What was found; ``str()`` of it is a table.

    Attributes:
        name, plan: The plan that is predicted to be the best.
        latencies: Names of all plans to the median of a call at batch 1, seconds.
        distances: Names of those that are fast enough to their distance from the plain policy's executed actions
            (sliced Wasserstein, in normalised units, or in those that a handle returns them in).
    """

    name: str
    plan: SamplingPlan
    latencies: Mapping[str, float]
    distances: Mapping[str, float]

    @property
    def verdict(self) -> str:
        """What can be said of the plan, in a sentence."""
        return (
            f"{self.name}: {1e3 * self.latencies[self.name]:.2f} ms a call; of the plans that are fast enough its "
            f"actions are distributed most like the plain policy's. This is a prediction: what it does to success, "
            f"only episodes tell"
        )

    def __str__(self) -> str:
        rows = [
            [name, f"{1e3 * seconds:.2f}", f"{self.distances[name]:.4f}" if name in self.distances else "too slow"]
            for name, seconds in sorted(self.latencies.items(), key=lambda item: item[1])
        ]
        return "\n".join([format_table(["plan", "ms a call", "distance"], rows), "", self.verdict])


def predict(
    policy: Any,
    observations: Iterable[dict[str, Tensor]],
    output_dir: str | Path,
    latency: float,
    *,
    plans: Mapping[str, SamplingPlan] | None = None,
    engine: str = AUTO,
) -> Prediction:
    """Finds the plan of a policy that is predicted to be the best of those that take at most `latency` seconds a call.

    Args:
        policy: A policy of Diffusion Policy's kind, or a handle; it is left as it was.
        observations: What it samples at, dicts of tensors [1, ...] and lists of one text; a few dozen that it
            meets at work.
        output_dir: Gets ``plan.json`` and ``prediction.json``.
        plans: Names to what is tried, without warm starts, whose calls depend on each other; None: the default ones.
        engine: What runs them.

    Raises:
        ValueError: there are no observations, a plan keeps state, or none is fast enough; says which one comes nearest.
    """
    seen = list(observations)
    if not seen:
        raise ValueError("there are no observations to predict at: give at least one")
    with left_as_found(policy):
        if plans is None:
            plans = make_plans(policy, default_methods(policy, stateful=False), found_at(seen))
        stateful = [name for name, plan in plans.items() if plan.warm_start is not None]
        if stateful:
            raise ValueError(f"what warm starts do ({', '.join(stateful)}) shows in episodes only: give a task")
        variants = prepared(policy, plans, engine=engine)
        timed = measure_latencies(policy, seen[0], variants, 10)
        latencies = {name: found.p50 for name, found in timed.items()}
        fast = fast_enough(latencies, latency)
        apply(policy, SamplingPlan(), engine=engine)
        plain = _executed(policy, seen)
        distances = {}
        for name in tqdm(fast, "drawing actions", unit="plan"):
            switch(policy, variants[name])
            distances[name] = sliced_wasserstein(_executed(policy, seen), plain)
    best = min(distances, key=lambda name: distances[name])
    found = Prediction(best, plans[best], latencies, distances)
    output_dir = Path(output_dir)
    found.plan.save(output_dir / "plan.json")
    what = {"chosen": best, "verdict": found.verdict, "latencies": latencies, "distances": distances}
    write_json(output_dir / "prediction.json", what)
    return found


def _executed(policy: Any, observations: Iterable[dict[str, Tensor]]) -> Tensor:
    """Actions [N, NUM_DRAWS, n_action_steps, A] that would be executed, many draws at each observation: normalised, or
    as a handle returns them."""
    stream, found = CallStream(policy, 0), []
    for obs in observations:
        with stream:
            result, _ = timed_call(policy, as_batch([obs] * NUM_DRAWS))
        found.append(_executed_of(policy, result))
    return torch.stack(found)


def _executed_of(policy: Any, result: Any) -> Tensor:
    if isinstance(policy, PolicyHandle):
        return actions_of(policy, result)[:, : policy.n_action_steps]
    with torch.no_grad():
        return policy.normalizer["action"].normalize(result["action"])
