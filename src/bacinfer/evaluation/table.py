"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest entry, the first one left-aligned, the others right-aligned."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])

    def align(text: str, column: int) -> str:
        return text.ljust(widths[0]) if column == 0 else text.rjust(widths[column])

    return "\n".join("  ".join(align(text, i) for i, text in enumerate(line)).rstrip() for line in lines)
