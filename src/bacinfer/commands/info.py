"""Assets -> what a schedule comes to: update steps and update counts, before and after bubbling union."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bacinfer import assets
from bacinfer.analysis.recorded import block_key, contents
from bacinfer.commands.options import add_debug_argument, path_argument, run_command
from bacinfer.core.bubbling import bubbling_union, split_block_key
from bacinfer.core.optimal_steps import stored_selection
from bacinfer.core.schedule import CacheSchedule

BACINFER_NUM_STEPS = 100  # K of its policies; its steps files do not record it


def read_schedule(run: assets.RunAssets, metric: str, num_caches: int) -> CacheSchedule:
    """The update steps that the scheduler gave to each block, in the order of the forward.

    Raises:
        FileNotFoundError: if there are none for this metric and number; lists those that are there.
        ValueError: if a file is damaged, or is of no residual block.
    """
    steps_dir = run.steps_dir(metric)
    modules = sorted((path.name for path in steps_dir.glob("*") if path.is_dir()), key=_forward_order)
    files = {module: assets.steps_file(steps_dir, module, num_caches, metric) for module in modules}
    files = {module: path for module, path in files.items() if path.is_file()}
    if not files:
        found = [f"{name} {number}" for name, number in assets.available_steps(steps_dir)]
        there = f"has those for {', '.join(found)}" if found else contents(steps_dir)
        raise FileNotFoundError(f"no update steps for {metric} {num_caches} in {steps_dir}, which {there}")
    keys = {module: block_key(module) for module in files}
    if unknown := [module for module, key in keys.items() if key is None]:
        raise ValueError(f"cannot tell which residual blocks these are: {', '.join(unknown)} in {steps_dir}")
    num_steps = _num_inference_steps(next(iter(files.values())))
    steps = {str(keys[module]): tuple(assets.read_steps(path, num_steps)) for module, path in files.items()}
    return CacheSchedule(num_steps, steps, f"{metric}, M = {num_caches}")


def applied_schedule(run: assets.RunAssets, schedule: CacheSchedule, num_bu_blocks: int) -> CacheSchedule:
    """What `apply_cache` makes of a schedule: bubbling union, and an update of all blocks at the last step.

    Raises:
        FileNotFoundError: if no such selection of blocks is there; lists what is.
    """
    if num_bu_blocks:
        selected = stored_selection(run, num_bu_blocks)
        if selected is None:
            path = run.selected_blocks(num_bu_blocks)
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
    kinds = list(dict.fromkeys(split_block_key(block)[1] for block in before.update_steps))
    rows = [(kind, [b for b in before.update_steps if split_block_key(b)[1] == kind]) for kind in kinds]
    rows.append(("all blocks", list(before.update_steps)))
    lines = [f"{after.label}: updates in {after.num_inference_steps} steps, the last one included"]
    lines.append(f"{'':12}{'ACS':>8}{'as run':>8}{'fewest':>8}{'most':>8}{'blocks':>8}")
    for name, blocks in rows:
        counts = [after.num_updates(block) for block in blocks]
        found = sum(before.num_updates(block) for block in blocks) / len(blocks)
        lines.append(
            f"{name:12}{found:8.2f}{sum(counts) / len(counts):8.2f}{min(counts):8}{max(counts):8}{len(counts):8}"
        )
    return "\n".join(lines)


def _forward_order(module: str) -> list[tuple[int, str]]:
    """Sorts module names with their numbers as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", module)]


def _num_inference_steps(steps_file: Path) -> int:
    description = steps_file.with_suffix(".json")
    recorded = assets.read_json(description) if description.is_file() else {}
    number = recorded.get("num_inference_steps", BACINFER_NUM_STEPS) if isinstance(recorded, dict) else None
    if not isinstance(number, int):
        raise ValueError(f"{description}: expected the description of a schedule, found {recorded!r:.80}")
    return number


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
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(report, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
