"""How often the shipped policy of block pushing solves both blocks, by methods, one episode after the other.

``python benchmarks/block_pushing.py EPISODES METHOD...``, where a method is ``plain``, ``own:N`` or ``bac:M:B``.
Episodes end when both blocks are in squares, which saves the rest of the 350 steps of the benchmark's runner;
environment and score are the same. The noise of an episode is its seed's. The package diffusion_policy and pybullet
are needed.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch

import bacinfer
from bacinfer.training.block_pushing_demonstrations import MAX_STEPS, flat, make_env

ASSETS = "assets/block_pushing"
FIRST_SEED = 100_000


def main(episodes: int, methods: list[str]) -> None:
    policy, env = bacinfer.load_policy(f"{ASSETS}/block_pushing_transformer.ckpt"), make_env()
    for method in methods:
        apply(policy, method)
        results = [episode(policy, env, seed) for seed in range(FIRST_SEED, FIRST_SEED + episodes)]
        scores, steps = np.array(results).T
        print(f"{method}: p1 {np.mean(scores > 0.4):.3f}, p2 {np.mean(scores > 0.9):.3f}, {steps.mean():.0f} steps")


def apply(policy: Any, method: str) -> None:
    kind, *numbers = method.split(":")
    if kind == "bac":
        bacinfer.FastDiffusionPolicy.apply_cache(
            policy,
            optimal_steps_dir=f"{ASSETS}/original/optimal_steps/cosine",
            num_caches=int(numbers[0]),
            num_bu_blocks=int(numbers[1]),
        )
    else:
        sampler = bacinfer.Sampler("own", int(numbers[0])) if kind == "own" else None
        bacinfer.apply(policy, bacinfer.SamplingPlan(sampler=sampler))


@torch.no_grad()
def episode(policy: Any, env: Any, seed: int) -> tuple[float, int]:
    """The score, 0.49 for one block and 1 for both, and the number of steps."""
    torch.manual_seed(seed)
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
