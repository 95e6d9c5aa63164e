"""Writes every option as a page of Markdown tables: its flag, default, values and help.

python -m espnet.utils.options_table > docs/options.md
"""

from collections.abc import Iterator
from dataclasses import Field

from espnet.option_tree import SCRIPTS, Number, flag, groups
from espnet.utils.options import Options

INTRODUCTION = """# Options

`python train.py --help` and `python eval.py --help` say the same. Defaults are auto_avsr's where
it has the option. Where the column is empty, the description tells what the default follows from,
or there is none. This page is generated from the options, and a test compares it with them:
`python -m espnet.utils.options_table > docs/options.md`.
"""


def page() -> str:
    """Returns the page, a table for each group of options."""
    tables = {}  # Two dataclasses may share a title.
    for title, options in groups(Options):
        tables.setdefault(title, []).extend(options)
    return INTRODUCTION + "".join(
        f"\n## {title.capitalize()}\n\n" + "\n".join(_table(options)) + "\n"
        for title, options in tables.items()
    )


def _table(options: list[Field]) -> Iterator[str]:
    """Lines of the table of one group."""
    yield "| option | default | values | description |"
    yield "| --- | --- | --- | --- |"
    for each in options:
        cells = (_flags(each), _default(each.default), _values(each), _description(each))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _flags(each: Field) -> str:
    own = f"`{flag(each.name)}`"
    return f"{own}, `{flag(f'no_{each.name}')}`" if each.metadata["negatable"] else own


def _default(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "", True: "on", False: "off"}[value]
    values = value if isinstance(value, tuple) else (value,)
    return " ".join(f"`{one:g}`" if isinstance(one, float) else f"`{one}`" for one in values)


def _values(each: Field) -> str:
    about = each.metadata
    if about["choices"]:
        return ", ".join(f"`{choice}`" for choice in about["choices"])
    if isinstance(about["kind"], Number):
        return about["kind"].expected
    return f"`{about['metavar']}`" if about["metavar"] else ""


def _description(each: Field) -> str:
    scripts = each.metadata["scripts"]
    only = "" if scripts == SCRIPTS else f"({' and '.join(scripts)}.py only)"
    return f"{each.metadata['help']} {only}".strip()


if __name__ == "__main__":
    print(page(), end="")
