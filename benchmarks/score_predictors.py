"""Which offline measure of a plan predicts its score?

Takes the methods of a directory that `bacinfer compare` left, with their scores, lets each act at the observations
of a few training episodes of the plain policy, many draws at each, and correlates what can be measured there with the
score:

    python benchmarks/score_predictors.py -c assets/pusht/pusht_transformer.ckpt -r outputs/comparison -o OUT
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from bacinfer.core.calls import CallStream
from bacinfer.experiments.experiment import Experiment
from bacinfer.experiments.method import parse_method
from bacinfer.experiments.plans import applied, make_plan
from bacinfer.experiments.store import ResultsStore, Row
from bacinfer.files import write_json
from bacinfer.measurement.distribution import energy_distance, sliced_wasserstein
from bacinfer.policies import build_policy, read_checkpoint
from bacinfer.tasks import make_task

Measure = Callable[[Tensor, Tensor, Any], float]


def rms(found: Tensor, plain: Tensor, _: Any) -> float:
    return float((found - plain).square().mean().sqrt())


def bias(found: Tensor, plain: Tensor, _: Any) -> float:
    return float((found - plain).mean(dim=1).square().mean().sqrt())


def executed(policy: Any, actions: Tensor) -> Tensor:
    start = policy.n_obs_steps - 1
    return actions[:, :, start : start + policy.n_action_steps]


def jitter(found: Tensor, plain: Tensor, policy: Any) -> float:
    seconds = [executed(policy, actions).diff(n=2, dim=2).square().mean().sqrt() for actions in (found, plain)]
    return float(seconds[0] - seconds[1])


def clipped(found: Tensor, plain: Tensor, _: Any) -> float:
    return float((found.abs() > 0.999).double().mean() - (plain.abs() > 0.999).double().mean())


def spread(found: Tensor, plain: Tensor, _: Any) -> float:
    """How much narrower the draws at one observation are."""
    return float(1 - found.std(dim=1).mean() / plain.std(dim=1).mean())


def disagreement(found: Tensor, plain: Tensor, policy: Any) -> float:
    """Consecutive chunks, where they overlap."""
    n = policy.n_action_steps
    return float((found[1:, :, :-n] - found[:-1, :, n:]).square().mean().sqrt())


MEASURES: Mapping[str, Measure] = {
    "RMS error at equal noise": rms,
    "RMS error of the mean": bias,
    "energy distance": lambda x, y, _: energy_distance(x, y),
    "energy distance, executed steps": lambda x, y, p: energy_distance(executed(p, x), executed(p, y)),
    "sliced Wasserstein, executed steps": lambda x, y, p: sliced_wasserstein(executed(p, x), executed(p, y)),
    "lost spread": spread,
    "disagreement of consecutive chunks": disagreement,
    "added jitter": jitter,
    "clipped entries": clipped,
    "FLOPs (fewer is worse)": lambda *_: float("nan"),  # from the row
}


def draws(policy: Any, episodes: Sequence[Sequence[dict[str, Tensor]]], num_draws: int) -> Tensor:
    """Normalised action chunks [N, draws, T, A] at N observations, episode by episode."""
    found = []
    for number, episode in enumerate(episodes):
        stream = CallStream(policy, number)
        for obs in episode:
            batch = {key: value.expand(num_draws, *value.shape[1:]).contiguous() for key, value in obs.items()}
            with stream, torch.no_grad():
                found.append(policy.normalizer["action"].normalize(policy.predict_action(batch)["action_pred"]))
    return torch.stack(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-c", "--checkpoint", required=True)
    parser.add_argument("-r", "--results", required=True, type=Path, help="what bacinfer compare wrote")
    parser.add_argument("-o", "--output_dir", required=True, type=Path)
    parser.add_argument("--episodes", type=int, default=3)
    parser.add_argument("--calls", type=int, default=12, help="observations of each episode")
    parser.add_argument("--draws", type=int, default=16, help="at each observation")
    args = parser.parse_args()

    checkpoint = read_checkpoint(args.checkpoint)
    policy, task = build_policy(checkpoint), make_task(checkpoint.cfg)
    rows = [row for row in ResultsStore(args.results).rows() if row.method not in ("plain", "lossless")]
    source = Experiment(checkpoint=args.checkpoint).schedule_assets(args.results).schedules(task)
    episodes = [list(task.observations(policy, demo, args.calls)) for demo in range(args.episodes)]
    plain = draws(policy, episodes, args.draws)
    table = []
    for row in tqdm(rows, unit="method"):
        method = parse_method(row.method)
        with applied(policy, method, make_plan(policy, method, source), "auto", None):
            found = draws(policy, episodes, args.draws)
        values = {name: measure(found, plain, policy) for name, measure in MEASURES.items()}
        values["FLOPs (fewer is worse)"] = -row.flops_fraction
        table.append(values)
    report(rows, table, args.output_dir)


def report(rows: Sequence[Row], table: Sequence[Mapping[str, float]], output_dir: Path) -> None:
    """Rank correlations with bootstrap intervals over the methods, and a picture."""
    output_dir.mkdir(parents=True, exist_ok=True)
    scores = np.array([row.score for row in rows])
    random = np.random.default_rng(0)
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, 5, sharey=True)
    correlations = {}
    for axes, name in zip(panels.flat, MEASURES, strict=True):
        values = np.array([row[name] for row in table])
        picks = [random.integers(len(scores), size=len(scores)) for _ in range(2000)]
        drawn = [spearmanr(values[pick], scores[pick]).statistic for pick in picks]
        low, high = np.nanpercentile(drawn, [2.5, 97.5])
        correlations[name] = [float(spearmanr(values, scores).statistic), float(low), float(high)]
        axes.scatter(values, scores, s=12)
        axes.set_title(f"{name}\n{correlations[name][0]:+.2f} [{low:+.2f}, {high:+.2f}]", fontsize=8)
    panels[0, 0].set_ylabel("score")
    panels[1, 0].set_ylabel("score")
    for suffix in ("png", "svg"):
        figure.savefig(output_dir / f"score_predictors.{suffix}")
    per_method = {row.method: {"score": row.score, **values} for row, values in zip(rows, table, strict=True)}
    write_json(output_dir / "score_predictors.json", {"correlations": correlations, "methods": per_method})
    for name, (value, low, high) in sorted(correlations.items(), key=lambda item: item[1][0]):
        print(f"{name:36} {value:+.2f} [{low:+.2f}, {high:+.2f}]")


if __name__ == "__main__":
    main()
