"""Files of hypotheses, which are written while a test list is decoded."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from espnet.utils.recovery.checkpoint_io import whole_file, write_errors

SUMMARY = "summary.json"
SETTINGS = "decoding.json"  # beside hypotheses until they are complete
ERROR = "error"  # of a line: why the clip could not be read
CUT = "cut"  # of a line: that the hypothesis has as many tokens as it may, and no end


class HypothesisFiles:
    """A file of JSON lines for each condition, `hypotheses_<condition>.jsonl`.

    While utterances are decoded, each process adds to a file of its own: the first to that of the
    condition, the others to ones that bear their number. At the end there is one, in the order of
    the list.

    Args:
        folder: Of the files; made when the first is begun.
        settings: What hypotheses depend on, plain values by name; None if nobody will go on.
        resume: Whether to go on with what the folder has.

    Raises:
        ValueError: If it was decoded with other settings.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any] | None = None, *, resume: bool = False
    ) -> None:
        self.folder = folder
        self.settings = None if settings is None else json.loads(json.dumps(settings))
        self._resume = resume and self._can_resume()

    def path(self, name: str, process: int = 0) -> Path:
        """The file of a condition; before the end, that of a process."""
        return self.folder / f"hypotheses_{name}{f'.rank{process}' if process else ''}.jsonl"

    def begin(self, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """Begins the files, in the first process, before any other adds to one.

        Returns:
            By condition the lines that are there already, without those of clips that could not be
            read: they may have been mended.
        """
        with write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if self.settings is not None:
            with whole_file(self.folder / SETTINGS) as unfinished:
                unfinished.write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
        found = {}
        for name in names:
            of_processes = list(self.folder.glob(f"hypotheses_{name}.rank*.jsonl"))
            paths = [self.path(name), *sorted(of_processes)]
            lines = [line for path in paths for line in _read(path)] if self._resume else []
            found[name] = [line for line in lines if ERROR not in line]
            self.finish(name, found[name])
        return found

    def add(self, name: str, lines: Iterable[Mapping[str, Any]], process: int) -> None:
        """Adds lines to the file of a process."""
        path = self.path(name, process)
        with write_errors(path), path.open("a", encoding="utf-8") as file:
            file.writelines(map(_line, lines))

    def finish(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        """Makes one file of those of all processes, in the first of them."""
        with whole_file(self.path(name)) as unfinished, unfinished.open("w", encoding="utf-8") as f:
            f.writelines(map(_line, lines))
        for path in self.folder.glob(f"hypotheses_{name}.rank*.jsonl"):
            path.unlink()

    def summarise(self, summaries: list[dict[str, Any]]) -> None:
        """Writes the summary of all conditions, with the settings, once they are complete."""
        known = {} if self.settings is None else {"decoding": self.settings}
        with whole_file(self.folder / SUMMARY) as unfinished:
            text = json.dumps([{**summary, **known} for summary in summaries], indent=2)
            unfinished.write_text(text + "\n", encoding="utf-8")
        (self.folder / SETTINGS).unlink(missing_ok=True)

    def _can_resume(self) -> bool:
        """Whether there are hypotheses to go on with."""
        if not any(self.folder.glob("hypotheses_*.jsonl")):
            return False
        before = self._settings_before()
        if before is None:
            raise ValueError(
                f"--resume: nothing in {self.folder} tells how its hypotheses were decoded: leave "
                "--resume out to decode anew, or give another --output-dir"
            )
        names = before.keys() | (self.settings or {}).keys()
        for name in sorted(names):
            then, now = before.get(name), (self.settings or {}).get(name)
            if then != now:
                raise ValueError(
                    f"--resume: the hypotheses in {self.folder} were decoded with {name} {then}, "
                    f"not {now}: give that, or leave --resume out to decode anew"
                )
        return True

    def _settings_before(self) -> dict[str, Any] | None:
        """Those of the hypotheses that are there; of complete ones, the summary tells."""
        try:
            if (path := self.folder / SETTINGS).is_file():
                return dict(json.loads(path.read_text(encoding="utf-8")))
            summaries = json.loads((self.folder / SUMMARY).read_text(encoding="utf-8"))
            return dict(summaries[0]["decoding"])
        except (OSError, ValueError, LookupError, TypeError):
            return None


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a killed process may have left half a line at its end."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_bytes().split(b"\n")[:-1]:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "id" in line:
            lines.append(line)
    return lines


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"
