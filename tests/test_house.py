"""The house keeps its rules: import direction, no circles, one file for torch.cuda, file and function sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
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


def test_the_server_knows_no_tensor() -> None:
    for path in (ROOT / "server").rglob("*.py"):
        assert not {"torch", "numpy"} & {name.split(".")[0] for name in house.imported_names(path)}, (
            f"{path} imports a tensor library"
        )


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
        ROOT / "server/ray_router.py",  # subclasses a class of Ray, an extra; Ray imports it by its name
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


def bare_imports(path: Path, _: ast.Module) -> Iterator[str]:
    for name in house.imported_names(path):
        if name.split(".")[0] in house.LINKED:
            yield f"{path}: imports bare {name!r}; write octavo.{name}"


def cuda(path: Path, tree: ast.Module) -> Iterator[str]:
    # a launcher asks which card its tensors are on, and imports nothing of the runtime
    if path in (ROOT / "runtime/worker/device.py", ROOT / "kernels/launching/tuning.py"):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda":
            yield f"{path}:{node.lineno}: torch.cuda belongs in runtime/worker/device.py"


def distributed(path: Path, tree: ast.Module) -> Iterator[str]:
    if path == ROOT / "runtime/parallel/group.py":
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield f"{path}:{node.lineno}: torch.distributed belongs in runtime/parallel/group.py"
    if any(name.startswith("torch.distributed") for name in house.imported_names(path)):
        yield f"{path}: torch.distributed belongs in runtime/parallel/group.py"


def sizes(path: Path, tree: ast.Module) -> Iterator[str]:
    num_lines = path.read_text(encoding="utf-8").count("\n")
    if num_lines > MAX_LINES:
        yield f"{path} has {num_lines} lines"
    most = MAX_BODY_LINES.get(path.relative_to(ROOT).parts[0], 50)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.body[0].lineno + 1
            if lines > most:
                yield f"{path}:{node.lineno}: {node.name} has {lines} lines"
    if path.stem in {"utils", "helpers", "common", "misc"}:
        yield f"{path}: name what it is for"


def arguments(path: Path, tree: ast.Module) -> Iterator[str]:
    """`octavo.quantize` aside, whose arguments are the options of a job."""
    most = MAX_ARGUMENTS.get(path.relative_to(ROOT).parts[0], 10)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            is_job = path.parts[-2:] == ("jobs", "quantize.py") and node.name == "quantize"
            if count > most and not is_job:
                yield f"{path}:{node.lineno}: {node.name} takes {count} arguments"


def docstring(path: Path, tree: ast.Module) -> Iterator[str]:
    if not ast.get_docstring(tree):
        yield f"{path} has no docstring"


def packed_assignments(path: Path, tree: ast.Module) -> Iterator[str]:
    """`a, b = x, y` packs two statements into one line; a swap, where y reads a, needs it."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            continue
        target = node.targets[0]
        if isinstance(target, ast.Tuple) and len(target.elts) == len(node.value.elts):
            given = {ast.unparse(x) for value in node.value.elts for x in ast.walk(value) if isinstance(x, ast.expr)}
            if not any(ast.unparse(element) in given for element in target.elts):
                yield f"{path}:{node.lineno}: one statement assigns several unrelated values"


def formatter_off(path: Path, tree: ast.Module) -> Iterator[str]:
    """`# fmt: skip` stands behind tables alone: literals at the level of a module."""
    tables = [
        range(node.lineno, (node.end_lineno or 0) + 1)
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict | ast.List | ast.Tuple)
    ]
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if "# fmt:" in line and not any(number in table for table in tables):
            yield f"{path}:{number}: the formatter is off outside a table"


RULES = (bare_imports, cuda, distributed, sizes, arguments, docstring, packed_assignments, formatter_off)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_each_file_keeps_the_rules(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [said for rule in RULES for said in rule(path, tree)] == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ('"""Says."""\nimport quant\n', "imports bare 'quant'"),
        ('"""Says."""\ntorch.cuda.synchronize()\n', "torch.cuda belongs"),
        ('"""Says."""\nimport torch.distributed as dist\n', "torch.distributed belongs"),
        ('"""Says."""\n' + "\n" * MAX_LINES, "has 501 lines"),
        ('"""Says."""\ndef f():\n' + "    pass\n" * 51, "f has 51 lines"),
        ('"""Says."""\nasync def f(a, b, c, d, e, *, f, g, h, i, j, k):\n    pass\n', "f takes 11 arguments"),
        ("a = 1\n", "has no docstring"),
        ('"""Says."""\na, b = 1, 2\n', "several unrelated values"),
        ('"""Says."""\nf(1)  # fmt: skip\n', "the formatter is off"),
    ],
)
def test_a_file_that_breaks_a_rule_is_found(
    source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "module.py"
    path.write_text(source)
    (found,) = [each for rule in RULES for each in rule(path, ast.parse(source))]
    assert said in found
