"""Ways to make a policy cheaper, as commands spell them: ``own:10``, ``bac:10:5``, ``ddim:10+warm:40:3``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bacinfer.analysis.similarity import find_metric
from bacinfer.core.cache_request import DEFAULT_METRIC
from bacinfer.core.sampler import KINDS, Sampler
from bacinfer.core.warm_start import WarmStart, evenly_spaced

GRAMMAR = """\
A method says which denoising steps are taken, from where, and what is computed at them: [STEPS][+WARM][+CACHE].
STEPS: all K of the policy's own scheduler, or
  own:N            N steps of the policy's own scheduler
  ddim:N           N deterministic DDIM steps; ddim:N:ETA adds the share ETA of DDPM's noise
  dpm:N            N steps of DPM-Solver++, of second order; likewise dpm:N:ETA
  own:T-T-T        these timesteps, from noisy to clean; likewise ddim:T-T-T[:ETA] and dpm:T-T-T[:ETA]
WARM: every call starts from noise, or
  warm:T:N         from the last call's actions, noised to timestep T, by N steps from there to 0, of DPM-Solver++ after
                   dpm:..., otherwise of DDIM; warm:T:N:D starts from noise where the result is further than D (RMS,
                   normalised) from what was planned before
  warm:T-T-T       likewise, by these timesteps
CACHE: everything at every step, or
  lossless         the same in the engine that runs the caches: only its exact savings
  uniform:M        all blocks at M evenly spaced steps: every ceil(N / M)-th of N
  threshold:N      all blocks at every N-th step
  edit:A-B-C       all blocks at these steps
  unified:M        one ACS schedule for all blocks: M steps, from the mean similarity over the blocks, and the last one
  blockwise:M      an ACS schedule for each block: M steps, and the last one
  bac:M:N          BAC: blockwise:M, then bubbling union of the N blocks with the largest error
  sens:N           each block as often as it matters to the action, all in the computation of N steps
A schedule is from cosine similarities at the method's own steps; unified:M:l1, blockwise:M:l1 and bac:M:N:l1 name
another metric. sens:N is from derivatives of the actions at them. plain is the policy as it is."""


@dataclass(frozen=True)
class _Kind:
    """What is said of all methods with one `Method.cache`.

    Attributes:
        label: in tables and pictures.
        cache_mode: the nearest one of `apply_cache`, which BACInfer's records have.
        arguments: what follows the kind in a method's spelling, as a regular expression.
    """

    label: str
    cache_mode: str
    arguments: str = ""


SAMPLER_NAMES = {"own": "own", "ddim": "DDIM", "dpm": "DPM++"}
"""In tables and pictures, by the samplers' kinds."""
_NUMBER = r"\d+(?:\.\d+)?"
_METRIC = r"(?::(?P<metric>[a-z]\w*))?"
_KINDS = {
    "plain": _Kind("plain", "original"),
    "lossless": _Kind("lossless", "original"),
    "uniform": _Kind("uniform", "threshold", r":(?P<num_caches>\d+)"),
    "threshold": _Kind("every", "threshold", r":(?P<interval>\d+)"),
    "edit": _Kind("steps", "edit", r":(?P<steps>\d+(?:-\d+)*)"),
    "unified": _Kind("unified ACS", "edit", r":(?P<num_caches>\d+)" + _METRIC),
    "blockwise": _Kind("block-wise ACS", "optimal", r":(?P<num_caches>\d+)" + _METRIC),
    "bac": _Kind("BAC", "optimal", r":(?P<num_caches>\d+):(?P<num_bu_blocks>\d+)" + _METRIC),
    "sens": _Kind("sensitivity", "optimal", rf":(?P<budget>{_NUMBER})"),
}


@dataclass(frozen=True)
class Method:
    """How a policy samples an action.

    Attributes:
        cache: which steps compute the blocks: one of ``plain`` and ``lossless`` (all), ``uniform``, ``threshold``,
            ``edit``, ``unified``, ``bac``, ``sens``.
        num_caches: M of uniform, unified and bac.
        num_bu_blocks: of bac; 0 is block-wise ACS.
        metric: of unified and bac, whose schedules are found from the policy's residuals.
        interval: of threshold.
        steps: of edit.
        budget: N of sens, in evaluations of all blocks a call.
        sampler: the denoising steps; None for the policy's own K.
        warm_start: without a cache, as `cache` is that of its steps too.

    Raises:
        ValueError: a number below 1 (below 0 for `num_bu_blocks`), an unknown metric, or a warm start with a schedule
            that is found from trajectories that start from noise.
    """

    cache: str = "plain"
    num_caches: int | None = None
    num_bu_blocks: int | None = None
    metric: str | None = None
    interval: int | None = None
    steps: tuple[int, ...] | None = None
    budget: float | None = None
    sampler: Sampler | None = None
    warm_start: WarmStart | None = None

    def __post_init__(self) -> None:
        for name, least in (("num_caches", 1), ("num_bu_blocks", 0), ("interval", 1), ("budget", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.metric is not None:
            find_metric(self.metric)
        if self.warm_start is not None and self.cache not in ("plain", "lossless", "uniform", "threshold"):
            raise ValueError(
                f"{self.cache} goes with trajectories that start from noise; with a warm start there are uniform:M and "
                f"threshold:N, which hold for its steps too"
            )

    @property
    def kind(self) -> str:
        """What the spelling of the method's cache begins with."""
        return "blockwise" if self.num_bu_blocks == 0 else self.cache

    @property
    def as_it_is(self) -> bool:
        """Whether the policy's own code runs, be it with another sampler: no engine."""
        return self.cache == "plain" and self.warm_start is None

    @property
    def spec(self) -> str:
        """The method as `parse_method` reads it; equal methods have equal ones."""
        parts = [self.kind]
        if self.steps is not None:
            parts.append("-".join(map(str, self.steps)))
        parts += [str(n) for n in (self.num_caches, self.interval, self.num_bu_blocks or None) if n is not None]
        parts += [f"{self.budget:g}"] if self.budget is not None else []
        parts += [self.metric] if self.metric not in (None, DEFAULT_METRIC) else []
        sampler = None if self.sampler is None else self.sampler.spec
        return self._joined("+", sampler, None if self.warm_start is None else _warm_spec(self.warm_start), parts)

    @property
    def label(self) -> str:
        """The method's name in tables and pictures."""
        words = [_KINDS[self.kind].label]
        words += [" ".join(map(str, self.steps))] if self.steps is not None else []
        words += [f"{n:g}" for n in (self.num_caches, self.interval, self.budget) if n is not None]
        words[-1] += f", BU {self.num_bu_blocks}" if self.num_bu_blocks else ""
        words += [f"({self.metric})"] if self.metric not in (None, DEFAULT_METRIC) else []
        warm = self.warm_start
        return self._joined(
            " + ",
            None if self.sampler is None else _sampler_label(self.sampler),
            None if warm is None else f"warm {_steps_label(warm.sampler)}",
            [" ".join(words)],
        )

    @property
    def cache_mode(self) -> str:
        """The nearest mode of `apply_cache`, which BACInfer's records have."""
        return _KINDS[self.kind].cache_mode

    def _joined(self, separator: str, sampler: str | None, warm: str | None, cache: list[str]) -> str:
        parts = [part for part in (sampler, warm) if part is not None]
        if self.cache != "plain" or not parts:
            parts.append(":".join(cache))
        return separator.join(parts)


PLAIN = Method()


def parse_method(spec: str) -> Method:
    """The method that a string such as ``own:10+bac:5:5`` names (see `GRAMMAR`).

    Raises:
        ValueError: it names none; says what there is.
    """
    sampler, warm_start, cache = None, None, "plain"
    parts = spec.split("+")
    try:
        if parts[0].startswith(tuple(f"{kind}:" for kind in KINDS)):
            sampler = _parse_sampler(parts.pop(0))
        if parts and parts[0].startswith("warm:"):
            warm_start = _parse_warm_start(parts.pop(0), _warm_kind(sampler))
        if len(parts) > 1:
            raise ValueError("there is no such method")
        return _parse_cache(parts[0] if parts else cache, sampler, warm_start)
    except ValueError as error:
        raise ValueError(f"method {spec!r}: {error}; there are\n{GRAMMAR}") from error


def parse_methods(text: str) -> list[Method]:
    """Methods separated by commas, each once; see `parse_method`."""
    return list(dict.fromkeys(parse_method(spec.strip()) for spec in text.split(",")))


_STEPS = r"(?P<steps>\d+(?:-\d+)*)"


def _parse_sampler(spec: str) -> Sampler:
    match = re.fullmatch(rf"(?P<kind>\w+):{_STEPS}(?::(?P<eta>{_NUMBER}))?", spec)
    if match is None:
        raise ValueError(f"{spec} is no sampler")
    timesteps = _integers(match["steps"])
    steps = timesteps if len(timesteps) > 1 else timesteps[0]
    return Sampler(match["kind"], steps, float(match["eta"] or 0))


def _warm_kind(sampler: Sampler | None) -> str:
    """Of the steps after a warm start: they have a formula, which the policy's own need not have."""
    return "ddim" if sampler is None or sampler.kind == "own" else sampler.kind


def _parse_warm_start(spec: str, kind: str) -> WarmStart:
    match = re.fullmatch(rf"warm:(?:(?P<start>\d+):(?P<count>\d+)|{_STEPS})(?::(?P<distance>{_NUMBER}))?", spec)
    if match is None:
        raise ValueError(f"{spec} is no warm start")
    if match["count"] is not None:
        timesteps = evenly_spaced(int(match["start"]), int(match["count"]))
    else:
        timesteps = _integers(match["steps"])
    distance = None if match["distance"] is None else float(match["distance"])
    return WarmStart(Sampler(kind, timesteps), max_disagreement=distance)


def _warm_spec(warm: WarmStart) -> str:
    timesteps = warm.sampler.timesteps or ()
    start, count = timesteps[0], len(timesteps)
    short = count <= start + 1 and evenly_spaced(start, count) == timesteps
    steps = f"{start}:{count}" if short else "-".join(map(str, timesteps))
    return f"warm:{steps}" + ("" if warm.max_disagreement is None else f":{warm.max_disagreement:g}")


def _sampler_label(sampler: Sampler) -> str:
    return f"{SAMPLER_NAMES[sampler.kind]} {_steps_label(sampler)}" + (f", eta {sampler.eta:g}" if sampler.eta else "")


def _steps_label(sampler: Sampler) -> str:
    return str(sampler.steps) if sampler.timesteps is None else " ".join(map(str, sampler.timesteps))


def _integers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("-")))


def _parse_cache(spec: str, sampler: Sampler | None, warm_start: WarmStart | None) -> Method:
    kind = spec.partition(":")[0]
    match = re.fullmatch(kind + _KINDS[kind].arguments, spec) if kind in _KINDS else None
    if match is None:
        raise ValueError("there is no such method")
    found: dict[str, str | None] = match.groupdict()
    metric = found.pop("metric") or DEFAULT_METRIC if "metric" in found else None
    steps = found.pop("steps", None)
    budget = found.pop("budget", None)
    numbers = {name: int(number) for name, number in found.items() if number is not None}
    if kind == "blockwise":
        kind, numbers["num_bu_blocks"] = "bac", 0
    return Method(
        kind,
        steps=None if steps is None else _integers(steps),
        budget=None if budget is None else float(budget),
        metric=metric,
        sampler=sampler,
        warm_start=warm_start,
        **numbers,
    )
