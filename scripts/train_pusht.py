"""Trains the Push-T policy that bacinfer ships; see ``--help``."""

import sys

from bacinfer.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
