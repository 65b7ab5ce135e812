"""The Python and shell snippets of the README and of the pages in docs/, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if path.resolve().is_relative_to(ROOT / "docs"))
"""Those that are written for the site; the others are files of the repository that it shows as well."""
LEROBOT_PAGE = ROOT / "docs" / "how-to" / "lerobot.md"
"""Its snippets need lerobot: they run in tests/lerobot_policies."""


def snippets(page: Path, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def python_of(page: Path) -> str:
    return "\n".join(snippets(page, "python"))


def commands(page: Path) -> list[str]:
    lines = "".join(snippets(page, "bash")).replace("\\\n", "").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def links(page: Path) -> list[str]:
    """The relative links of a page, without what follows a #."""
    return re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", page.read_text())
