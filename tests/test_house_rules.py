"""The rules that the tests themselves keep, and the tests that the documents name. Read from the source with `ast`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import trainer

TESTS = Path(__file__).parent
PACKAGE = Path(trainer.__file__).parent
LONGEST_NAME = 69
LANES_OF_SLOW = ("alone", "fault", "nightly")  # markers that go with `slow`

SOURCES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(TESTS.rglob("*.py"))}


def functions() -> Iterator[tuple[Path, ast.FunctionDef]]:
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield path, node


def place(path: Path, node: ast.stmt | ast.expr | ast.alias) -> str:
    return f"{path.relative_to(TESTS.parent)}:{node.lineno}"


def test_the_name_of_a_test_is_short():
    long = [f"{place(path, node)} {node.name}" for path, node in functions() if len(node.name) > LONGEST_NAME]
    assert not long, f"over {LONGEST_NAME} characters: " + "; ".join(long)


def is_private(name: str) -> bool:
    return len(name) > 1 and name.startswith("_") and not name.startswith("__")


def private_names_of_the_package() -> set[str]:
    """What it defines for itself: functions, classes, methods, fields and attributes that begin with one underscore."""
    names: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    names.add(name)
                case ast.Attribute(attr=name, ctx=ast.Store()) | ast.Name(id=name, ctx=ast.Store()):
                    names.add(name)
    return set(filter(is_private, names))


def test_no_test_reaches_into_a_private_name_of_the_package():
    private, found = private_names_of_the_package(), []
    assert len(private) > 50
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=ast.Name(id="self")):
                    continue  # of a class of the tests
                case ast.Attribute(attr=name) if name in private:
                    found.append(f"{place(path, node)} {name}")
                case ast.Call(func=ast.Attribute(attr="setattr"), args=words):
                    named = [str(each.value).rpartition(".")[2] for each in words if isinstance(each, ast.Constant)]
                    found += [f"{place(path, node)} {each}" for each in named if each in private]
                case ast.ImportFrom(module=str(module), names=names) if module.startswith("trainer"):
                    found += [f"{place(path, node)} {each.name}" for each in names if is_private(each.name)]
    assert not found, "; ".join(found)


def marks(node: ast.FunctionDef, tree: ast.Module) -> set[str]:
    """The markers of a test: its own, those of its parameters, and those of its file."""
    of_file = [each.value for each in tree.body if isinstance(each, ast.Assign) and "pytestmark" in ast.dump(each)]
    text = " ".join(ast.unparse(each) for each in (*node.decorator_list, *of_file))
    return set(re.findall(r"pytest\.mark\.(\w+)", text))


def test_a_test_with_a_lane_of_its_own_is_slow():
    for path, node in functions():
        found = marks(node, SOURCES[path])
        assert "slow" in found or not found & set(LANES_OF_SLOW), f"{place(path, node)} {node.name}"


def test_every_test_that_the_page_on_reliability_names_is_there():
    rows = [
        line.split("|") for line in (TESTS.parent / "docs" / "reliability.md").read_text().splitlines() if "|" in line
    ]
    named = [name for row in rows if len(row) > 4 for name in re.findall(r"`([^`]+)`", row[3])]
    assert len(named) > 40
    names = [node.name for _, node in functions()]
    for name in named:
        there = (TESTS.parent / name).exists() if "/" in name else any(name in each for each in names)
        assert there, f"docs/reliability.md names {name}"
