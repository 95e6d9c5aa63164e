"""docs/options.md is what the options give, and holds every flag."""

import re
import subprocess
import sys
from pathlib import Path

from espnet.utils.options import eval_parser, train_parser

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/options.md").read_text(encoding="utf-8")
COMMAND = "python -m espnet.utils.options_table > docs/options.md"


def test_page_is_up_to_date():
    code = (
        "import runpy, sys\n"
        "runpy.run_module('espnet.utils.options_table', run_name='__main__')\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == PAGE, f"the options have changed: run {COMMAND}"
    assert COMMAND in PAGE


def test_page_has_every_flag_of_both_scripts_in_its_group():
    groups = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", PAGE, flags=re.MULTILINE))
    for parser in (train_parser(), eval_parser()):
        for group in parser._action_groups:
            if group.title not in ("positional arguments", "options"):
                rows = groups[group.title.capitalize()]
                for action in group._group_actions:
                    assert all(f"`{string}`" in rows for string in action.option_strings)


def test_rows_have_four_cells():
    rows = [line for line in PAGE.splitlines() if line.startswith("|")]
    assert len(rows) > 80
    assert all(len(re.split(r"(?<!\\)\|", row)) == 6 for row in rows)
