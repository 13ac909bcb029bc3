"""The table of faults: every row says what happens and names tests that exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
TEST_ID = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def rows() -> list[list[str]]:
    lines = [line.strip() for line in PAGE.read_text(encoding="utf-8").splitlines()]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return [row for row in cells if row[0] != "What goes wrong" and not set(row[0]) <= set("- ")]


@cache
def functions_in(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_there_are_at_least_forty_faults_and_none_is_listed_twice() -> None:
    faults = [row[0] for row in rows()]
    assert len(faults) >= 40
    assert len(set(faults)) == len(faults)


@pytest.mark.parametrize("row", rows(), ids=lambda row: re.sub(r"\W+", "-", row[0])[:60])
def test_every_fault_says_what_happens_and_names_its_tests(row: list[str]) -> None:
    _, outcome, tests = row
    assert outcome
    named = TEST_ID.findall(tests)
    assert named, f"no test id in {tests!r}"
    missing = [f"{file}::{name}" for file, name in named if name not in functions_in(file)]
    assert not missing
