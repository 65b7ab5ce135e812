"""Writes rollouts of a policy, plain or cached, as a LeRobot data set (``bacinfer collect-data``)."""

from __future__ import annotations

import sys

from bacinfer.evaluation.collect_lerobot_data import main

if __name__ == "__main__":
    sys.exit(main())
