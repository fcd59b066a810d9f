"""`python -m tests.slow_worker ...`: `roll_sft.run`, whose rank 1 does not end a save."""

import sys
import time
from typing import Any

from roll_sft import run
from roll_sft.runtime import group
from roll_sft.runtime.worker import Worker

SAVE_S = 60.0  # longer than a test waits


class SlowWorker(Worker):
    """A worker that writes its file and then hangs, if its rank is 1."""

    def setup(self, *args: Any) -> str | None:
        name = super().setup(*args)
        from roll_sft.checkpoint import tensors

        write_file, rank = tensors._write_file, self._spec.rank

        def slow(*rest: Any, **options: Any) -> Any:
            written = write_file(*rest, **options)
            time.sleep(SAVE_S if rank == 1 else 0)
            return written

        tensors._write_file = slow
        return name


if __name__ == "__main__":
    group.Worker = SlowWorker
    sys.exit(run.main())
