"""Assets -> what a schedule comes to: update steps and update counts, before and after bubbling union."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bacinfer import assets
from bacinfer.commands.options import add_debug_argument, command_line, path_argument
from bacinfer.core.bubbling import bubbling_union, layer_and_kind
from bacinfer.core.optimal_steps import stored_selection
from bacinfer.core.schedule import CacheSchedule
from bacinfer.files import contents
from bacinfer.tasks.table import TASKS

BACINFER_NUM_STEPS = 100  # K of its policies; its steps files do not record it


def read_schedule(run: assets.RunAssets, metric: str, num_caches: int) -> CacheSchedule:
    """The update steps that the scheduler gave to each block, in the order of the forward.

    Raises:
        FileNotFoundError: if there are none for this metric and number; lists those that are there.
        ValueError: if a file is damaged.
    """
    steps_dir = run.steps_dir(metric)
    stored = assets.read_schedule(steps_dir, num_caches, metric)
    if stored is None:
        found = [f"{name} {number}" for name, number in assets.available_schedules(steps_dir)]
        there = f"has those for {', '.join(found)}" if found else contents(steps_dir)
        raise FileNotFoundError(f"no update steps for {metric} {num_caches} in {steps_dir}, which {there}")
    steps = {block: tuple(steps) for block, steps in stored.update_steps.items()}
    return CacheSchedule(stored.num_inference_steps or BACINFER_NUM_STEPS, steps, f"{metric}, M = {num_caches}")


def applied_schedule(run: assets.RunAssets, schedule: CacheSchedule, num_bu_blocks: int) -> CacheSchedule:
    """What `apply_cache` makes of a schedule: bubbling union, and an update of all blocks at the last step.

    Raises:
        FileNotFoundError: if no errors to select blocks by are there; lists what is.
    """
    if num_bu_blocks:
        selected = stored_selection(run, num_bu_blocks)
        if selected is None:
            path = run.block_errors
            raise FileNotFoundError(f"no {path.name} in {path.parent}, which {contents(path.parent)}")
        schedule = bubbling_union(schedule, selected)
    return schedule.with_last_step()


def steps_text(before: CacheSchedule, after: CacheSchedule) -> str:
    """Each block's update steps as the scheduler found them, and as they are run."""
    lines = [f"{before.label}; as run: {after.label}, and the last step ({after.num_inference_steps - 1})"]
    for block, steps in before.update_steps.items():
        lines.append(f"{block}\n  ACS    {_listed(steps)}\n  as run {_listed(after.update_steps[block])}")
    return "\n".join(lines)


def counts_text(before: CacheSchedule, after: CacheSchedule) -> str:
    """How many updates each kind of block has, a table of averages over the layers."""
    kinds = list(dict.fromkeys(layer_and_kind(block)[1] for block in before.update_steps))
    rows = [(kind, [b for b in before.update_steps if layer_and_kind(b)[1] == kind]) for kind in kinds]
    rows.append(("all blocks", list(before.update_steps)))
    lines = [f"{after.label}: updates in {after.num_inference_steps} steps, the last one included"]
    width = max(12, *(len(name) + 1 for name, _ in rows))
    lines.append(f"{'':{width}}{'ACS':>8}{'as run':>8}{'fewest':>8}{'most':>8}{'blocks':>8}")
    for name, blocks in rows:
        counts = [after.num_updates(block) for block in blocks]
        found = sum(before.num_updates(block) for block in blocks) / len(blocks)
        lines.append(
            f"{name:{width}}{found:8.2f}{sum(counts) / len(counts):8.2f}{min(counts):8}{max(counts):8}{len(counts):8}"
        )
    return "\n".join(lines)


def _listed(steps: Sequence[int]) -> str:
    return f"{len(steps):3}: {' '.join(map(str, steps))}"


# -- the command -------------------------------------------------------------------------------------------------

REPORTS = {"steps": steps_text, "counts": counts_text}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bacinfer.commands.info",
        description="Shows the schedules that the analysis left in ASSETS/TASK/original.",
    )
    parser.add_argument(
        "report",
        choices=REPORTS,
        help="steps: each block's update steps, as found and as run; counts: how many, for each kind of block",
    )
    parser.add_argument(
        "--task", required=True, type=path_argument, metavar="TASK", help="name of the task's folder in ASSETS"
    )
    parser.add_argument("--num_caches", required=True, type=int, metavar="M", help="update steps of each block")
    parser.add_argument("--metric", default="cosine", help="similarity of the schedule (default: cosine)")
    parser.add_argument(
        "--num_bu_blocks", type=int, default=0, metavar="N", help="blocks that bubbling union extends (default: 0)"
    )
    parser.add_argument(
        "--assets_dir", type=path_argument, default=Path("assets"), metavar="ASSETS", help="default: assets"
    )
    add_debug_argument(parser)
    return parser


def report(args: argparse.Namespace) -> int:
    run = assets.RunAssets(args.assets_dir / args.task / "original")
    before = read_schedule(run, args.metric, args.num_caches)
    print(REPORTS[args.report](before, applied_schedule(run, before, args.num_bu_blocks)))
    task = TASKS.get(args.task.name)
    if task is not None and task.smoke_test:
        print(f"{task.name} is a smoke test: {task.smoke_test}")
    return 0


main = command_line(report, build_parser)

if __name__ == "__main__":
    sys.exit(main())
