"""`make soak`: faults in real runs, one after the other, for longer than the suite has.

ARGS names one part and its options, as in `make soak ARGS="chaos --seconds 60 --seed 7"`; without
it all parts run. Each module has `main(folder, arguments)`, which prints a table and raises where
something does not hold.
"""

import sys
import tempfile
from pathlib import Path

from tests.soak import chaos, clean, stops

PARTS = {"stops": stops.main, "chaos": chaos.main, "clean": clean.main}


def main() -> None:
    """Run the part that the command line names, or all of them."""
    named = sys.argv[1:2]
    for name in named or PARTS:
        if name not in PARTS:
            sys.exit(f"soak: {name!r} is no part; there are {', '.join(PARTS)}")
        with tempfile.TemporaryDirectory(prefix=f"soak_{name}_") as folder:
            PARTS[name](Path(folder), sys.argv[2:])


if __name__ == "__main__":
    main()
