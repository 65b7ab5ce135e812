"""How long the analysis takes, stage by stage, and how much it writes.

    python benchmarks/analysis.py [--checkpoint CKPT] [--num_threads 2]

Without a checkpoint: a Push-T policy with random weights (8 layers, n_emb 128, horizon 16, 24 blocks, K = 100).
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler

from bacinfer.analysis.block_selection import write_selections
from bacinfer.analysis.block_statistics import BlockStatistics
from bacinfer.analysis.pipeline import DEFAULT_BUDGETS, find_schedules, write_pictures, write_schedules
from bacinfer.analysis.residuals import recording_source, recordings, write_recording
from bacinfer.analysis.similarity import METRICS
from bacinfer.assets import RunAssets
from bacinfer.core.calls import timed_call
from bacinfer.policies import load_policy
from bacinfer.policies.reference import DiffusionTransformerLowdimPolicy, LinearNormalizer, TransformerForDiffusion
from bacinfer.tasks import PushTTask

DEMO, SEED = 11, 11


def random_policy() -> DiffusionTransformerLowdimPolicy:
    torch.manual_seed(0)
    model = TransformerForDiffusion(
        input_dim=2,
        output_dim=2,
        horizon=16,
        n_obs_steps=2,
        cond_dim=20,
        n_layer=8,
        n_head=4,
        n_emb=128,
        causal_attn=True,
        obs_as_cond=True,
    )
    scheduler = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", clip_sample=True)
    policy = DiffusionTransformerLowdimPolicy(
        model, scheduler, horizon=16, obs_dim=20, action_dim=2, n_action_steps=8, n_obs_steps=2, obs_as_cond=True
    )
    pixels = {"obs": (torch.zeros(20), torch.full((20,), 512.0)), "action": (torch.zeros(2), torch.full((2,), 512.0))}
    policy.set_normalizer(LinearNormalizer.from_ranges(pixels))
    return policy.eval()


def run_stages(policy: Any, run: RunAssets) -> dict[str, float]:
    """Seconds of each stage of the analysis of one Push-T demo, all metrics, default budgets."""
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start

    statistics = BlockStatistics(METRICS)
    with stage("record the policy"):
        (recording,) = recordings(policy, PushTTask(), DEMO, 1, SEED)
    with stage("write residuals"):
        write_recording(run, recording, recording_source(policy, "", DEMO, SEED))
    with stage("similarity matrices, block errors"):
        statistics.add(recording.residuals)
    with stage("write matrices"):
        statistics.write(run.similarity_matrices, {})
    with stage("update steps"):
        schedules = find_schedules(statistics, METRICS, DEFAULT_BUDGETS)
    with stage("write steps and selections"):
        write_schedules(run, schedules)
        write_selections(run, statistics.block_errors())
    with stage("pictures"):
        write_pictures(run, statistics, schedules)
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a low-dimensional Push-T policy instead of random weights")
    parser.add_argument("--num_threads", type=int, default=2, help="default: 2")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.num_threads)
    policy = load_policy(args.checkpoint) if args.checkpoint else random_policy()

    obs = next(PushTTask().observations(policy, DEMO))
    timed_call(policy, obs)  # warm-up
    _, plain = timed_call(policy, obs)
    with tempfile.TemporaryDirectory() as directory:
        seconds = run_stages(policy, RunAssets(Path(directory)))
        sizes = {path: path.stat().st_size for path in Path(directory).rglob("*") if path.is_file()}

    print(f"{platform.processor() or platform.machine()}, {args.num_threads} threads, torch {torch.__version__}, CPU")
    print(f"K = {policy.num_inference_steps}, metrics {', '.join(METRICS)}, budgets {DEFAULT_BUDGETS}")
    print(f"{plain:8.2f} s  plain predict_action, for comparison")
    for name, elapsed in seconds.items():
        print(f"{elapsed:8.2f} s  {name}")
    print(f"{sum(seconds.values()):8.2f} s  in all")
    print(f"{sum(sizes.values()) / 1e6:8.2f} MB in {len(sizes)} files, the largest:")
    for path, size in sorted(sizes.items(), key=lambda item: -item[1])[:3]:
        print(f"{size / 1e6:8.2f} MB {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
