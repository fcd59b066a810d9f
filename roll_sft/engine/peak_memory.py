"""The most memory that a rank has held since it was asked last.

On a GPU what torch's allocator held. On a CPU the process's own resident memory: pages of mapped
files, such as the token cache, are the system's and go when others need them.
"""

import contextlib
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_PEAK_RESIDENT = "5"  # what to write there so that the peak begins anew; see proc(5)


class PeakMemory:
    """Of this process on `device`, from now on."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._reset()

    def take_gib(self) -> float:
        """The peak since the last call, in GiB; the next one begins here."""
        peak = torch.cuda.max_memory_allocated() if self._on_gpu else _own_peak_bytes()
        self._reset()
        return peak / 2**30

    def _reset(self) -> None:
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError):  # where the kernel keeps none of this, it is of all time
            _RESET.write_text(_PEAK_RESIDENT, encoding="ascii")


def _own_peak_bytes() -> int:
    # The kernel keeps one peak, of all resident pages. Those of files change little within a step.
    kib = {"VmHWM": 0, "RssFile": 0, "RssShmem": 0}
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name in kib:
            kib[name] = int(value.split()[0])
    return (kib["VmHWM"] - kib["RssFile"] - kib["RssShmem"]) * 1024
