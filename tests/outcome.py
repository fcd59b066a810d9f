"""How a call of a door ended: in this process or as one of its own."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """Exit code and all that was written."""

    code: int
    stdout: str
    stderr: str

    @property
    def last_line(self) -> str:
        return self.stderr.rstrip("\n").rpartition("\n")[2]
