"""One line of `roll-sft doctor`."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at and what was found; a remedy wherever that is not ok."""

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""


def worst(findings: list[Finding]) -> Verdict:
    """The worst verdict of `findings`."""
    verdicts = {each.verdict for each in findings}
    return "fail" if "fail" in verdicts else "warn" if "warn" in verdicts else "ok"
