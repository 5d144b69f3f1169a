"""The house as a graph: every file of the package, the floor that it stands on, and what it imports.

`python tests/support/house.py` prints the drawing: rooms from the top floor down, the rooms that each one imports, and
whatever is not allowed: arrows up, arrows between neighbors, circles of files.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src/octavo"

# From the ground up. Rooms that share a floor don't import each other. `top` is what stands in src/octavo itself.
FLOORS = (
    ("kernels", "report"),
    ("quant",),
    ("calibration", "runtime"),
    ("text", "audio"),
    ("server",),
    ("bench",),
    ("jobs", "offline"),
    ("top",),
    ("lang",),
    ("commands",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LINKED = ("kernels", "quant", "calibration", "runtime", "server")  # folders of the repository's root
GROUND = (  # import nothing of it: everybody may import them
    "octavo.version",
    "octavo.flags",
    "octavo.collector",
    "octavo.freed_memory",
    "octavo.pooling_params",
    "octavo.sampling_params",
    "octavo.inputs",
    "octavo.lora_request",
    "octavo.outputs",
)
ENTRY = ("octavo", "octavo.__main__", "octavo.cli")  # what starts commands, or offers all of the package


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, packages' own `__init__` left out."""
    roots = {f"octavo.{room}": ROOT / room for room in LINKED}
    roots |= {f"octavo.{path.name}": path for path in PACKAGE.iterdir() if path.is_dir() and not path.is_symlink()}
    found = {f"octavo.{path.stem}": path for path in PACKAGE.glob("*.py")}
    found["octavo"] = found.pop("octavo.__init__")
    for name, folder in roots.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            if parts[-1] != "__init__":
                found[".".join((name, *parts))] = path
    return found


def room_of(module: str) -> str:
    """The room of a module: the folder right below the package, or `top`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 else "top"


def imported_names(path: Path) -> list[str]:
    """Full names that a file imports, at whatever depth in the file; relative imports are refused."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write octavo.ROOM"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@cache
def graph() -> dict[str, set[str]]:
    """Which modules of the package each module imports."""
    known = modules()

    def module_of(name: str) -> str | None:
        while name and name not in known:
            name = name.rpartition(".")[0]
        return name if name != "octavo" else None

    return {
        module: {target for name in imported_names(path) if (target := module_of(name)) and target != module}
        for module, path in known.items()
    }


def forbidden_imports() -> list[str]:
    """Each import that goes up, or to a neighbor on the same floor."""
    found = []
    for module, targets in sorted(graph().items()):
        room = room_of(module)
        for target in sorted(targets - set(GROUND)):
            other = room_of(target)
            if room != other and module not in ENTRY and FLOOR_OF[other] >= FLOOR_OF[room]:
                found.append(f"{module} ({room}) imports {target} ({other})")
    return found


def circles() -> list[list[str]]:
    """The strongly connected components of more than one file (Tarjan's algorithm)."""
    edges, index, low = graph(), {}, {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in edges[module]:
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                found.append(sorted(component))

    for module in sorted(edges):
        if module not in index:
            visit(module)
    return found


def drawing() -> str:
    """The picture in words: floors from the top, and how many imports lead from room to room."""
    arrows: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    sizes: dict[str, list[int]] = defaultdict(list)
    for module, targets in graph().items():
        room = room_of(module)
        sizes[room].append(modules()[module].read_text(encoding="utf-8").count("\n"))
        for target in targets - set(GROUND):
            if room_of(target) != room:
                arrows[room][room_of(target)] += 1
    lines = []
    for floor in reversed(FLOORS):
        for room in floor:
            down = ", ".join(f"{other} {count}" for other, count in sorted(arrows[room].items())) or "nothing"
            lines.append(f"{room:12} {len(sizes[room]):3} files {sum(sizes[room]):6} lines   imports {down}")
        lines.append("-" * 60)
    lines += ["arrows up or sideways:", *(forbidden_imports() or ["none"])]
    lines += ["circles of files:", *([" <-> ".join(circle) for circle in circles()] or ["none"])]
    return "\n".join(lines)


if __name__ == "__main__":
    print(drawing())
