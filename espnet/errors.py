"""Errors of other libraries in one line."""


def first_line(error: BaseException) -> str:
    """What an error says first, or its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def one_line(error: BaseException) -> str:
    """The last line of an error: what a data-loading process adds before it is its traceback."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[-1].split("Error: ", maxsplit=1)[-1]
