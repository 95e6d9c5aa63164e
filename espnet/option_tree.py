"""Options as fields of dataclasses: a field is all that parser, checks, files and models need.

A dataclass holds the options of one part of the program, and lies beside what reads them; branches
join them into a tree. In `config.yaml`, and as keywords, options are flat: their names are unique.
Nothing here imports torch, so that `--help` and a mistaken option answer at once.
"""

from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from math import isfinite
from typing import Any, TypeVar

Options = TypeVar("Options")
SCRIPTS = ("train", "eval")


@dataclass(frozen=True)
class Number:
    """Type of an option: a number in a range.

    Attributes:
        kind: int or float.
        expected: The range in words.
        holds: Whether a value is in it.
    """

    kind: type
    expected: str
    holds: Callable[[float], bool]

    @property
    def __name__(self) -> str:
        """What argparse calls a value that is no such number."""
        return self.kind.__name__

    def __call__(self, text: str) -> float:
        """Parses a value of the command line."""
        value = self.kind(text)
        if not self.holds(value):
            raise ArgumentTypeError(f"{value} is out of range: {self.expected} is expected")
        return value


COUNT = Number(int, "at least 1", lambda value: value >= 1)
NATURAL = Number(int, "at least 0", lambda value: value >= 0)
POSITIVE = Number(float, "a number above 0", lambda value: value > 0)
NON_NEGATIVE = Number(float, "at least 0", lambda value: value >= 0)
FINITE = Number(float, "a finite number", isfinite)
PROBABILITY = Number(float, "a number in [0, 1]", lambda value: 0 <= value <= 1)
SHARE = Number(float, "a number in [0, 1)", lambda value: 0 <= value < 1)


def option(
    default: Any,
    help: str = "",  # noqa: A002
    *,
    kind: Callable[[str], Any] | None = None,
    choices: tuple | None = None,
    nargs: int | str | None = None,
    metavar: str | tuple[str, ...] | None = None,
    negatable: bool = False,
    needs: Mapping[str, tuple[str, ...]] | None = None,
    scripts: tuple[str, ...] = SCRIPTS,
) -> Any:
    """Declares an option: a field whose flag has its name, with hyphens.

    Args:
        default: Value if it is not given.
        help: What `--help` says; the default is added unless the text names it.
        kind: Parses a value; a `Number` also checks values that come from elsewhere.
        choices: Values that it can have.
        nargs: As in argparse.
        metavar: As in argparse.
        negatable: Whether a switch also has a flag that begins with `--no-`.
        needs: Other options of the dataclass, and the values that they must have, resolved, for
            this one to have another value than its default.
        scripts: Scripts that have the flag.

    Returns:
        The field.
    """
    about = {
        "help": help,
        "kind": kind,
        "choices": choices,
        "nargs": nargs,
        "metavar": metavar,
        "negatable": negatable,
        "needs": needs or {},
        "scripts": scripts,
    }
    return field(default=default, metadata=about)


def branch(kind: type) -> Any:
    """Declares a part of the tree: a field that holds the options of another dataclass."""
    return field(default_factory=kind, metadata={"branch": kind})


def flag(name: str) -> str:
    """The flag of an option."""
    return f"--{name.replace('_', '-')}"


def groups(kind: type) -> Iterator[tuple[str, list[Field]]]:
    """The options of a tree: of each dataclass its `title` and fields, in their order."""
    own = [each for each in fields(kind) if "branch" not in each.metadata]
    if own:
        yield kind.title, own
    for each in fields(kind):
        if "branch" in each.metadata:
            yield from groups(each.metadata["branch"])


def names(kind: type) -> set[str]:
    """Names of all options of a tree."""
    return {each.name for _, options in groups(kind) for each in options}


def add_arguments(parser: ArgumentParser, kind: type, script: str) -> None:
    """Adds the flags of a tree to a parser, in titled groups.

    Args:
        parser: To add to.
        kind: Dataclass of the tree.
        script: What the parser is for, one of `SCRIPTS`.
    """
    parts = {}
    for title, options in groups(kind):
        for each in options:
            if script in each.metadata["scripts"]:
                if title not in parts:
                    parts[title] = parser.add_argument_group(title)
                parts[title].add_argument(flag(each.name), **_argument(each))


def _argument(each: Field) -> dict[str, Any]:
    """What argparse is told of an option."""
    about, default = each.metadata, each.default
    words = about["help"].replace("%", "%%")
    if about["negatable"] or default is False:
        switch = BooleanOptionalAction if about["negatable"] else "store_true"
        return {"action": switch, "default": default, "help": words}
    shown = f"{default:g}" if isinstance(default, float) else default
    if default not in (None, ()) and "(default" not in words:
        words = f"{words} (default: {shown})".strip()
    names = ("nargs", "choices", "metavar")
    given = {name: about[name] for name in names if about[name] is not None}
    return {"type": about["kind"] or str, "default": default, "help": words, **given}


def from_flat(kind: type[Options], values: Mapping[str, Any]) -> Options:
    """Builds a tree from values by name; lists become tuples, other names are left out."""
    arguments = {}
    for each in fields(kind):
        if "branch" in each.metadata:
            arguments[each.name] = from_flat(each.metadata["branch"], values)
        elif each.name in values:
            value = values[each.name]
            arguments[each.name] = tuple(value) if isinstance(value, list) else value
    return kind(**arguments)


def to_flat(options: Any) -> dict[str, Any]:
    """The values of a tree by name."""
    values = {}
    for each in fields(options):
        value = getattr(options, each.name)
        values |= to_flat(value) if "branch" in each.metadata else {each.name: value}
    return values


def changed(options: Options, **values: Any) -> Options:
    """A tree with other values of the options of given names."""
    changes = {}
    for each in fields(options):
        if "branch" in each.metadata:
            changes[each.name] = changed(getattr(options, each.name), **values)
        elif each.name in values:
            changes[each.name] = values[each.name]
    return replace(options, **changes)


def value_problems(options: Any) -> list[str]:
    """Which values of a tree are out of their range, or none of the choices.

    Returns:
        A sentence a problem; empty if there is none.
    """
    problems = []
    for each in fields(options):
        value, about = getattr(options, each.name), each.metadata
        if "branch" in about:
            problems += value_problems(value)
            continue
        for one in value if isinstance(value, tuple) else (value,):
            if one is None:
                continue
            if about["choices"] and one not in about["choices"]:
                known = ", ".join(map(str, about["choices"]))
                problems.append(f"{flag(each.name)} {one} is unknown: choose one of {known}")
            elif isinstance(about["kind"], Number) and not about["kind"].holds(one):
                expected = about["kind"].expected
                problems.append(f"{flag(each.name)} {one} is out of range: {expected} is expected")
    return problems


def needs_problems(given: Options, resolved: Options) -> list[str]:
    """Which options of one dataclass were given though others have not the values that they need.

    Args:
        given: As they were given.
        resolved: The same with all that follows from them.

    Returns:
        A sentence a problem; empty if there is none.
    """
    problems = []
    for each in fields(given):
        value, needs = getattr(given, each.name), each.metadata.get("needs", {})
        # What is off, or what would be used anyway, does no harm.
        if value == each.default or not value:
            continue
        if all(getattr(resolved, name) in values for name, values in needs.items()):
            continue
        what = flag(each.name) if value is True else f"{flag(each.name)} {value}"
        wanted = " ".join(f"{flag(name)} {' or '.join(v)}" for name, v in needs.items())
        problems.append(f"{what} needs {wanted}")
    return problems
