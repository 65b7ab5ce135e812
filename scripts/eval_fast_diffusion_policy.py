"""Evaluates a policy with and without its cache: scores, latency and FLOPs (``bacinfer eval``)."""

from __future__ import annotations

import sys

from bacinfer.commands.eval import main

if __name__ == "__main__":
    sys.exit(main())
