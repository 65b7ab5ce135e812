"""Text in columns."""

from __future__ import annotations

from bacinfer.measurement.tables import format_table


def test_columns_are_aligned() -> None:
    assert format_table(["task", "score"], [["pusht", "0.8"], ["a", "-"]]).splitlines() == [
        "task   score",
        "-----  -----",
        "pusht    0.8",
        "a          -",
    ]
    assert format_table(["task", "score"], [["pusht", "0.8"]], markdown=True).splitlines() == [
        "| task  | score |",
        "| ----- | ----: |",
        "| pusht |   0.8 |",
    ]
