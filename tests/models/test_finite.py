"""The finite check: every place, sign and dtype of a number that is not finite."""

import pytest
import torch

from roll_sft.models.finite import first_not_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_is_found_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    for place in (0, 17, 1023):
        tensor = torch.randn(1024).to(dtype)
        tensor[place] = bad
        named = [("a", torch.ones(3, dtype=dtype)), ("b", tensor.view(32, 32)), ("c", tensor)]
        assert first_not_finite(named) == "b (1 of 1,024 numbers)"


def test_the_largest_numbers_are_finite_and_so_is_nothing() -> None:
    largest = torch.full((4096,), torch.finfo(torch.float16).max, dtype=torch.float16)
    assert first_not_finite([("large", largest), ("empty", torch.empty(0))]) is None
    assert first_not_finite([]) is None
    assert first_not_finite([("strided", torch.ones(8, 8).t()[1:, ::2])]) is None
