"""The README is short, and what it says first is what was measured."""

from __future__ import annotations

from snippets import README, ROOT, snippets
from test_own_policy import SNIPPET

TEXT = README.read_text()
FIRST_SCREEN = "\n".join(TEXT.splitlines()[:45])


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= 200


def test_the_first_screen_has_the_policys_own_scheduler_as_the_measurements_have_it() -> None:
    measured = (ROOT / "docs" / "reference" / "measurements.md").read_text()
    rows = [line for line in FIRST_SCREEN.splitlines() if line.startswith("|") and "±" in line]
    assert len(rows) == 3
    assert all(row in measured.splitlines() for row in rows)
    assert any("own DDPM scheduler with K = 10" in row for row in rows)


def test_the_own_policy_is_the_tested_one_and_that_of_the_docs() -> None:
    (own,) = [code for code in snippets(README, "python") if "find_plan" in code]
    assert own == SNIPPET
    assert own in snippets(ROOT / "docs" / "how-to" / "own-policy.md", "python")
