"""Describes an error of a rank, for the driver. Loaded by a worker that fails."""

import re
import traceback
from dataclasses import dataclass

from roll_sft.base.errors import RollSftError, first_line, of_user
from roll_sft.runtime.worker import WorkerAddress

# Gloo reports a lost peer by text alone; other libraries by type, see `_is_collateral`.
PEER_IS_GONE = re.compile(r"gloo/|connection (closed|reset) by peer", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class RankFault:
    """An error of one rank.

    `is_collateral` marks an error that reports a lost or late peer, where the cause is.
    `may_pass` marks one that new workers may not meet again. `exit_code` is set for errors of
    `roll_sft.base.errors`, None for any other. `details` is the traceback.
    """

    address: WorkerAddress
    phase: str
    summary: str
    is_collateral: bool
    may_pass: bool
    exit_code: int | None
    details: str

    def __str__(self) -> str:
        return f"{self.address} failed during {self.phase}: {self.summary}"

    def error(self) -> "RankError":
        """What carries this fault to the driver."""
        return RankError(self)


class RankError(Exception):
    """Carries a `RankFault` to the driver."""

    def __init__(self, fault: RankFault) -> None:
        super().__init__(fault)
        self.fault = fault


def fault_of(error: BaseException, address: WorkerAddress, *, phase: str) -> RankFault:
    """Describe `error`, which is being handled on the rank at `address`."""
    error = of_user(error)
    code = error.exit_code if isinstance(error, RollSftError) else None
    return RankFault(
        address,
        phase=phase,
        summary=str(error) if code is not None else f"{type(error).__name__}: {first_line(error)}",
        is_collateral=_is_collateral(error),
        # torch's errors of devices and of communication are RuntimeErrors.
        may_pass=isinstance(error, RuntimeError | OSError),
        exit_code=code,
        details=traceback.format_exc(),
    )


def _is_collateral(error: BaseException) -> bool:
    # By name, because torch may be what could not be imported. All errors of torch.distributed
    # derive from DistError, NCCL's too; those of gloo are bare RuntimeErrors.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in kinds or PEER_IS_GONE.search(str(error)) is not None
