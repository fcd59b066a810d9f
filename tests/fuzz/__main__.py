"""`python -m tests.fuzz [--cases 2000] [--kind data]`: many cases, and what is wrong with each.

    python -m tests.fuzz --only data:17          one case, with all that it says
    python -m tests.fuzz --only data:17 --process   the same as a user would start it

Cases run one after the other in a process that is forked from this one, so that a case without an
end, or one that takes the process with it, costs that process alone.
"""

import argparse
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
# No name that a case makes up is asked for on the hub.
os.environ.update(
    HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_DATASETS_DISABLE_PROGRESS_BARS="1"
)

from tests.fuzz import kinds  # noqa: E402 -- the variables first
from tests.fuzz.case import WAIT_LIMIT_S, shown  # noqa: E402

MEMORY_BYTES = 8 << 30
GRACE_S = 5.0  # after the time limit, which native code does not hear


def main() -> int:
    """The command line; returns how many cases went wrong, as far as an exit code can say it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--kind", choices=kinds.KINDS, action="append")
    parser.add_argument("--seed", type=int, default=0, help="of the first case of each kind")
    parser.add_argument("--only", help="KIND:SEED, one case")
    parser.add_argument("--process", action="store_true", help="as a process of its own")
    given = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="fuzz_")).resolve()
    try:
        if given.only:
            return _one(given.only, home, process=given.process)
        names = given.kind or list(kinds.KINDS)
        return _many(names, given.cases, first=given.seed, home=home)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _one(name: str, home: Path, *, process: bool) -> int:
    kind, _, seed = name.partition(":")
    kinds.build(home, [kind])
    result = kinds.run_case(kind, int(seed), home, process=process)
    print(result.what)
    print("\n".join(result.faults) or "ok")
    return bool(result.faults)


def _many(names: list[str], number: int, *, first: int, home: Path) -> int:
    begun = time.monotonic()
    wrong, counts, seconds = 0, Counter[str](), Counter[str]()
    per_kind = -(-number // len(names))
    todo = [(name, first + i) for i in range(per_kind) for name in names]
    for (kind, seed), (what, faults, took) in zip(todo, _results(todo, home), strict=True):
        counts[kind] += 1
        seconds[kind] += took
        if faults:
            wrong += 1
            print(f"{kind}:{seed}  {shown(what)}", flush=True)
            for fault in faults:
                print(f"    {shown(fault, limit=600)}", flush=True)
            print(f"    repeat: python -m tests.fuzz --only {kind}:{seed}", flush=True)
    for kind in names:
        print(f"{kind:15} {counts[kind]:5} cases, {seconds[kind]:6.0f} s")
    print(f"{sum(counts.values())} cases, {wrong} wrong, {time.monotonic() - begun:.0f} s")
    return min(wrong, 100)


def _results(todo: list[tuple[str, int]], home: Path) -> Iterator[tuple[str, list[str], float]]:
    """(what, faults, seconds) of each case, in order; a worker that is lost is replaced."""
    context = multiprocessing.get_context("fork")
    done = 0
    kinds.build_in_child(home, sorted({kind for kind, _ in todo}), context)
    while done < len(todo):
        here, there = context.Pipe()
        worker = context.Process(target=_work, args=(there, todo[done:], home))
        worker.start()
        there.close()
        try:
            while done < len(todo):
                started = time.monotonic()
                if not here.poll(WAIT_LIMIT_S + GRACE_S):
                    yield "?", [f"no end after {WAIT_LIMIT_S + GRACE_S:g} s"], WAIT_LIMIT_S
                    done += 1
                    break
                try:
                    what, faults = here.recv()
                except EOFError:
                    worker.join()
                    yield "?", [f"the process died with exit code {worker.exitcode}"], 0.0
                    done += 1
                    break
                done += 1
                yield what, faults, time.monotonic() - started
        finally:
            worker.kill()
            worker.join()


def _work(there: Connection, todo: list[tuple[str, int]], home: Path) -> None:
    with open(os.devnull, "w") as nowhere:  # what libraries say between the cases
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    for kind, seed in todo:
        result = kinds.run_case(kind, seed, home)
        there.send((result.what, result.faults))
    there.close()


if __name__ == "__main__":
    sys.exit(main())
