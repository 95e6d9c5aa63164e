"""Interfaces that are checked while classes are defined, so when their modules are imported."""

from typing import Any


class Interface:
    """Base of interfaces, which mark with `abstractmethod` what their classes must define.

    `abc.ABC` objects only when an instance is made, which may be in the middle of a run.

    Raises:
        TypeError: Where a class is defined that lacks something, and does not say `abstract=True`.
    """

    def __init_subclass__(cls, *, abstract: bool = False, **options: Any) -> None:
        super().__init_subclass__(**options)
        lacking = [n for n in dir(cls) if getattr(getattr(cls, n), "__isabstractmethod__", False)]
        if lacking and not abstract:
            owner = next(base for base in cls.__mro__ if lacking[0] in vars(base))
            raise TypeError(f"{cls.__name__} lacks {', '.join(lacking)}: see {owner.__name__}")
