"""The line that a benchmark prints for each measure, and where `make bench` keeps it.

QUICK=1 in the environment asks for fewer pairs and smaller sizes; KEEP=1 keeps the line among
`benchmarks/results/`, in the file of this kind of machine, in the place of the one before.
"""

import json
import os
import re
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

QUICK = os.environ.get("QUICK", "") not in ("", "0")
RESULTS = Path(__file__).parents[1] / "results"


def pairs(number: int) -> int:
    """How many pairs to take where `number` is due."""
    return 1 if QUICK else number


def size(number: int, *, quick: int) -> int:
    """How large or how often something is that is `number` in full."""
    return quick if QUICK else number


def show(
    name: str,
    ratios: Sequence[float],
    *,
    goal: str,
    denominator: str,
    packages: Sequence[str],
    **facts: object,
) -> None:
    """Print the median of `ratios` beside `goal`, which is such as "<= 2" or ">= 0.7"."""
    ratio, (sign, bound) = statistics.median(ratios), goal.split()
    line = {
        "name": name,
        "ratio": round(ratio, 5),
        "low": round(min(ratios), 5),
        "high": round(max(ratios), 5),
        "pairs": len(ratios),
        "goal": goal,
        "holds": ratio <= float(bound) if sign == "<=" else ratio >= float(bound),
        "denominator": denominator,
        **facts,
        "command": " ".join(["python", *_command()]),
        "quick": QUICK,
        "load": round(os.getloadavg()[0], 1),
        "device": facts.get("device", "cpu"),
        "versions": {package: _version(package) for package in ("roll_sft", *packages)},
    }
    print(json.dumps(line), flush=True)
    keep(line)


def machine() -> str:
    """What kind of machine this is: its processor and how many cores we may use."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    cores = len(os.sched_getaffinity(0))
    words = re.sub(r"[^a-z0-9]+", "-", (model[1] if model else "cpu").lower()).strip("-")
    return f"{words}-{cores}-cores"


def keep(line: dict[str, object]) -> None:
    """Keep `line`, by its name, if KEEP asks for it and it is no quick one."""
    if QUICK or not os.environ.get("KEEP"):
        return
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{machine()}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    known = {each["name"]: each for each in map(json.loads, lines)}
    known[str(line["name"])] = line
    text = "".join(f"{json.dumps(known[name])}\n" for name in sorted(known))
    path.write_text(text, encoding="utf-8")


def _command() -> list[str]:
    program = Path(sys.argv[0])
    # A path says nothing to others: an interpreter is `PYTHON`.
    return [f"benchmarks/{program.name}", *("PYTHON" if "/" in a else a for a in sys.argv[1:])]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
