"""Data sets that are written: rollouts as a LeRobotDataset v3.0."""
