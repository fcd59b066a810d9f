"""`make soak`: faults in real runs, one after the other, for longer than the suite has.

Each module here has `main(folder)`, which prints a table and raises where something does not hold.
"""

import sys
import tempfile
from pathlib import Path

from tests.soak import stops

PARTS = {"stops": stops.main}


def main() -> None:
    """Run the parts that the command line names, or all of them."""
    for name in sys.argv[1:] or PARTS:
        with tempfile.TemporaryDirectory(prefix=f"soak_{name}_") as folder:
            PARTS[name](Path(folder))


if __name__ == "__main__":
    main()
