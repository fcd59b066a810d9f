"""`python -m tests.faulty_worker parity ...`: `roll-sft`, whose workers compute something wrong."""

import sys
from typing import Any

from roll_sft import cli
from roll_sft.runtime import group
from roll_sft.runtime.worker import Worker

FAULT = "padded vocabulary in the softmax"


class FaultyWorker(Worker):
    """A worker with FAULT."""

    def setup(self, *args: Any) -> str | None:
        from tests.faults import planted

        self._resources.enter_context(planted(FAULT))
        return super().setup(*args)


if __name__ == "__main__":
    group.Worker = FaultyWorker
    sys.exit(cli.main())
