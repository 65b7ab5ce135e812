"""The files and the table that an evaluation leaves."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from bacinfer.assets import write_json
from bacinfer.command_options import DEFAULT_NUM_CACHES, cache_threshold
from bacinfer.evaluation.comparison import Comparison, Result
from bacinfer.evaluation.statistics import Estimate
from bacinfer.evaluation.table import format_table
from bacinfer.tasks import task_name
from bacinfer.tasks.base import policy_device

BENCHMARK_FILE = "benchmark_results.json"
RESULTS_FILE = "eval_results.json"
LOG_FILE = "fast_eval_log.json"


def write_results(
    output_dir: str | Path, comparison: Comparison, policy: Any, args: argparse.Namespace, cfg: DictConfig
) -> None:
    """Writes the three files of an evaluation.

    ``benchmark_results.json`` everything that was measured, with the settings, the hardware and the checkpoint's
    configuration; ``eval_results.json`` the summary that result tables are made of; ``fast_eval_log.json`` the task's
    own log of the evaluated policy. `eval_results.json` comes last: where it is, the others are.
    """
    output_dir = Path(output_dir)
    original, fast = comparison.original, comparison.fast
    settings = evaluation_settings(args, policy.num_inference_steps)
    write_json(
        output_dir / BENCHMARK_FILE,
        {
            "task": task_name(cfg),
            "original": _result(original),
            "fast": _result(fast),
            "speedup": fast.speedup(original),
            "flops": fast.cost.flops,
            "flops_fraction": fast.cost.flops / original.cost.flops,
            "action_error": fast.action_error(original),
            "score_difference": _estimate(fast.score_difference(original)),
            "actions_per_inference": policy.n_action_steps,
            "num_inference_steps": policy.num_inference_steps,
            "settings": settings,
            "hardware": _hardware(policy_device(policy)),
            "config": OmegaConf.to_container(cfg, resolve=True),
        },
    )
    write_json(output_dir / LOG_FILE, dict(fast.rollout.log))
    write_json(
        output_dir / RESULTS_FILE,
        {
            "mean_score": fast.rollout.mean_score,
            "speedup": fast.speedup(original),
            "flops": fast.cost.flops,
            "frequency": fast.cost.frequency,
            "cache_mode": settings["cache_mode"],
            "num_caches": settings["num_caches"],
            "num_bu_blocks": settings["num_bu_blocks"],
        },
    )


def evaluation_settings(args: argparse.Namespace, num_inference_steps: int) -> dict[str, Any]:
    """What was evaluated: the flags that the cache mode makes use of, None for the others."""
    mode = args.cache_mode
    optimal = mode == "optimal"
    return {
        "checkpoint": str(args.checkpoint),
        "device": str(args.device),
        "seed": args.seed,
        "n_test": args.n_test,
        "cache_mode": mode,
        "cache_threshold": cache_threshold(args, num_inference_steps) if mode == "threshold" else None,
        "optimal_steps_dir": str(args.optimal_steps_dir) if optimal else None,
        "num_caches": (args.num_caches or DEFAULT_NUM_CACHES) if optimal else args.num_caches,
        "metric": args.metric if optimal else None,
        "num_bu_blocks": args.num_bu_blocks if optimal else 0,
        "edit_steps": args.edit_steps,
    }


def format_results(comparison: Comparison, cache_mode: str) -> str:
    """The evaluation as a table, the plain policy first."""
    original, fast = comparison.original, comparison.fast
    results = {"original": original, cache_mode: fast}
    rows = [
        [
            name,
            str(result.score or f"{result.rollout.mean_score:.3f}"),
            f"{result.cost.latency.p50 * 1e3:.1f} ms",
            f"{result.cost.latency.p95 * 1e3:.1f} ms",
            f"{result.cost.frequency:.1f}",
            f"{result.cost.flops / 1e9:.3f}",
            f"{result.speedup(original):.2f}x",
        ]
        for name, result in results.items()
    ]
    header = ["mode", "score ± s.e.", "latency p50", "p95", "actions/s", "GFLOPs", "speedup"]
    lines = [format_table(header, rows)]
    if cache_mode != "original":
        lines.append(f"RMS action error (normalised units, same noise): {fast.action_error(original):.4f}")
        difference = fast.score_difference(original)
        if difference is not None and difference.low is not None:
            lines.append(
                f"score difference, paired over {difference.count} seeds: {difference.mean:+.3f}, "
                f"95 % interval [{difference.low:+.3f}, {difference.high:+.3f}]"
            )
    return "\n".join(lines)


def _result(result: Result) -> dict[str, Any]:
    return {
        "latency_p50": result.cost.latency.p50,
        "latency_p95": result.cost.latency.p95,
        "latency_calls": result.cost.latency.num_calls,
        "frequency": result.cost.frequency,
        "flops": result.cost.flops,
        "mean_score": result.rollout.mean_score,
        "score": _estimate(result.score),
        "rollout_policy_seconds": sum(result.rollout.policy_seconds),
        "rollout_env_seconds": result.rollout.env_seconds,
    }


def _estimate(estimate: Estimate | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    return {
        "mean": estimate.mean,
        "standard_error": estimate.standard_error,
        "interval_95": [estimate.low, estimate.high],
        "count": estimate.count,
    }


def _hardware(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch_size": 1,
    }
