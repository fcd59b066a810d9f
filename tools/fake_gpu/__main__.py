"""`make fake-gpu`: the engine on fake CUDA tensors, on any machine, without a GPU.

Fake tensors have a device, a dtype and a shape, and hold nothing; groups of processes answer at
once. So the engine runs a whole step as one rank of a layout, at full size, in seconds. Checked is
that every tensor lies where it should, that a step waits for the device where it is known to and
nowhere else, and that the peak of memory is the estimate's. Kernels and the bytes that they read
and write are counted. No kernel runs, and no number is computed.

One line for each case, and one for each fault; ends with 1 if there is any.
"""

import argparse
import logging
import sys
import time
import warnings

from tools.fake_gpu import native


def main() -> int:
    """Checks the cases that are asked for."""
    parser = argparse.ArgumentParser(
        prog="make fake-gpu", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("words", nargs="*", help="cases whose names have all of these, such as 7B")
    parser.add_argument("--verbose", action="store_true", help="kernels and bytes, part by part")
    parser.add_argument("--plant", help="a fault to be found, by name")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    native.load()

    from tools.fake_gpu import plants, table
    from tools.fake_gpu.cases import all_cases
    from tools.fake_gpu.step import Rank

    rank = Rank()
    if options.plant:
        plants.plant(options.plant)
    cases = [case for case in all_cases() if all(word in case.name for word in options.words)]
    if not cases:
        parser.error(f"no case has {' '.join(options.words)!r} in its name")
    print(table.HEADER, flush=True)
    num_faults = 0
    for case in cases:
        started = time.perf_counter()
        line, faults = table.checked(rank, case, verbose=options.verbose)
        print(f"{line} {time.perf_counter() - started:5.0f} s", flush=True)
        for fault in faults:
            print(f"    FAULT {fault}", flush=True)
        num_faults += len(faults)
    print(f"{len(cases)} cases, {num_faults} faults")
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
