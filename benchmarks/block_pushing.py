"""How often the shipped policy of block pushing solves both blocks, by methods, one episode after the other.

``python benchmarks/block_pushing.py EPISODES METHOD...``, methods as ``bacinfer compare --help`` lists them.
Episodes end when both blocks are in squares, which saves the rest of the 350 steps of the benchmark's runner;
environment and score are the same. The noise of an episode is its seed's. The package diffusion_policy and pybullet
are needed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bacinfer
from bacinfer.experiments.experiment import Experiment
from bacinfer.experiments.method import parse_methods
from bacinfer.experiments.plans import make_plan
from bacinfer.policies import build_policy, read_checkpoint
from bacinfer.tasks import make_task
from bacinfer.training.block_pushing_demonstrations import MAX_STEPS, flat, make_env

CHECKPOINT, ASSETS = "assets/block_pushing/block_pushing_transformer.ckpt", "assets/block_pushing/original"
FIRST_SEED = 100_000


def main(episodes: int, specs: list[str]) -> None:
    checkpoint, env = read_checkpoint(CHECKPOINT), make_env()
    policy, task = build_policy(checkpoint), make_task(checkpoint.cfg)
    source = Experiment(checkpoint=CHECKPOINT, assets_dir=ASSETS).schedule_assets(Path("outputs")).schedules(task)
    for method in parse_methods(",".join(specs)):
        bacinfer.apply(policy, make_plan(policy, method, source), stateful=True)
        results = [episode(policy, env, seed) for seed in range(FIRST_SEED, FIRST_SEED + episodes)]
        scores, steps = np.array(results).T
        print(
            f"{method.spec}: p1 {np.mean(scores > 0.4):.3f}, p2 {np.mean(scores > 0.9):.3f}, {steps.mean():.0f} steps"
        )
        bacinfer.remove(policy)


@torch.no_grad()
def episode(policy: Any, env: Any, seed: int) -> tuple[float, int]:
    """The score, 0.49 for one block and 1 for both, and the number of steps."""
    torch.manual_seed(seed)
    policy.reset()
    env.seed(seed)
    obs, rewards, steps = flat(env.reset()), set[float](), 0
    while True:
        obs[8:10] = 0
        actions = policy.predict_action({"obs": torch.from_numpy(obs).float()[None, None]})["action"][0]
        for action in actions.double().numpy():
            state, reward, done, _ = env.step(action)
            obs, steps = flat(state), steps + 1
            rewards.add(float(reward))
            if done or steps == MAX_STEPS:
                return sum(rewards), steps


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), sys.argv[2:])
