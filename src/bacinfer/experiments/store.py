"""Results: a directory a run, with its row in it; the table of results is the rows that are there.

::

    RESULTS/
        runs/<method>-<key>/         `Row.directory`
            configuration.json       what the row's key is the digest of
            plan.json                the `SamplingPlan` that was run; missing where the policy was left as it is
            scores.json              {"scores", "num_steps", "failures": each by episode seed}
            fast_eval_log.json       the task's own log
            benchmark_results.json   everything that was measured
            eval_results.json        the summary
            media/<seed>.mp4         if the episode was filmed
            calibration.npz          of the plain policy: observations, and its actions on them
            row.json                 the `Row`; written last: where it is, the others are
        assets/<task>-<digest>/original|ddim_<N>/   schedules that had to be found first (see `bacinfer.assets`)

A row's `assets` is the directory with the similarity matrices, block errors and update steps that its plan is from: one
like the last, or the one that was given. It is relative to RESULTS if it lies in there.

No file has two writers, and each appears whole or not at all: any number of processes, on any number of machines, may
add runs, and a directory of one can be copied or deleted by hand.
"""

from __future__ import annotations

import re
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bacinfer.files import read_json, write_json

RUNS = "runs"
ROW_FILE = "row.json"
_EARLIER_TABLE = "results_table.csv"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method on one checkpoint: its configuration, and what was measured.

    None stands for what does not apply, such as the score interval of a single episode. Scores are over the episodes
    that ended; differences are to the plain policy's, seed by seed. Intervals are 95 % ones. Times are in seconds.

    Attributes:
        key: digest of the full configuration (see `Experiment.key`).
        method: the method as it is spelled in commands, `bac:10:5`; `label` the same for people.
        checkpoint_type: ``max`` or ``avg``; like `training_seed` None where the checkpoint was given by its path.
        first_episode_seed, n_test: the episodes' seeds count up from the first; `noise_seed` is the sampling noise's.
        disturb: whether each episode was disturbed once.
        num_inference_steps: K, the denoising steps that were run.
        num_caches, num_bu_blocks, metric: of the method, where it has them.
        mean_updates: how often a block is computed, averaged over the blocks.
        engine: what executed the schedule; None without one.
        precision: of its products; None for the policy's own.
        sub_scores: the log's further results (``p1``, ``p_1``, …), each with its interval.
        action_error: RMS difference to the plain policy's actions, normalised units, with equal noise.
        noise_error: the same between two draws of the plain policy's noise, to see an action error against.
        latency_p50, latency_p95, latency_p99: of one call at batch 1.
        encoder_p50, denoising_p50: how its calls divide into the denoising loop and all before and after it, medians;
            None where the policy's loop is no method of its own.
        plain_latency_p50: of the plain policy, timed just before in the same process; `speedup` is their ratio.
        flops: floating-point operations of one call, `flops_fraction` the share of the plain policy's.
        peak_memory: bytes; on CUDA of tensors, on a CPU of the whole process, during one call.
        policy_seconds, env_seconds: where the time of the episodes went.
        num_failed: episodes that a crashed environment ended.
        finished: when, UTC.
        assets: what the plan was found from, see above.
    """

    key: str
    task: str
    method: str
    label: str
    checkpoint: str
    checkpoint_sha256: str
    checkpoint_type: str | None
    training_seed: int | None
    num_inference_steps: int
    num_caches: int | None
    num_bu_blocks: int | None
    metric: str | None
    mean_updates: float
    engine: str | None
    precision: str | None
    first_episode_seed: int
    n_test: int
    noise_seed: int
    n_envs: int | None
    disturb: bool
    score: float | None
    score_standard_error: float | None
    score_low: float | None
    score_high: float | None
    score_difference: float | None
    score_difference_low: float | None
    score_difference_high: float | None
    sub_scores: dict | None
    num_failed: int
    action_error: float
    action_error_low: float | None
    action_error_high: float | None
    noise_error: float
    latency_p50: float
    latency_p95: float
    latency_p99: float
    latency_calls: int
    encoder_p50: float | None
    denoising_p50: float | None
    plain_latency_p50: float
    actions_per_second: float
    speedup: float
    flops: int
    flops_fraction: float
    peak_memory: int | None
    policy_seconds: float
    env_seconds: float
    device: str
    hardware: str
    threads: int
    torch: str
    assets: str | None
    finished: str

    @property
    def directory(self) -> str:
        """Where the run's files lie, relative to the results directory."""
        return run_directory(self.method, self.key)


def run_directory(method: str, key: str) -> str:
    """Where the files of a run lie, relative to the results directory."""
    return f"{RUNS}/{re.sub(r'[^a-z0-9]+', '-', method)}-{key}"


_TYPES: dict[str, Any] = typing.get_type_hints(Row)


class ResultsStore:
    """The rows in a results directory; one that does not exist has none."""

    def __init__(self, results_dir: str | Path) -> None:
        self.directory = Path(results_dir)

    def rows(self) -> list[Row]:
        """All rows, in the order in which their runs finished.

        Raises:
            ValueError: a row is damaged, of another version or in another run's directory; or the results are those of
                an earlier version.
        """
        self._check_version()
        rows = [self._read(path) for path in sorted(self.directory.glob(f"{RUNS}/*/{ROW_FILE}"))]
        return sorted(rows, key=lambda row: row.finished)

    def find(self, key: str) -> Row | None:
        """The row of a configuration, if it was run. Raises as `rows`."""
        self._check_version()
        return next((self._read(path) for path in self.directory.glob(f"{RUNS}/*-{key}/{ROW_FILE}")), None)

    def write(self, row: Row) -> None:
        """Adds a row, in the place of one that the run had before."""
        write_json(self.directory / row.directory / ROW_FILE, asdict(row))

    def check(self) -> None:
        """Makes the directory if need be.

        Raises:
            OSError: nothing can be written there.
            ValueError: the results are those of an earlier version.
        """
        self._check_version()
        self._locks.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def claim(self, key: str) -> Iterator[None]:
        """Inside, no other process works on this configuration; the lock of a process that died is free."""
        self._locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._locks / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting for another process that evaluates this already ({lock.lock_file})", file=sys.stderr)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @property
    def _locks(self) -> Path:
        return self.directory / ".locks"

    def _check_version(self) -> None:
        table = self.directory / _EARLIER_TABLE
        if table.exists():
            raise ValueError(
                f"{table} is of an earlier version of bacinfer, which measured under other keys; this one cannot go on "
                f"with it. Choose another results directory, or move {table} away to begin anew in this one"
            )

    def _read(self, path: Path) -> Row:
        what_to_do = "delete the file, and run the command again"
        try:
            data = read_json(path)
        except ValueError as error:
            raise ValueError(f"{error}; {what_to_do}") from error
        if not isinstance(data, dict) or data.keys() != _TYPES.keys():
            raise ValueError(
                f"{path} is no row of this version: expected the entries {', '.join(_TYPES)}; found "
                f"{', '.join(data) if isinstance(data, dict) else repr(data)[:80]}; {what_to_do}"
            )
        for name, kind in _TYPES.items():
            if not isinstance(data[name], kind) and not (isinstance(0.0, kind) and isinstance(data[name], int)):
                raise ValueError(f"{path}: {name} is {data[name]!r}, expected {_name(kind)}; {what_to_do}")
        row = Row(**data)
        if row.directory != path.parent.relative_to(self.directory).as_posix():
            raise ValueError(f"{path} is the row of {row.directory}: rename its directory, or {what_to_do}")
        return row


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)
