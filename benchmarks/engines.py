"""How fast the engines are: medians of calls that are taken in turn, so that ratios hold on a busy machine too.

python benchmarks/engines.py                    # the published size, n_emb 256, on the CPU
python benchmarks/engines.py --device cuda      # with what else makes the plain policy faster there
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from bacinfer import CacheSchedule, FastDiffusionPolicy
from bacinfer.core.blocks import find_blocks
from bacinfer.core.engines.fused.policy_watch import PolicyWatch
from bacinfer.core.optimal_steps import read_optimal_schedule
from bacinfer.measurement.tables import format_table
from bacinfer.policies import Checkpoint
from bacinfer.policies.checkpoint import create_policy
from bacinfer.policies.reference import LinearNormalizer
from bacinfer.training.configuration import read_config

STEPS_DIR = "assets/pusht/original/optimal_steps/cosine"
NUM_CACHES, NUM_BU_BLOCKS, METRIC = 10, 5, "cosine"


def make_policy(device: str, n_emb: int, num_inference_steps: int = 100) -> Any:
    """Push-T's policy with random weights: speed does not depend on their values."""
    torch.manual_seed(0)
    K = num_inference_steps
    sizes = [f"policy.model.n_emb={n_emb}", f"policy.num_inference_steps={K}"]
    cfg = read_config([*sizes, f"policy.noise_scheduler.num_train_timesteps={K}"])
    policy = create_policy(Checkpoint(Path("benchmark"), cfg, {}))
    units = {name: (torch.zeros(width), torch.full((width,), 512.0)) for name, width in (("obs", 20), ("action", 2))}
    policy.set_normalizer(LinearNormalizer.from_ranges(units))
    return policy.to(device).eval()


def bac_schedule(policy: Any) -> CacheSchedule:
    """The shipped schedule with M = 10 and 5 BU blocks; for another K stretched, with as many updates."""
    blocks = find_blocks(policy.model)
    schedule = read_optimal_schedule(blocks, 100, STEPS_DIR, NUM_CACHES, METRIC, NUM_BU_BLOCKS).with_last_step()
    K = policy.num_inference_steps
    stretched = {key: [step * (K - 1) // 99 for step in steps] for key, steps in schedule.update_steps.items()}
    return CacheSchedule(K, stretched, f"{schedule.label}, stretched to K = {K}")


def observations(policy: Any, batch: int) -> dict[str, Tensor]:
    return {"obs": 512 * torch.rand(batch, 2, 20, device=policy.device)}


def timed(policy: Any, obs: dict[str, Tensor]) -> float:
    """Seconds of one call."""
    synchronise(policy)
    start = time.perf_counter()
    with torch.no_grad():
        policy.predict_action(obs)
    synchronise(policy)
    return time.perf_counter() - start


def synchronise(policy: Any) -> None:
    if policy.device.type == "cuda":
        torch.cuda.synchronize(policy.device)


def medians(policies: Mapping[str, Any], batch: int, calls: int) -> dict[str, float]:
    """The median of each policy's calls, in seconds, taken in turn; first calls do not count."""
    obs = observations(next(iter(policies.values())), batch)
    seconds: dict[str, list[float]] = {name: [] for name in policies}
    for call in range(calls + 1):
        for name, policy in policies.items():
            seconds[name].append(timed(policy, obs))
        if call == 0:
            seconds = {name: [] for name in policies}
    return {name: statistics.median(times) for name, times in seconds.items()}


def cached(policy: Any, engine: str, schedule: CacheSchedule | None = None) -> Any:
    """A copy with a cache, of the given schedule or without loss."""
    mode: dict[str, Any] = {"cache_mode": "original"} if schedule is None else {"schedule": schedule}
    return FastDiffusionPolicy.apply_cache(copy.deepcopy(policy), engine=engine, **mode)


def print_times(title: str, times: Mapping[str, float], plain: str) -> None:
    rows = [[name, f"{t * 1e3:.1f} ms", f"{times[plain] / t:.1f}x"] for name, t in times.items()]
    print(f"\n{title}\n{format_table(['', 'median', f'against {plain}'], rows)}", flush=True)


def measure_cpu(n_emb: int, calls: int) -> None:
    policy = make_policy("cpu", n_emb)
    schedule = bac_schedule(policy)
    fused = cached(policy, "fused", schedule)
    first = timed(fused, observations(policy, 1))
    print(f"first call, which compiles the program: {first:.1f} s (the C++ source too, if this machine never did)")
    every = {
        "plain": policy,
        "eager, BAC": cached(policy, "eager", schedule),
        "fused, BAC": fused,
        "fused, original": cached(policy, "fused"),
    }
    times = medians(every, 1, calls)
    print_times("batch 1", times, "plain")
    print_times("batch 1, the same schedule", {n: times[n] for n in ("eager, BAC", "fused, BAC")}, "eager, BAC")
    print_memory(fused)
    watch = PolicyWatch(fused)
    seconds = best(lambda: watch.unchanged(fused), repeats=100)
    print(f"looking for changes: {seconds * 1e6:.0f} µs a call, {seconds / times['fused, BAC']:.1%}")
    print_limits(policy, schedule, times["fused, BAC"])
    for batch in (8, 56):
        rest = {name: every[name] for name in ("eager, BAC", "fused, BAC")}
        print_times(f"batch {batch}", medians(rest, batch, max(2, calls // 5)), "eager, BAC")
    longer = make_policy("cpu", n_emb, 1000)
    pair = {"K = 100": fused, "K = 1000": cached(longer, "fused", bac_schedule(longer))}
    print_times("fused, as many updates", medians(pair, 1, calls), "K = 100")
    print_precision(policy, schedule)


def measure_cuda(n_emb: int, calls: int) -> None:
    policy = make_policy("cuda", n_emb)
    schedule = bac_schedule(policy)
    ddim = copy.deepcopy(policy)
    ddim.noise_scheduler = DDIMScheduler.from_config(policy.noise_scheduler.config)
    ddim.num_inference_steps = 10
    compiled = copy.deepcopy(policy)
    compiled.model.compile(mode="max-autotune")
    every = {
        "plain": policy,
        "plain, torch.compile(mode='max-autotune')": compiled,
        "DDIM, 10 steps": ddim,
        "eager, BAC": cached(policy, "eager", schedule),
        "fused, BAC": cached(policy, "fused", schedule),
        "cuda_graph, BAC": cached(policy, "cuda_graph", schedule),
        "cuda_graph, original": cached(policy, "cuda_graph"),
    }
    for batch in (1, 8, 56):
        print_times(f"batch {batch}", medians(every, batch, calls), "plain")
    print_memory(every["cuda_graph, BAC"])


def print_memory(policy: Any) -> None:
    summary = FastDiffusionPolicy.summary(policy)
    print(f"memory: buffers {summary.buffer_bytes / 1e6:.1f} MB, packed weights {summary.constant_bytes / 1e6:.1f} MB")


def print_limits(policy: Any, schedule: CacheSchedule, seconds: float) -> None:
    """How much of the machine's arithmetic and memory bandwidth a call uses."""
    side = torch.randn(2048, 2048)
    source = torch.randn(1 << 24)
    target = torch.empty_like(source)
    flops = 2 * side.shape[0] ** 3 / best(lambda: side @ side)
    bandwidth = 2 * source.nbytes / best(lambda: target.copy_(source))
    blocks = [block for block in find_blocks(policy.model) if block.kind != "mha_block"]  # those hardly count
    weights = sum(schedule.num_updates(block.key) * block.num_weights for block in blocks)
    rows = policy.horizon
    print(
        f"limits: a product of {len(side)}² runs at {flops / 1e9:.0f} GFLOP/s, a copy at {bandwidth / 1e9:.0f} GB/s; "
        f"fused: {2 * rows * weights / 1e9:.2f} GFLOP and {4 * weights / 1e9:.2f} GB of weights a call, "
        f"{2 * rows * weights / seconds / flops:.0%} and {4 * weights / seconds / bandwidth:.0%} of these"
    )


def best(function: Callable[[], Any], repeats: int = 5) -> float:
    """The shortest of several runs, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def print_precision(policy: Any, schedule: CacheSchedule) -> None:
    """RMS and largest difference of normalised actions to single precision, with equal noise."""

    def actions(policy: Any) -> Tensor:
        torch.manual_seed(1)
        with torch.no_grad():
            return policy.normalizer["action"].normalize(policy.predict_action(obs)["action_pred"]).double()

    obs = observations(policy, 8)
    exact = actions(cached(policy, "eager", schedule))
    fused = cached(policy, "fused", schedule)
    found = {"fused, single precision": actions(fused)}
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            found[f"fused, autocast to {dtype}"] = actions(fused)
    rows = [
        [name, f"{(a - exact).square().mean().sqrt():.1e}", f"{(a - exact).abs().max():.1e}"]
        for name, a in found.items()
    ]
    print("\ndifference to the eager engine in single precision, normalised actions")
    print(format_table(["", "RMS", "largest"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--n_emb", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--calls", type=int, default=15, help="of each policy (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(
        f"{name}, {args.threads} threads, torch {torch.__version__}\n"
        f"8 layers, 4 heads, n_emb {args.n_emb}, horizon 16, K = 100, BAC with M = {NUM_CACHES} and {NUM_BU_BLOCKS} BU "
        f"blocks; medians of {args.calls} calls"
    )
    measure = measure_cuda if args.device == "cuda" else measure_cpu
    measure(args.n_emb, args.calls)


if __name__ == "__main__":
    main()
