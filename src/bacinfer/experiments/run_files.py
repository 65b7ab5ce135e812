"""The files of a run, and its row."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from bacinfer.experiments.evaluation import Cost, Result
from bacinfer.experiments.method import PLAIN, Method
from bacinfer.experiments.store import Row
from bacinfer.files import atomic_write, read_arrays, read_json, write_arrays, write_json
from bacinfer.measurement.action_error import as_batch
from bacinfer.measurement.latency import Latency, actions_per_second
from bacinfer.measurement.machine import hardware_name
from bacinfer.measurement.statistics import Estimate, estimate_proportion
from bacinfer.tasks import Rollout

BENCHMARK_FILE = "benchmark_results.json"
RESULTS_FILE = "eval_results.json"
LOG_FILE = "fast_eval_log.json"
SCORES_FILE = "scores.json"
PLAN_FILE = "plan.json"
CALIBRATION_FILE = "calibration.npz"


@dataclass(frozen=True, eq=False)
class PlainResult:
    """The plain policy's result, and what others need to be compared with it.

    Attributes:
        observations: those that its actions are of.
        noise_error: RMS difference between two draws of its noise.
    """

    result: Result
    observations: Sequence[dict[str, Any]]
    noise_error: float


def write_results(
    directory: Path, result: Result, plain: PlainResult, row: Row, method: Method, policy: Any, cfg: DictConfig
) -> None:
    """Writes the files of a run but its row, which comes last (see `store`).

    Args:
        policy: The plain policy.
        cfg: Its checkpoint's configuration.
    """
    rollout = result.rollout
    if method != PLAIN:
        result.plan.save(directory / PLAN_FILE)
    scores = {"scores": rollout.scores, "num_steps": dict(rollout.num_steps), "failures": failures(rollout)}
    write_json(directory / SCORES_FILE, scores)
    write_json(directory / LOG_FILE, {key: _finite(value) for key, value in rollout.log.items()})
    plain_frequency = actions_per_second(policy, result.plain_latency)
    write_json(
        directory / BENCHMARK_FILE,
        {
            "task": row.task,
            "method": row.method,
            "original": _measured(plain.result) | _times(result.plain_latency) | {"frequency": plain_frequency},
            "fast": _measured(result),
            "speedup": row.speedup,
            "flops": row.flops,
            "flops_fraction": row.flops_fraction,
            "peak_memory": row.peak_memory,
            "action_error": row.action_error,
            "noise_error": row.noise_error,
            "score_difference": _estimate(result.score_difference(plain.result)),
            "sub_scores": row.sub_scores,
            "actions_per_inference": policy.n_action_steps,
            "num_inference_steps": row.num_inference_steps,
            "settings": {name: getattr(row, name) for name in _SETTINGS},
            "hardware": {"device": row.hardware, "threads": row.threads, "torch": row.torch, "batch_size": 1},
            "config": OmegaConf.to_container(cfg, resolve=True),
        },
    )
    write_json(
        directory / RESULTS_FILE,
        {
            "mean_score": _finite(rollout.mean_score),
            "speedup": row.speedup,
            "flops": row.flops,
            "frequency": row.actions_per_second,
            "cache_mode": method.cache_mode,
            "num_caches": row.num_caches,
            "num_bu_blocks": row.num_bu_blocks or 0,
        },
    )


_SETTINGS = (
    *("checkpoint", "assets", "engine", "precision", "device"),
    *("first_episode_seed", "n_test", "noise_seed", "n_envs", "disturb"),
)


def copy_results(run_dir: Path, directory: Path) -> None:
    """Copies the files that BACInfer's users know; the summary last."""
    for name in (BENCHMARK_FILE, LOG_FILE, RESULTS_FILE):
        with atomic_write(directory / name) as temporary:
            shutil.copyfile(run_dir / name, temporary)


def write_plain_result(directory: Path, plain: PlainResult) -> None:
    batch = as_batch(plain.observations)
    arrays = {f"obs/{key}": values.cpu().numpy() for key, values in batch.items() if isinstance(values, Tensor)}
    arrays["actions"] = plain.result.actions.cpu().numpy()
    texts = {key: values for key, values in batch.items() if not isinstance(values, Tensor)}
    write_arrays(directory / CALIBRATION_FILE, arrays, {"noise_error": plain.noise_error, "texts": texts})


def read_plain_result(directory: Path, device: str | torch.device = "cpu") -> PlainResult:
    """What a run of the plain policy left.

    Raises:
        FileNotFoundError, ValueError: something of it is missing or damaged.
    """
    arrays, metadata = read_arrays(directory / CALIBRATION_FILE)
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    actions = tensors.pop("actions")
    batch = {name.removeprefix("obs/"): values for name, values in tensors.items()} | metadata["texts"]
    observations = [{key: values[i : i + 1] for key, values in batch.items()} for i in range(len(actions))]
    try:
        benchmark = read_json(directory / BENCHMARK_FILE)
        measured = benchmark["fast"]
        names = ("p50", "p95", "p99", "calls", "encoder", "denoising")
        latency = Latency(*(measured[f"latency_{name}"] for name in names))
        cost = Cost(latency, measured["frequency"], measured["flops"], measured["peak_memory"])
        log = read_json(directory / LOG_FILE)
        rollout = Rollout(
            log={key: value for key, value in log.items() if value is not None},  # (what was not finite)
            policy_seconds=[measured["rollout_policy_seconds"]],
            env_seconds=measured["rollout_env_seconds"],
        )
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{directory} is damaged ({error!r}); delete it and evaluate the plain policy again"
        ) from error
    result = Result(cost, latency, actions, rollout, benchmark["num_inference_steps"])
    return PlainResult(result, observations, metadata["noise_error"])


def make_row(result: Result, plain: PlainResult, *, device: str, **configuration: Any) -> Row:
    """The row of a run."""
    cost, rollout = result.cost, result.rollout
    score, difference = result.score, result.score_difference(plain.result)
    error = result.action_error(plain.result)
    subs = sub_scores(rollout.log, configuration["n_test"])
    return Row(
        **configuration,
        num_inference_steps=result.num_inference_steps,
        mean_updates=float(result.mean_updates),
        engine=result.summary.engine if result.summary else None,
        precision=result.summary.precision if result.summary else None,
        score=score.mean if score else _finite(rollout.mean_score),
        score_standard_error=score.standard_error if score else None,
        score_low=score.low if score else None,
        score_high=score.high if score else None,
        score_difference=difference.mean if difference else None,
        score_difference_low=difference.low if difference else None,
        score_difference_high=difference.high if difference else None,
        sub_scores={name: _estimate(sub) for name, sub in subs.items()} or None,
        num_failed=len(failures(rollout)),
        action_error=error.mean,
        action_error_low=error.low,
        action_error_high=error.high,
        noise_error=plain.noise_error,
        latency_p50=cost.latency.p50,
        latency_p95=cost.latency.p95,
        latency_p99=cost.latency.p99,
        latency_calls=cost.latency.num_calls,
        encoder_p50=cost.latency.encoder,
        denoising_p50=cost.latency.denoising,
        plain_latency_p50=result.plain_latency.p50,
        actions_per_second=cost.frequency,
        speedup=result.speedup,
        flops=cost.flops,
        flops_fraction=cost.flops / plain.result.cost.flops,
        peak_memory=cost.peak_memory,
        policy_seconds=sum(rollout.policy_seconds),
        env_seconds=rollout.env_seconds,
        device=device,
        hardware=hardware_name(torch.device(device)),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        finished=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
    )


def sub_scores(log: Mapping[str, Any], num_episodes: int) -> dict[str, Estimate]:
    """The shares of episodes in which parts of a task were done, ``p1``, ``p_1``, … in a runner's log."""
    matches = {key: re.fullmatch(r"(?:train|test)/(p_?\d+)", key) for key in log}
    return {match[1]: estimate_proportion(float(log[key]), num_episodes) for key, match in matches.items() if match}


def failures(rollout: Rollout) -> dict[int, str]:
    """The seeds whose environment crashed, and with what."""
    return dict(getattr(rollout, "failures", {}))


def _measured(result: Result) -> dict[str, Any]:
    return {
        **_times(result.cost.latency),
        "frequency": result.cost.frequency,
        "flops": result.cost.flops,
        "peak_memory": result.cost.peak_memory,
        "mean_score": _finite(result.rollout.mean_score),
        "score": _estimate(result.score),
        "rollout_policy_seconds": sum(result.rollout.policy_seconds),
        "rollout_env_seconds": result.rollout.env_seconds,
    }


def _times(latency: Latency) -> dict[str, Any]:
    return {
        "latency_p50": latency.p50,
        "latency_p95": latency.p95,
        "latency_p99": latency.p99,
        "latency_calls": latency.num_calls,
        "latency_encoder": latency.encoder,
        "latency_denoising": latency.denoising,
    }


def _estimate(estimate: Estimate | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    values = asdict(estimate)
    return values | {"interval_95": [values.pop("low"), values.pop("high")]}


def _finite(value: Any) -> Any:
    """None in the place of a number that JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
