"""What a cache is asked for: the one rule of which mode is meant and which arguments have an effect in it.

`FastDiffusionPolicy.apply_cache` and the commands' flags go through it alike.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from bacinfer.core.schedule import even_interval

_ARGUMENTS: Mapping[str, tuple[str, ...]] = {  # those that have an effect in a mode
    "original": (),
    "threshold": ("cache_threshold", "num_caches"),
    "optimal": ("optimal_steps_dir", "num_caches", "metric", "num_bu_blocks", "refresh_last_step"),
    "edit": ("edit_steps",),
    "schedule": ("schedule",),
}
_NEEDED = {
    "optimal": ("optimal_steps_dir", "the directory that the analysis wrote, assets/<task>/original/optimal_steps/…"),
    "edit": ("edit_steps", "the update steps of all blocks, such as 0, 20, 40"),
}
CACHE_MODES = tuple(mode for mode in _ARGUMENTS if mode != "schedule")


class Default(int):
    """A default of a signature: equal to its number, and told from the same number by its type where that is given."""


DEFAULT_THRESHOLD = Default(5)
DEFAULT_METRIC = "cosine"


@dataclass(frozen=True)
class CacheRequest:
    """A cache mode and what was given for it.

    Attributes:
        mode: one of `CACHE_MODES`, or 'schedule' for a schedule of the caller's own.
        arguments: those arguments of `apply_cache` that were given and have an effect in this mode, by name.
    """

    mode: str
    arguments: Mapping[str, Any]

    def interval(self, num_inference_steps: int) -> int:
        """Of mode 'threshold': `cache_threshold` as given, ⌈K / num_caches⌉ if only that is given, otherwise 5.

        Raises:
            ValueError: if `num_caches` is not in 1..K.
        """
        if "num_caches" in self.arguments:
            return even_interval(num_inference_steps, self.arguments["num_caches"])
        return self.arguments.get("cache_threshold", DEFAULT_THRESHOLD)


def resolve_request(
    cache_mode: str | None,
    arguments: Mapping[str, Any],
    *,
    default_mode: str,
    harmless: Container[tuple[str, Any]] = (),
) -> CacheRequest:
    """The mode that is meant, and the given ones of its arguments.

    Args:
        cache_mode: one of `CACHE_MODES`; None means 'optimal' if `optimal_steps_dir` is given, otherwise
            `default_mode`.
        arguments: arguments of `apply_cache` by name; None and a `Default` are not given.
        default_mode: see `cache_mode`.
        harmless: names and values that are let pass where they have no effect: the defaults of a signature, which
            callers may write out.

    Raises:
        ValueError: if the mode is unknown or lacks what it needs, or an argument has no effect in it.
    """
    given = _given(arguments)
    if "schedule" in given:
        if cache_mode is not None:
            raise ValueError(f"pass either schedule= or cache_mode={cache_mode!r}, not both")
        mode = "schedule"
    else:
        mode = ("optimal" if "optimal_steps_dir" in given else default_mode) if cache_mode is None else cache_mode
        if mode not in CACHE_MODES:
            raise ValueError(f"unknown cache_mode {mode!r}; there are {', '.join(CACHE_MODES)}")

    check_effect(mode, given, harmless)
    if mode in _NEEDED and _NEEDED[mode][0] not in given:
        name, meaning = _NEEDED[mode]
        raise ValueError(f"cache_mode={mode!r} needs {name}, {meaning}")
    return CacheRequest(mode, {name: value for name, value in given.items() if name in _effective(mode, given)})


def check_effect(mode: str, arguments: Mapping[str, Any], harmless: Container[tuple[str, Any]] = ()) -> None:
    """Raises ValueError if an argument that is given has no effect in a mode; see `resolve_request`."""
    given = _given(arguments)
    for name, value in given.items():
        if name in _effective(mode, given) or (name, value) in harmless:
            continue
        what = "a schedule of your own" if mode == "schedule" else f"cache_mode={mode!r}"
        if name in _ARGUMENTS[mode]:
            what += f" and cache_threshold={given['cache_threshold']}"
        modes = " or ".join(repr(other) for other, names in _ARGUMENTS.items() if name in names and other != mode)
        raise ValueError(f"{name}={value} has no effect with {what}: leave it out, or choose cache_mode {modes}")


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None and not isinstance(value, Default)}


def _effective(mode: str, given: Container[str]) -> tuple[str, ...]:
    """The arguments that have an effect: `num_caches` sets the interval where `cache_threshold` does not."""
    if mode == "threshold" and "cache_threshold" in given:
        return ("cache_threshold",)
    return _ARGUMENTS[mode]
