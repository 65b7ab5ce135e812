"""The README is short, and what it says first is what was measured."""

from __future__ import annotations

from snippets import README, ROOT, snippets
from test_own_policy import SNIPPET

TEXT = README.read_text()
FIRST_SCREEN = "\n".join(TEXT.splitlines()[:45])


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= 200


def test_the_first_screen_has_the_policys_own_scheduler_as_the_measurements_have_it() -> None:
    measured = (ROOT / "docs" / "reference" / "measurements.md").read_text().splitlines()
    rows = [line.replace("*", "") for line in FIRST_SCREEN.splitlines() if line.startswith("|") and "±" in line]
    assert len(rows) == 4
    for row in rows:
        _, _, steps, score, latency, _ = (cell.strip() for cell in row.split("|"))
        assert any(f"| {steps} | {score} |" in line and f"| {latency} |" in line for line in measured), row
    assert any("the policy's own scheduler with 10 steps" in row for row in rows)


def test_the_own_policy_is_the_tested_one_and_that_of_the_docs() -> None:
    (own,) = [code for code in snippets(README, "python") if "find_plan" in code]
    assert own == SNIPPET
    assert own in snippets(ROOT / "docs" / "how-to" / "own-policy.md", "python")
