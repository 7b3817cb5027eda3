"""Every error code is in one list, in the documentation, and in use; and no code is said that is not in the list."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from domain.errors import ErrorCode
from tests.source import parsed

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("app", "domain", "events", "projections", "read_side", "results", "workers", "write_side")
SAYS_A_CODE = {"LookupFailed": 0, "TaskError": None}
"""Where the code is among the arguments: its position, or only by name."""
ROW = re.compile(r"^\| `([a-z_]+)` \|", re.MULTILINE)


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            yield path.relative_to(REPOSITORY), parsed(path)


def codes_said_as_text() -> list[str]:
    """Where a failure is given its code as text of its own."""
    return [
        f"{path}:{node.lineno}"
        for path, module in sources()
        for node in ast.walk(module)
        if isinstance(node, ast.Call) and isinstance(code := _code_of(node), ast.Constant) and isinstance(code.value, str)
    ]


def codes_in_use() -> set[str]:
    """The names of the list that the program says anywhere."""
    return {
        node.attr
        for _, module in sources()
        for node in ast.walk(module)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ErrorCode"
    }


def _code_of(call: ast.Call) -> ast.expr | None:
    name = call.func.id if isinstance(call.func, ast.Name) else None
    if name not in SAYS_A_CODE:
        return None
    position = SAYS_A_CODE[name]
    if position is not None and len(call.args) > position:
        return call.args[position]
    return next((keyword.value for keyword in call.keywords if keyword.arg == "code"), None)


def test_the_documentation_lists_every_code_once_and_no_other() -> None:
    listed = ROW.findall((REPOSITORY / "docs" / "errors.md").read_text(encoding="utf-8"))

    assert listed == sorted(code.value for code in ErrorCode)


def test_no_failure_is_given_a_code_that_is_not_in_the_list() -> None:
    assert codes_said_as_text() == []


def test_every_code_in_the_list_is_said_somewhere() -> None:
    assert codes_in_use() == {code.name for code in ErrorCode}
