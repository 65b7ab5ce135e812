"""How a schedule is executed."""

from bacinfer.core.engines.base import Engine
from bacinfer.core.engines.choose import (
    AUTO,
    ENGINES,
    LOSSLESS_ENGINES,
    PROGRAM_ENGINES,
    check_is_precision,
    choose_engine,
)
from bacinfer.core.engines.fused.native import PRECISIONS
from bacinfer.core.engines.planned_scheduler import sampled_by

__all__ = [
    "AUTO",
    "ENGINES",
    "LOSSLESS_ENGINES",
    "PRECISIONS",
    "PROGRAM_ENGINES",
    "Engine",
    "check_is_precision",
    "choose_engine",
    "sampled_by",
]
