"""Writes rollouts of a policy, plain or cached, as a LeRobot data set (``bacinfer collect-data``)."""

from __future__ import annotations

import sys

from bacinfer.commands.collect_data import main

if __name__ == "__main__":
    sys.exit(main())
