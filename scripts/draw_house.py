"""Draws the imports between the folders of src/bacinfer into CONTRIBUTING.md, as they are."""

from __future__ import annotations

import re
from pathlib import Path

import grimp

CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"
BLOCK = re.compile(r"```mermaid\n.*?```\n", re.DOTALL)

Arrow = tuple[str, str]


def imports_between_folders() -> set[Arrow]:
    """Who imports whom. Thin commands in analysis count as commands, the package as ``bacinfer``."""
    graph = grimp.build_graph("bacinfer")

    def folder(module: str) -> str:
        name = ".".join(module.split(".")[1:2]) or "bacinfer"
        imported = graph.find_modules_directly_imported_by(module)
        thin = name == "analysis" and any(other.startswith("bacinfer.commands") for other in imported)
        return "commands" if thin else name

    folders = {module: folder(module) for module in graph.modules if not module.startswith("bacinfer._")}
    return {
        (folders[module], folders[imported])
        for module in folders
        for imported in graph.find_modules_directly_imported_by(module) & folders.keys()
        if folders[module] != folders[imported]
    }


def without_those_that_follow(arrows: set[Arrow]) -> set[Arrow]:
    """The arrows without those between folders that a chain of other arrows joins."""

    def reachable(start: str, without: Arrow) -> set[str]:
        found, new = set[str](), {start}
        while new:
            new = {end for begin, end in arrows - {without} if begin in new} - found
            found |= new
        return found

    return {arrow for arrow in arrows if arrow[1] not in reachable(arrow[0], arrow)}


def picture() -> str:
    arrows = sorted(without_those_that_follow(imports_between_folders()))
    return "\n".join(["```mermaid", "graph TD", *(f"    {a} --> {b}" for a, b in arrows), "```", ""])


if __name__ == "__main__":
    CONTRIBUTING.write_text(BLOCK.sub(picture(), CONTRIBUTING.read_text(), count=1))
