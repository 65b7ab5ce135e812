"""``python -m bacinfer.evaluation.sweep`` is ``bacinfer sweep``."""

import sys

from bacinfer.commands.sweep import main

if __name__ == "__main__":
    sys.exit(main())
