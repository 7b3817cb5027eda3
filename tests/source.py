"""Our own code as syntax trees, for tests that look for something in all of it."""

import ast
import gc
from pathlib import Path


def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file.

    No garbage is collected meanwhile: before Python 3.12, `ast.parse` raises a `SystemError` when another one comes to an end
    within it. What is collected may do that: a future whose exception nobody asked for is logged, and a traceback is parsed.
    """
    gc.disable()
    try:
        return ast.parse(path.read_bytes())
    finally:
        gc.enable()
