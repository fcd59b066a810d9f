"""The finite check: every place, sign and dtype of a number that is not finite."""

import pytest
import torch

from roll_sft.models.files.finite import NotFiniteError, check_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_is_found_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    for place in (0, 17, 1023):
        tensor = torch.randn(1024).to(dtype)
        tensor[place] = bad
        with pytest.raises(NotFiniteError, match=r"b \(1 of 1,024 numbers\)"):
            check_finite("b", tensor.view(32, 32))


def test_the_largest_numbers_are_finite_and_so_is_nothing() -> None:
    largest = torch.full((4096,), torch.finfo(torch.float16).max, dtype=torch.float16)
    check_finite("large", largest)
    check_finite("empty", torch.empty(0))
    check_finite("strided", torch.ones(8, 8).t()[1:, ::2])
