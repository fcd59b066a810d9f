"""What must hold of a step, and the line that says how it does not."""

from collections import Counter

from roll_sft.job.memory import GIB, MemoryEstimate
from tools.fake_gpu.cases import Case
from tools.fake_gpu.step import Measured
from tools.fake_gpu.waits import Wait

TOLERANCE = 0.03  # between the counted peak and the estimate
# A step ends by reading the norm, before the update, and the loss.
END_OF_STEP = {
    Wait("item", "roll_sft/engine/optimizer.py:gradient_norm"): 1,
    Wait("synchronize", "roll_sft/engine/engine.py:read"): 1,
}
# Megatron-Core before 0.19 asks whether any token carried a label.
BEFORE_0_19 = Wait("item", "megatron/core/distributed/finalize_model_grads.py:finalize_model_grads")
# Where packs differ in length, stages tell each other the shape of a tensor before it comes.
SHAPES = "megatron/core/pipeline_parallel/p2p_communication.py:_communicate_shapes"


def findings(case: Case, measured: Measured, estimate: MemoryEstimate) -> list[str]:
    """One line for each fault."""
    found = list(measured.misplaced)
    for wait, count in Counter(measured.waits).items():
        if wait.place == SHAPES and not case.is_even:
            continue
        listed = END_OF_STEP.get(wait, 1 if wait == BEFORE_0_19 else 0)
        if count > listed:
            found.append(f"{count} waits by {wait.what} in {wait.place}; {listed} are listed")
    found += [
        f"no wait by {wait.what} in {wait.place}, where the list has one: mend the list"
        for wait in END_OF_STEP
        if wait not in measured.waits
    ]
    ratio = measured.peak_bytes / GIB / estimate.total_gib
    if case.is_even and abs(ratio - 1) > TOLERANCE:
        found.append(
            f"the peak is {measured.peak_bytes / GIB:.2f} GiB, {ratio - 1:+.1%} of the estimate's"
            f" {estimate.total_gib:.2f}"
        )
    return found
