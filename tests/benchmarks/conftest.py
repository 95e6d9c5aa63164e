"""What the tests of the benchmarks share."""

from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def tables(capsys):
    """Tells the tables that were printed: head, rows and notes of each."""

    def cells(line):
        return [cell.strip() for cell in line.split("|")[1:-1]]

    def read():
        found = []
        for block in capsys.readouterr().out.split("\n\n"):
            lines = block.splitlines()
            if lines[0].startswith("| "):
                rows = [cells(line) for line in lines[2:] if line.startswith("| ")]
                found.append(SimpleNamespace(head=cells(lines[0]), rows=rows, notes=[]))
            elif lines[0].startswith("- "):
                found[-1].notes = [line for line in lines if line.startswith("- ")]
        return found

    return read
