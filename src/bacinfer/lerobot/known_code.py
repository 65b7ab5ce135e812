"""Which code of lerobot's the adapters were written for."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from bacinfer.core.engines.fused.recognition import text_digest

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
