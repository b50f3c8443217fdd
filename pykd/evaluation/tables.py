"""Tables of strings for people: aligned columns for a terminal, Markdown to paste."""

from __future__ import annotations

from collections.abc import Sequence


def table(cells: list[list[str]], *, width: int | None = None) -> str:
    """Rows of strings, the first the headings, in aligned columns; wider than ``width`` it continues below itself."""
    return "\n\n".join("\n".join(_aligned(block)) for block in _blocks(cells, width))


def _blocks(rows: list[list[str]], width: int | None) -> list[list[list[str]]]:
    """The table cut into tables of at most ``width`` characters, each with the first column and at least one more."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    blocks: list[list[int]] = [[0]]
    for column in range(1, len(widths)):
        needed = sum(widths[other] + 2 for other in blocks[-1]) + widths[column]
        if width is not None and needed > width and len(blocks[-1]) > 1:
            blocks.append([0])
        blocks[-1].append(column)
    return [[[row[column] for column in block] for row in rows] for block in blocks]


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of strings, the first the headings, in Markdown."""
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
