"""Imports go one way: entry scripts, lightning.py, datamodule and espnet.utils, espnet.nets."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Each layer may import itself and what stands below it; the first prefix that fits counts.
LAYERS = (
    *(("train", 5), ("eval", 5), ("lightning", 4), ("espnet.utils", 3), ("datamodule", 2)),
    *(("espnet.nets", 1), ("espnet", 0)),
)


def layer(module):
    """The layer of a module of this project; None for others."""
    for prefix, number in LAYERS:
        if module == prefix or module.startswith(f"{prefix}."):
            return number
    return None


def imported(path):
    """Names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_go_one_way():
    files = [*ROOT.glob("*.py"), *ROOT.glob("espnet/**/*.py"), *ROOT.glob("datamodule/**/*.py")]
    assert len(files) > 80
    for path in files:
        own = layer(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for module in imported(path):
            other = layer(module)
            assert other is None or other <= own, f"{path.relative_to(ROOT)} imports {module}"
