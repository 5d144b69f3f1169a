"""The table of docs/models.md that says what is proven of each model type.

`python tests/support/models_table.py` proves all of them, which takes some ten minutes, and writes the table anew;
with names behind it, it proves these model types, and leaves the other rows as they are.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from doc_tables import DOCS
from model_proofs import GPU, Proven, prove, schemes
from model_types import MODEL_TYPES

PAGE = DOCS / "models.md"
TABLE = re.compile(r"(?<=<!-- proofs -->\n\n)(?P<rows>.*?)(?=\n<!-- end of proofs -->)", re.DOTALL)
HEADS = ("`model_type`", "class", "largest difference", "schemes", "refused, and why")


def rows() -> dict[str, tuple[str, ...]]:
    """The table's cells by model type, in its order."""
    found = TABLE.search(PAGE.read_text("utf-8"))
    assert found is not None, f"{PAGE.name} has no marks of the table"
    lines = [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in found["rows"].splitlines()[2:]]
    return {cells[0].strip("`"): cells for cells in lines}


def row(proven: Proven) -> tuple[str, ...]:
    served = _counted(proven.schemes)
    if proven.towers:
        served += f"; of towers {_counted(proven.towers)}"
    return (
        f"`{proven.model_type}`",
        proven.architecture,
        f"{proven.difference:.0e}",
        served,
        "; ".join(_reasons(proven)),
    )


def _counted(served: tuple[str, ...]) -> str:
    count = len(schemes())
    return "all" if len(served) == count else f"{len(served)} of {count}"


def _reasons(proven: Proven) -> Iterator[str]:
    """Each reason with all that is refused for it, without what would work."""
    by_reason: dict[str, list[str]] = {}
    for refused, said in proven.refused.items():
        reason = said.removeprefix(f"{refused}: ").partition(";")[0].replace(f" with scheme {refused}", "")
        reason = reason.replace(str(GPU), "a GPU")
        by_reason.setdefault(reason, []).append(f"`{refused}`")
    for reason, refused in by_reason.items():
        yield f"{', '.join(refused)}: {reason.replace('|', '/')}"


def write(model_types: Iterable[str]) -> None:
    """Prove these, and write each one's row."""
    for name in model_types:
        with TemporaryDirectory() as directory:
            found = row(prove(MODEL_TYPES[name], Path(directory)))
        print(" | ".join(found), flush=True)
        PAGE.write_text(_with(rows() | {name: found}), "utf-8")


def _with(known: dict[str, tuple[str, ...]]) -> str:
    """The page with these rows."""
    lines = [HEADS, ("---",) * len(HEADS), *(known[name] for name in MODEL_TYPES if name in known)]
    made = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return TABLE.sub(lambda _: made, PAGE.read_text("utf-8"))


if __name__ == "__main__":
    write(sys.argv[1:] or MODEL_TYPES)
