"""How a schedule is executed."""

from bacinfer.core.engines.base import Engine
from bacinfer.core.engines.choose import AUTO, ENGINES, LOSSLESS_ENGINES, choose_engine

__all__ = ["AUTO", "ENGINES", "LOSSLESS_ENGINES", "Engine", "choose_engine"]
