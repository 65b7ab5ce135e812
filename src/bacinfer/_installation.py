"""What is installed, and whether it may run here."""

import sys
from importlib.metadata import version

if sys.platform == "win32":
    raise ImportError(
        "bacinfer runs on Linux and macOS, and was never tested on Windows, so it is refused there; "
        "Windows' subsystem for Linux (WSL) is Linux"
    )

__version__ = version("bacinfer")
