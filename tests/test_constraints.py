"""constraints.txt: one pin for whatever the requirements ask for, on every Python."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PYTHONS = [f"3.{minor}" for minor in range(10, 15)]


def requirements(name):
    """What a file of requirements asks for, without what it includes."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-r ")]


PINS = requirements("constraints.txt")


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_has_one_pin(python):
    environment = {"python_version": python, "python_full_version": f"{python}.1"}
    pins = {}
    for pin in PINS:
        if pin.marker is None or pin.marker.evaluate(environment):
            assert pin.name not in pins
            pins[pin.name] = str(pin.specifier).removeprefix("==")
    for name in ("requirements.txt", "requirements-demo.txt", "requirements-dev.txt"):
        for requirement in requirements(name):
            assert requirement.specifier.contains(pins[requirement.name])


def test_pins_are_of_releases_that_anyone_can_get():
    for pin in PINS:
        assert pin.url is None
        assert re.fullmatch(r"==[\d.]+(post\d+)?", str(pin.specifier))


def test_what_torch_pins_by_itself_is_left_out():
    assert not [pin for pin in PINS if re.match("cuda|nvidia|triton", pin.name)]


def test_range_of_python_is_stated_alike():
    assert f"Python {PYTHONS[0]} to {PYTHONS[-1]} " in (ROOT / "README.md").read_text()
    assert f'requires-python = ">={PYTHONS[0]}"' in (ROOT / "pyproject.toml").read_text()
    assert f'["{PYTHONS[0]}", "{PYTHONS[-1]}"]' in (ROOT / ".github/workflows/ci.yml").read_text()
