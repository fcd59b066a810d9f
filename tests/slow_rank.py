"""`python -m tests.slow_rank ...`: `roll_sft.run`, whose rank 1 takes long for each micro-batch."""

import sys
import time

from roll_sft import run
from roll_sft.runtime import group
from roll_sft.runtime.worker import Worker

EXTRA_S = 0.2


class SlowRank(Worker):
    """A worker that is slow, if its rank is 1."""

    def beat(self) -> None:
        super().beat()
        if self._spec.rank == 1 and hasattr(self, "_engine"):
            time.sleep(EXTRA_S)


if __name__ == "__main__":
    group.Worker = SlowRank  # type: ignore[misc]
    sys.exit(run.main())
