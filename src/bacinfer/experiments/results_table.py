"""The results table: one append-only CSV file, a row a run, that many processes may write at once.

::

    RESULTS/
        results_table.csv            one line per `Row`; of lines with one key the last counts
        runs/<method>-<key>/         what a row's `directory` names, relative to RESULTS
            configuration.json       what the row's key is the digest of
            schedule.json            `CacheSchedule.to_json`; missing where every block is computed at every step
            scores.json              {"scores": {seed: score}, "num_steps": {seed: n}, "failures": {seed: error}}
            fast_eval_log.json       the task's own log
            benchmark_results.json   everything that was measured
            eval_results.json        the summary; written last
            media/<seed>.mp4         if the episode was filmed
            calibration.npz          of the plain policy: observations, and its actions on them
        assets/<task>-<digest>/original|ddim_<N>/   schedules that had to be found first (see `bacinfer.assets`)

A row's `assets` is the directory with the similarity matrices, block errors and update steps that its schedule is from:
one like the last, or the one that was given. It is relative to RESULTS if it lies in there.

A writer that is killed leaves at most a last line without its line break; readers leave that out, and the next writer
cuts it off.
"""

from __future__ import annotations

import csv
import io
import os
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

TABLE_FILE = "results_table.csv"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method on one checkpoint: its configuration, and what was measured.

    None stands for what does not apply, such as the score interval of a single episode. Scores are over the episodes
    that ended; differences are to the plain policy's, seed by seed. Intervals are 95 % ones. Times are in seconds.

    Attributes:
        key: digest of the full configuration (see `Experiment.key`).
        method: the method as it is spelled in commands, `bac:10:5`; `label` the same for people.
        checkpoint_type: ``max`` or ``avg``; like `training_seed` None where the checkpoint was given by its path.
        num_inference_steps: K, the denoising steps that were run.
        num_caches, num_bu_blocks, metric: of the method, where it has them.
        mean_updates: how often a block is computed, averaged over the blocks.
        engine: what executed the schedule; None without one.
        sub_scores: the log's further results (``p1``, ``p_1``, …), each with its interval, as JSON.
        action_error: RMS difference to the plain policy's actions, normalised units, with equal noise.
        noise_error: the same between two draws of the plain policy's noise, to see an action error against.
        latency_p50, latency_p95, latency_p99: of one call at batch 1.
        plain_latency_p50: of the plain policy, timed just before in the same process; `speedup` is their ratio.
        flops: floating-point operations of one call, `flops_fraction` the share of the plain policy's.
        peak_memory: bytes; on CUDA of tensors, on a CPU of the whole process, during one call.
        policy_seconds, env_seconds: where the time of the episodes went.
        num_failed: episodes that a crashed environment ended.
        finished: when, UTC.
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
    first_seed: int
    n_test: int
    noise_seed: int
    n_envs: int | None
    score: float | None
    score_standard_error: float | None
    score_low: float | None
    score_high: float | None
    score_difference: float | None
    score_difference_low: float | None
    score_difference_high: float | None
    sub_scores: str | None
    num_failed: int
    action_error: float
    action_error_low: float | None
    action_error_high: float | None
    noise_error: float
    latency_p50: float
    latency_p95: float
    latency_p99: float
    latency_calls: int
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
    directory: str
    finished: str


class ResultsTable:
    """The table in a results directory; a directory without one has no rows."""

    def __init__(self, results_dir: str | Path) -> None:
        self.path = Path(results_dir) / TABLE_FILE

    def rows(self) -> list[Row]:
        """All rows, in the order of their first appearance.

        Raises:
            ValueError: the file is no results table, of another version, or one of its lines is damaged.
        """
        if not self.path.is_file():
            return []
        content = self.path.read_bytes()
        *lines, torn = content.split(b"\n")  # a line is a row; behind the last line break is what a killed writer left
        torn_header = not lines and _line(_HEADER).startswith(torn)
        if torn_header:
            return []
        if not lines or not _is_header(lines[0]):
            raise ValueError(
                f"{self.path} is no results table of this version: expected the columns {', '.join(_HEADER)}; found "
                f"{content[:200].decode(errors='replace').splitlines()[0]!r}. Choose another results directory"
            )
        found: dict[str, Row] = {}
        for number, line in enumerate(lines[1:], start=2):
            try:
                row = _parse(line)
            except (ValueError, csv.Error) as error:
                raise ValueError(
                    f"{self.path}, line {number}: {error}; delete the line, or restore it, and run the command again"
                ) from error
            found[row.key] = row
        return list(found.values())

    def find(self, key: str) -> Row | None:
        """The row of a configuration, if it was run."""
        return next((row for row in self.rows() if row.key == key), None)

    def check(self) -> None:
        """Makes the directory if need be.

        Raises:
            OSError: the table cannot be written.
            ValueError: as `rows`.
        """
        with self._locked():
            self.rows()

    def append(self, row: Row) -> None:
        """Adds a row, at once and for good: it is on the disk when this returns.

        Raises:
            ValueError: as `rows`.
        """
        line = _line([_write(value) for value in astuple(row)])
        with self._locked():
            self.rows()  # nothing is added to a file that cannot be read
            with self.path.open("a+b") as file:
                file.seek(0)
                end = file.read().rfind(b"\n") + 1
                file.truncate(end)
                file.write(line if end else _line(_HEADER) + line)
                file.flush()
                os.fsync(file.fileno())

    @contextmanager
    def claim(self, key: str) -> Iterator[None]:
        """Inside, no other process works on this configuration; the lock of a process that died is free."""
        locks = self.path.parent / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting for another process that evaluates this already ({lock.lock_file})", file=sys.stderr)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            yield


_HEADER = [field.name for field in fields(Row)]
_TYPES: dict[str, Any] = typing.get_type_hints(Row)


def _line(values: Sequence[str]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().encode()


def _is_header(line: bytes) -> bool:
    try:
        return _values(line) == _HEADER
    except (ValueError, csv.Error):
        return False


def _values(line: bytes) -> list[str]:
    return next(csv.reader([line.decode()], strict=True))


def _parse(line: bytes) -> Row:
    values = _values(line)
    if len(values) != len(_HEADER):
        raise ValueError(f"expected {len(_HEADER)} values, found {len(values)}")
    return Row(**{name: _read(text, _TYPES[name]) for name, text in zip(_HEADER, values, strict=True)})


def _write(value: Any) -> str:
    text = "" if value is None else str(value)
    if "\n" in text or "\r" in text:  # a line is a row
        raise ValueError(f"a value of the results table may have no line break: {text!r}")
    return text


def _read(text: str, kind: Any) -> Any:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if text == "" and type(None) in options:
        return None
    return next(option for option in options if option is not type(None))(text)
