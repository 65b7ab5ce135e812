"""Which code of lerobot's the adapters were written for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from bacinfer.core.engines.fused.recognition import program_stands_for, text_digest

RELEASE = "0.6.1"


def check_known(function: Callable[..., Any], digest: str) -> None:
    """Raises ValueError unless a function's text has that digest, so that the adapter computes what it computes.

    Args:
        function: What an adapter takes apart.
        digest: Of its text in the release of lerobot that the adapter was written for.
    """
    if text_digest(function) != digest:
        raise ValueError(
            f"{function.__module__}.{function.__qualname__} is another than that of lerobot {RELEASE}, for which "
            f"bacinfer knows what may be cached; installed is lerobot {version('lerobot')}. Install that release, or "
            f"describe the policy yourself, with bacinfer.register_layer and a bacinfer.PolicyHandle"
        )


def programs_stand_for(functions: Mapping[Callable[..., Any], str]) -> None:
    """Lets the fused engines' programs replace functions, those of them whose text has the digest beside them."""
    for function, digest in functions.items():
        if text_digest(function) == digest:
            program_stands_for(function)
