"""The README is short, and what it says first is what was measured."""

from __future__ import annotations

from snippets import README, ROOT, snippets
from test_own_policy import SNIPPET

TEXT = README.read_text()
FIRST_SCREEN = "\n".join(TEXT.splitlines()[:45])


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= 200


def test_the_first_screen_has_what_the_measurements_have() -> None:
    measured = (ROOT / "docs" / "reference" / "measurements.md").read_text()
    rows = [
        [cell.strip() for cell in line.replace("*", "").split("|")[2:-1]]
        for line in FIRST_SCREEN.splitlines()
        if line.startswith("|") and " ms" in line
    ]
    assert len(rows) == 10
    for plan, _, latency, difference in rows:
        assert f"| {latency} |" in measured, latency
        assert plan.startswith("plain") or difference in measured, difference
    assert sum("bacinfer calibrate" in plan for plan, *_ in rows) == 2
    assert sum("own 10" in plan for plan, *_ in rows) == 2


def test_the_own_policy_is_the_tested_one_and_that_of_the_docs() -> None:
    (own,) = [code for code in snippets(README, "python") if "find_plan" in code]
    assert own == SNIPPET
    assert own in snippets(ROOT / "docs" / "how-to" / "own-policy.md", "python")
