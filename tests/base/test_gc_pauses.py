"""The end of a process: nothing that others left for it is skipped."""

import subprocess
import sys

PROGRAM = """
import atexit, gc, sys, threading, time
own = gc.get_freeze_count()  # some versions of Python freeze what they begin with
# Registered before, so what is said here is said last.
atexit.register(lambda: print("frozen", gc.get_freeze_count() > own))
from roll_sft.base.gc_pauses import leave_quickly
leave_quickly()
leave_quickly()
atexit.register(lambda: print("other", gc.get_freeze_count() > own))
threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
unflushed = open(sys.argv[1], "w")
unflushed.write("kept")
print("end", gc.get_freeze_count() > own)
sys.exit(3)
"""


def test_a_process_ends_in_its_usual_order_and_with_its_code(tmp_path: object) -> None:
    command = [sys.executable, "-c", PROGRAM, f"{tmp_path}/file"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (3, "")
    assert result.stdout.splitlines() == ["end False", "thread", "other False", "frozen True"]
    with open(f"{tmp_path}/file") as file:
        assert file.read() == "kept"


def test_what_is_imported_is_not_searched_and_later_garbage_is_found() -> None:
    program = """
import gc, weakref
from roll_sft.base.gc_pauses import imports_kept
with imports_kept():
    assert not gc.isenabled()
    import json.tool
assert gc.isenabled()
kept = gc.get_freeze_count()
class Node: pass
def circle():
    node = Node()
    node.itself = node
    return weakref.ref(node)
late = circle()
gc.collect()
print(kept > 0, late())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("True None\n", "")
