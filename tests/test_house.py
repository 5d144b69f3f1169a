"""The house keeps its rules: import direction, no circles, one file for torch.cuda, file and function sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import house
import pytest

ROOT = house.ROOT
MAX_LINES = 500
MAX_BODY_LINES = {"kernels": 80}  # where a launch names each of its arguments on a line; 50 elsewhere
MAX_ARGUMENTS = {"kernels": 25}  # 10 elsewhere


def sources() -> list[Path]:
    """Every Python file of the package, in the real folders, `__init__` files too."""
    rooms = [path for room in house.LINKED for path in (ROOT / room).rglob("*.py")]
    above = [
        path for path in house.PACKAGE.rglob("*.py") if path.relative_to(house.PACKAGE).parts[0] not in house.LINKED
    ]
    return sorted({*rooms, *above})


def test_there_are_sources() -> None:
    assert len(sources()) > 20


def test_links_lead_to_the_rooms() -> None:
    for room in house.LINKED:
        link = ROOT / "src/octavo" / room
        assert link.is_symlink()
        assert str(link.readlink()) == f"../../{room}", f"{link} must be a relative link"


def test_kernels_is_a_namespace() -> None:
    # transformers imports an unrelated package named `kernels` when it finds one; a regular package here would be it
    assert not (ROOT / "kernels/__init__.py").exists()


def test_no_import_goes_up() -> None:
    assert house.forbidden_imports() == []


def test_no_circle_of_files() -> None:
    assert house.circles() == []


def test_every_room_has_a_floor() -> None:
    assert {house.room_of(module) for module in house.modules()} == set(house.FLOOR_OF)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_are_imported_through_the_package(path: Path) -> None:
    for name in house.imported_names(path):
        assert name.split(".")[0] not in house.LINKED, f"{path}: imports bare {name!r}; write octavo.{name}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_cuda_is_spoken_in_one_file(path: Path) -> None:
    if path == ROOT / "runtime/worker/device.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("torch", "cuda"), (
                f"{path}:{node.lineno}: torch.cuda belongs in runtime/worker/device.py"
            )


def test_the_server_knows_no_tensor() -> None:
    for path in (ROOT / "server").rglob("*.py"):
        assert not {"torch", "numpy"} & {name.split(".")[0] for name in house.imported_names(path)}, (
            f"{path} imports a tensor library"
        )


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    room = path.relative_to(ROOT).parts[0]
    assert text.count("\n") <= MAX_LINES, f"{path} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.body[0].lineno + 1
            assert lines <= MAX_BODY_LINES.get(room, 50), f"{path}:{node.lineno}: {node.name} has {lines} lines"
    assert path.stem not in {"utils", "helpers", "common", "misc"}, f"{path}: name what it is for"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_arguments(path: Path) -> None:
    """`octavo.quantize` aside, whose arguments are the options of a job."""
    most = MAX_ARGUMENTS.get(path.relative_to(ROOT).parts[0], 10)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            is_job = path.parts[-2:] == ("jobs", "quantize.py") and node.name == "quantize"
            assert count <= most or is_job, f"{path}:{node.lineno}: {node.name} takes {count} arguments"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} has no docstring"


def is_kernel_body(path: Path) -> bool:
    """Written in numba or Triton: whoever imports it asks for a kernel."""
    return bool({"numba", "llvmlite", "triton"} & {name.split(".")[0] for name in house.imported_names(path)})


def test_importing_compiles_nothing() -> None:
    """Importing every module but the kernels' own starts neither numba nor Triton, nor transformers."""
    paths = [path for room in house.LINKED for path in (ROOT / room).rglob("*.py")]
    bodies = [path for path in paths if is_kernel_body(path)]
    assert bodies
    assert all(path.is_relative_to(ROOT / "kernels") for path in bodies), "kernels are written in one room"
    askers = {
        *bodies,
        *(p for p in paths if "gpu" in p.parts),
        ROOT / "runtime/model/operators_gpu.py",
    }
    modules = [".".join(("octavo", *p.relative_to(ROOT).with_suffix("").parts)) for p in paths if p not in askers]
    names = sorted(module.removesuffix(".__init__") for module in modules)
    program = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "heavy = {'numba', 'triton', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT / "src")


def test_nothing_of_a_machine_is_written_down() -> None:
    """No file names a path of the machine that it was written on, or a registry's host."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.fail("git ls-files failed: the tests run in a clone")
    forbidden = [
        "/" + "work/",
        "/" + "root/",
        ".".join(("pypi", "org")),
        ".".join(("npmjs", "org")),
        ".".join(("debian", "org")),
    ]
    for name in listed.stdout.split("\0"):
        path = ROOT / name
        if not name or path.is_symlink() or path.suffix in {".safetensors", ".png"} or "tests/fixtures" in name:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for word in forbidden:
            assert word not in text, f"{name} names {word}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_one_statement_assigns_one_thing(path: Path) -> None:
    """`a, b = x, y` packs two statements into one line; a swap, where y reads a, needs it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            continue
        target = node.targets[0]
        if isinstance(target, ast.Tuple) and len(target.elts) == len(node.value.elts):
            given = {ast.unparse(x) for value in node.value.elts for x in ast.walk(value) if isinstance(x, ast.expr)}
            read = [element for element in target.elts if ast.unparse(element) in given]
            assert read, f"{path}:{node.lineno}: one statement assigns several unrelated values"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_formatter_is_on(path: Path) -> None:
    """`# fmt: skip` stands behind tables alone: literals at the level of a module."""
    text = path.read_text(encoding="utf-8")
    tables = [
        range(node.lineno, (node.end_lineno or 0) + 1)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict | ast.List | ast.Tuple)
    ]
    for number, line in enumerate(text.splitlines(), start=1):
        if "# fmt:" in line:
            assert any(number in table for table in tables), f"{path}:{number}: the formatter is off outside a table"
