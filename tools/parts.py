"""The command of a check that has parts: each prints what it finds, one a line, and the count."""

import argparse
from collections.abc import Callable, Iterator, Mapping


def run_parts(parts: Mapping[str, Callable[[], Iterator[str]]], *, description: str) -> int:
    """Run `parts` in order, without those that `--skip` names; 1 if any finds something."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--skip", action="append", default=[], choices=parts, metavar="PART")
    skipped = parser.parse_args().skip
    num_found = 0
    for name, find in parts.items():
        findings = [] if name in skipped else list(find())
        num_found += len(findings)
        state = "left out, as asked for" if name in skipped else f"{len(findings)} found"
        lines = [*(f"{name}: {each}" for each in findings), f"{name}: {state}"]
        print("\n".join(lines), flush=True)
    return 1 if num_found else 0
