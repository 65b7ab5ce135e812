"""Ways to make a policy cheaper, as commands spell them: ``plain``, ``ddim:10``, ``bac:10:5``, ``ddim:16+bac:8:5``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from bacinfer.analysis.similarity import find_metric
from bacinfer.core.cache_request import DEFAULT_METRIC

GRAMMAR = """\
plain            all K steps of the policy's own scheduler, nothing cached
lossless         the same in the engine that runs the caches: only its exact savings
ddim:N           N deterministic DDIM steps instead of the policy's K
uniform:M        all blocks at M evenly spaced steps: every ceil(K / M)-th
threshold:N      all blocks at every N-th step
edit:A-B-C       all blocks at these steps
unified:M        one ACS schedule for all blocks: M steps, from the mean similarity over the blocks, and the last one
blockwise:M      an ACS schedule for each block: M steps, and the last one
bac:M:N          BAC: blockwise:M, then bubbling union of the N blocks with the largest error
ddim:N+METHOD    one of the above on DDIM's N steps, with schedules for those
A schedule is from cosine similarities; unified:M:l1, blockwise:M:l1 and bac:M:N:l1 name another metric."""


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
}


@dataclass(frozen=True)
class Method:
    """How a policy samples an action.

    Attributes:
        cache: which steps compute the blocks: one of ``plain`` and ``lossless`` (all), ``uniform``, ``threshold``,
            ``edit``, ``unified``, ``bac``.
        num_caches: M of uniform, unified and bac.
        num_bu_blocks: of bac; 0 is block-wise ACS.
        metric: of unified and bac, whose schedules are found from the policy's residuals.
        interval: of threshold.
        steps: of edit.
        ddim_steps: N; None for the policy's own scheduler and K.

    Raises:
        ValueError: a number below 1 (below 0 for `num_bu_blocks`), or an unknown metric.
    """

    cache: str = "plain"
    num_caches: int | None = None
    num_bu_blocks: int | None = None
    metric: str | None = None
    interval: int | None = None
    steps: tuple[int, ...] | None = None
    ddim_steps: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("num_caches", 1), ("num_bu_blocks", 0), ("interval", 1), ("ddim_steps", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.metric is not None:
            find_metric(self.metric)

    @property
    def kind(self) -> str:
        """What the method's spelling begins with, DDIM apart."""
        return "blockwise" if self.num_bu_blocks == 0 else self.cache

    @property
    def spec(self) -> str:
        """The method as `parse_method` reads it; equal methods have equal ones."""
        parts = [self.kind]
        if self.steps is not None:
            parts.append("-".join(map(str, self.steps)))
        parts += [str(n) for n in (self.num_caches, self.interval, self.num_bu_blocks or None) if n is not None]
        parts += [self.metric] if self.metric not in (None, DEFAULT_METRIC) else []
        return self._with_ddim(f"ddim:{self.ddim_steps}", "+", ":".join(parts))

    @property
    def label(self) -> str:
        """The method's name in tables and pictures."""
        words = [_KINDS[self.kind].label]
        words += [" ".join(map(str, self.steps))] if self.steps is not None else []
        words += [str(n) for n in (self.num_caches, self.interval) if n is not None]
        label = " ".join(words) + (f", BU {self.num_bu_blocks}" if self.num_bu_blocks else "")
        label += f" ({self.metric})" if self.metric not in (None, DEFAULT_METRIC) else ""
        return self._with_ddim(f"DDIM {self.ddim_steps}", " + ", label)

    @property
    def cache_mode(self) -> str:
        """The nearest mode of `apply_cache`, which BACInfer's records have."""
        return _KINDS[self.kind].cache_mode

    def _with_ddim(self, ddim: str, separator: str, cache: str) -> str:
        if self.ddim_steps is None:
            return cache
        return ddim if self.cache == "plain" else f"{ddim}{separator}{cache}"


PLAIN = Method()


def parse_method(spec: str) -> Method:
    """The method that a string such as ``bac:10:5`` names (see `GRAMMAR`).

    Raises:
        ValueError: it names none; says what there is.
    """
    try:
        ddim = re.fullmatch(r"ddim:(\d+)(?:\+(.+))?", spec)
        if ddim is None:
            return _parse_cache(spec)
        return replace(_parse_cache(ddim[2]) if ddim[2] else PLAIN, ddim_steps=int(ddim[1]))
    except ValueError as error:
        raise ValueError(f"method {spec!r}: {error}; there are\n{GRAMMAR}") from error


def parse_methods(text: str) -> list[Method]:
    """Methods separated by commas, each once; see `parse_method`."""
    return list(dict.fromkeys(parse_method(spec.strip()) for spec in text.split(",")))


def _parse_cache(spec: str) -> Method:
    kind = spec.partition(":")[0]
    match = re.fullmatch(kind + _KINDS[kind].arguments, spec) if kind in _KINDS else None
    if match is None:
        raise ValueError("there is no such method")
    found: dict[str, str | None] = match.groupdict()
    metric = found.pop("metric") or DEFAULT_METRIC if "metric" in found else None
    steps = found.pop("steps", None)
    numbers = {name: int(number) for name, number in found.items() if number is not None}
    if kind == "blockwise":
        kind, numbers["num_bu_blocks"] = "bac", 0
    return Method(kind, steps=tuple(map(int, steps.split("-"))) if steps else None, metric=metric, **numbers)
