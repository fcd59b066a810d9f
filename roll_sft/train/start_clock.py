"""Where the time goes between a command and its first step, for the log."""

import time

import psutil


class StartUp:
    """A clock that began with this process."""

    def __init__(self) -> None:
        self._began = self._last = psutil.Process().create_time()
        self._parts: list[str] = []

    def passed(self, name: str) -> None:
        """What took the time since the last call, or since the beginning."""
        now = time.time()
        self._parts.append(f"{name} {now - self._last:.1f}")
        self._last = now

    def elapsed_s(self) -> float:
        """Seconds since this process began."""
        return float(time.time() - self._began)

    def __str__(self) -> str:
        return f"{self._last - self._began:.1f} s after the command: {', '.join(self._parts)}"
