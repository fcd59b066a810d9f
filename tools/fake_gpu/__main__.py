"""`make fake-gpu`: the engine on fake CUDA tensors, on any machine, without a GPU.

Fake tensors have a device, a dtype and a shape, and hold nothing; groups of processes answer at
once. So the engine runs a whole step as one rank of a layout, at full size, in seconds. Checked is
that every tensor lies where it should, that a step waits for the device where it is known to and
nowhere else, and that the peak of memory is the estimate's. Kernels and the bytes that they read
and write are counted. No kernel runs, and no number is computed.

One line for each case, and one for each fault; ends with 1 if there is any.
"""

import argparse
import contextlib
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
    parser.add_argument(
        "--codegen", action="store_true", help="the machine code of compiled functions, and no step"
    )
    parser.add_argument(
        "--switches", action="store_true", help="the case, then without each part that saves"
    )
    parser.add_argument(
        "--self-test", action="store_true", help="a small step, then one with each planted fault"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    native.load()
    if options.codegen:
        return _codegen()

    if options.self_test:
        return _self_test()
    if options.switches:
        return _switches(options.words)
    return _check(options.words, verbose=options.verbose)


def _check(words: list[str], *, verbose: bool) -> int:
    """Prints the line of each case that has all `words`, and its faults; 1 if there are any."""
    from tools.fake_gpu import table
    from tools.fake_gpu.cases import all_cases
    from tools.fake_gpu.step import Rank

    rank = Rank()
    cases = [case for case in all_cases() if all(word in case.name for word in words)]
    print(table.HEADER, flush=True)
    num_faults = 0
    for case in cases:
        started = time.perf_counter()
        line, faults = table.checked(rank, case, verbose=verbose)
        print(f"{line} {time.perf_counter() - started:5.0f} s", flush=True)
        for fault in faults:
            print(f"    FAULT {fault}", flush=True)
        num_faults += len(faults)
    print(f"{len(cases)} cases, {num_faults} faults")
    return 1 if num_faults or not cases else 0


def _switches(words: list[str]) -> int:
    """Prints what the first case that has all `words` costs, and without each part that saves."""
    from tools.fake_gpu import table
    from tools.fake_gpu.cases import all_cases
    from tools.fake_gpu.step import Rank
    from tools.fake_gpu.switches import SWITCHES, left_out

    case = next(case for case in all_cases() if all(word in case.name for word in words))
    print(f"{case.name}\n{table.COSTS}", flush=True)
    rank = Rank()
    for name in (None, *SWITCHES):
        with left_out(name) if name else contextlib.nullcontext():
            print(table.costs(name or "as it is", rank.measure(case)), flush=True)
    return 0


def _self_test() -> int:
    """Prints the faults of a small case, none, and with each plant, one; else 1."""
    from tools.fake_gpu import table
    from tools.fake_gpu.cases import Case
    from tools.fake_gpu.plants import PLANTS, planted
    from tools.fake_gpu.step import Rank

    rank = Rank()
    case = Case("0.5B", "TP2 PP2 CP2", 7, num_layers=4)
    status = 0
    for name in (None, *PLANTS):
        with planted(name) if name else contextlib.nullcontext():
            _, faults = table.checked(rank, case, verbose=False)
        status |= len(faults) != (0 if name is None else 1)
        print(f"{name or 'no plant'}: {len(faults)} fault{'s' * (len(faults) != 1)}", flush=True)
        for fault in faults:
            print(f"    {fault}", flush=True)
    return status


def _codegen() -> int:
    """Prints the machine code of each compiled function; 1 if one has none."""
    from tools.fake_gpu import device
    from tools.fake_gpu.codegen import generated
    from tools.fake_gpu.meter import Meter
    from tools.fake_gpu.waits import Waits

    device.install(Meter(Waits()), lambda tensor: [])
    status = 0
    for code in generated():
        print(f"{code.function:20s} {code.kernels} kernels, {code.num_bytes} bytes", flush=True)
        if code.fault:
            print(f"    FAULT {code.fault}", flush=True)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
