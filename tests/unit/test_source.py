"""A file is parsed whatever is collected meanwhile."""

import ast
import gc
from pathlib import Path

from tests.source import parsed


class Parsing:
    """Garbage that is only found by a collection, and parses something when it is."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        ast.parse("(1 + 1 / 0)()")


def test_a_file_is_parsed_whatever_is_collected_meanwhile() -> None:
    thresholds = gc.get_threshold()
    gc.set_threshold(500)
    try:
        for _ in range(30):
            Parsing()
        tree = parsed(Path(__file__))
    finally:
        gc.set_threshold(*thresholds)

    assert gc.isenabled()
    assert any(isinstance(node, ast.ClassDef) and node.name == "Parsing" for node in ast.walk(tree))
