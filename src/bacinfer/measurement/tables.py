"""Text in columns, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """Columns as wide as their widest entry, the first one left-aligned, the others right-aligned."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rule = ["-" * width for width in widths]
    if markdown:  # a colon aligns a column
        rule = [dashes if column == 0 else f"{dashes}:"[1:] for column, dashes in enumerate(rule)]
    lines.insert(1, rule)

    def align(text: str, column: int) -> str:
        return text.ljust(widths[0]) if column == 0 else text.rjust(widths[column])

    aligned = [[align(text, column) for column, text in enumerate(line)] for line in lines]
    if markdown:
        return "\n".join(f"| {' | '.join(line)} |" for line in aligned)
    return "\n".join("  ".join(line).rstrip() for line in aligned)
