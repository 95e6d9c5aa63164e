from abc import abstractmethod

import pytest

from espnet.nets.contract import Interface
from espnet.nets.pytorch_backend.frontend import resnet


class Greeter(Interface, abstract=True):
    @property
    @abstractmethod
    def name(self):
        """An attribute."""

    @abstractmethod
    def greet(self):
        """A method."""


def test_all_that_is_lacking_is_named():
    with pytest.raises(TypeError, match="^Rude lacks greet, name: see Greeter$"):

        class Rude(Greeter):
            pass


def test_classes_between_are_not_complete_but_what_they_have_counts():
    class Named(Greeter, abstract=True):
        name = "Ada"

    class Polite(Named):
        def greet(self):
            return f"Good day, {self.name}"

    assert Polite().greet() == "Good day, Ada"
    with pytest.raises(TypeError, match="Rude lacks greet: see Greeter"):
        type("Rude", (Named,), {})


def test_the_module_of_a_front_end_without_a_method_cannot_be_imported(tmp_path, monkeypatch):
    with open(resnet.__file__) as file:
        source = file.read()
    (tmp_path / "resnet_without_lengths.py").write_text(
        source.replace("def output_lengths", "def lengths")
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TypeError, match="Conv3dResNet lacks output_lengths: see FrontendInterface"):
        import resnet_without_lengths  # noqa: F401
