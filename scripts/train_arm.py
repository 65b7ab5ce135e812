"""Trains the robot arm policies that bacinfer ships, e.g. with ``task=pick_place``; see ``--help``."""

import sys

from bacinfer.commands.train import main

if __name__ == "__main__":
    sys.exit(main(config="train_arm"))
