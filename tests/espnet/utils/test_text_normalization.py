import pickle
import subprocess
import sys

import pytest

from espnet.utils.text_normalization import NORMALIZERS, normalizer


@pytest.mark.parametrize(
    ("text", "basic", "whisper"),
    [
        ("BIN BLUE AT F NOW", "bin blue at f now", "bin blue at f now"),
        ("Hello, World! ", "hello world", "hello world"),
        ("[noise] so (laughs) it's me.", "so it s me", "so it is me"),
        ("I won't, um, call Mr. Smith", "i won t um call mr smith", None),
        ("twenty-five dollars", "twenty five dollars", "$25"),
        ("Caf\u00e9", "caf\u00e9", "cafe"),
        ("colour", "colour", "colour"),
        ("", "", ""),
        ("?", "", ""),
    ],
)
def test_normalizers(text, basic, whisper):
    assert normalizer("none")(text) == text
    assert normalizer("basic")(text) == basic
    expected = "i will not call mister smith" if whisper is None else whisper
    assert normalizer("whisper")(text) == expected


@pytest.mark.parametrize("name", NORMALIZERS)
def test_normalizers_pickle(name):
    text = "It's TWO, please."
    normalize = normalizer(name)
    assert pickle.loads(pickle.dumps(normalize))(text) == normalize(text)


def test_unknown_name():
    with pytest.raises(ValueError, match="got normalizer 'all', expected one of none, basic, whis"):
        normalizer("all")


def test_none_does_without_transformers():
    program = """
import sys
from espnet.utils.text_normalization import normalizer
print(normalizer("none")("A b."), "transformers" in sys.modules)
print(normalizer("basic")("A b."), "transformers" in sys.modules)
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["A b. False", "a b True"]
