"""The `bacinfer` command: one name for all commands of the package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Subcommand:
    """A module with `main(argv)`, which also runs as ``python -m <module>``."""

    module: str
    help: str


SUBCOMMANDS = {
    "steps": Subcommand(
        "bacinfer.analysis.get_optimal_cache_update_steps",
        "find the update steps of a checkpoint's blocks, and write them to an assets directory (start here)",
    ),
    "collect": Subcommand("bacinfer.analysis.collect_activations", "record the residuals of one run"),
    "schedule": Subcommand(
        "bacinfer.analysis.optimal_cache_scheduler", "search the update steps of one block from stored similarities"
    ),
    "bu": Subcommand("bacinfer.analysis.bu_block_selection", "select the high-error blocks for bubbling union"),
    "info": Subcommand("bacinfer.commands.info", "print the update steps and counts of a schedule"),
    "run": Subcommand("bacinfer.analysis.run_policy", "run a policy once, with or without a cache"),
    "calibrate": Subcommand(
        "bacinfer.commands.calibrate", "find the fastest way to run a policy that loses nothing, by episodes"
    ),
    "eval": Subcommand("bacinfer.commands.eval", "score, latency and FLOPs of the plain and the cached policy"),
    "compare": Subcommand(
        "bacinfer.commands.compare", "evaluate a set of methods, caches and DDIM, and draw the Pareto picture"
    ),
    "bench": Subcommand(
        "bacinfer.commands.bench", "how fast a checkpoint's policy is on this machine, and the machine"
    ),
    "report": Subcommand("bacinfer.commands.report", "write a results directory as one HTML page, with its pictures"),
    "batch": Subcommand("bacinfer.commands.batch", "evaluate many tasks, seeds and checkpoints, into one CSV"),
    "sweep": Subcommand("bacinfer.commands.sweep", "evaluate all combinations of settings, also on a cluster"),
    "collect-data": Subcommand("bacinfer.commands.collect_data", "write rollouts as a LeRobot data set"),
    "lerobot": Subcommand("bacinfer.commands.lerobot", "write checkpoints that LeRobot's own commands run by a plan"),
    "train": Subcommand("bacinfer.commands.train", "train a policy of Push-T or block pushing on demonstrations"),
    "demo": Subcommand("bacinfer.commands.demo", "the quick start: analyse, schedule, roll out, compare"),
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in SUBCOMMANDS:
        print(f"error: there is no 'bacinfer {name}'\n\n{usage()}", file=sys.stderr)
        return 2
    sys.argv[0] = f"bacinfer {name}"  # argparse and Hydra print it in their usage
    module = importlib.import_module(SUBCOMMANDS[name].module)
    return module.main(rest)


def usage() -> str:
    width = max(map(len, SUBCOMMANDS))
    rows = [f"  {name:<{width}}  {subcommand.help}" for name, subcommand in SUBCOMMANDS.items()]
    return "\n".join(
        ["usage: bacinfer COMMAND [OPTIONS]", "", "commands:", *rows, "", "'bacinfer COMMAND --help' explains each."]
    )


if __name__ == "__main__":
    sys.exit(main())
