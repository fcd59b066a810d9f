"""Windows, scales, soft-caps and sinks, token by token, in packs and on context ranks."""

from typing import Any

import pytest
import torch

from roll_sft.data.steps.batch import zigzag_indices
from roll_sft.engine import attention_kernels, attention_packages
from roll_sft.engine.micro_batch import segments_of
from roll_sft.engine.variations import varied_kernels
from roll_sft.engine.variations.varied_kernels import (
    Style,
    attend_with_sinks,
    sdpa,
    strictest,
    styled,
)
from roll_sft.models.variation import LayerAttention, Variation

LENGTHS = (16, 8, 24)
BOUNDS = torch.tensor([0, 16, 24, 48], dtype=torch.int32)
STYLES = {
    "scale": Style(scale=0.7),
    "window of 1": Style(window=1),
    "window of 5": Style(window=5),
    "window of 8": Style(scale=0.3, window=8),
    "soft-cap": Style(softcap=1.5),
    "all": Style(scale=0.9, window=7, softcap=2.0),
}


def states(num_heads: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(48, num_heads, 8, generator=generator, requires_grad=True)


def dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    style: Style,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention written out, query by query, in float64: [P, H, E]."""
    outputs = []
    scale = 8**-0.5 if style.scale is None else style.scale
    starts = [start for start, n in zip((0, 16, 24), LENGTHS, strict=True) for _ in range(n)]
    for place, start in enumerate(starts):
        first = start if style.window is None else max(start, place - style.window + 1)
        k, v = (x[first : place + 1].double().repeat_interleave(2, dim=1) for x in (key, value))
        scores = torch.einsum("he,khe->hk", query[place].double(), k) * scale
        if style.softcap is not None:
            scores = style.softcap * (scores / style.softcap).tanh()
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None]], dim=-1)
        outputs.append(torch.einsum("hk,khe->he", scores.softmax(-1)[:, : len(v)], v))
    return torch.stack(outputs).float()


def gradients(output: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    return torch.autograd.grad((output * weights).sum(), inputs)


SINKS = torch.tensor([-1.0, 0.3, 2.0, 4.0], requires_grad=True)


@pytest.mark.parametrize("block", [3, 256])
@pytest.mark.parametrize("context_size", [1, 2, 4])
@pytest.mark.parametrize("sinks", [None, SINKS], ids=["plain", "sinks"])
@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_every_query_sees_its_window_and_no_more(
    style: Style,
    sinks: torch.Tensor | None,
    context_size: int,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(varied_kernels, "_BLOCK", block)
    query, key, value = states(4, 1), states(2, 2), states(2, 3)
    inputs = (query, key, value) if sinks is None else (query, key, value, sinks)
    wanted = dense(query, key, value, style, sinks)
    slices = [
        zigzag_indices(BOUNDS, context_size=context_size, context_rank=rank)
        for rank in range(context_size)
    ]
    gathered = torch.cat(slices)  # the order in which a gather brings the keys
    output = torch.empty(48, 4, 8)
    for rank, mine in enumerate(slices):
        segments = segments_of(BOUNDS, context_size=context_size, context_rank=rank)
        index = segments.key_index
        keys, values = (x if index is None else x[gathered][index] for x in (key, value))
        output[mine] = sdpa(query[mine], keys, values, segments, style=style, sinks=sinks)
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(output, *inputs), gradients(wanted, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def plain_forward(*states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention [T, H, E] without sinks, and the log-sum of its scores [H, T]."""
    query, key, value = (each.transpose(0, 1) for each in states)
    scores = (query @ key.transpose(-1, -2) * 8**-0.5).masked_fill(~LOWER, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1), scores.logsumexp(-1)


def flash_backward(
    gradient: torch.Tensor, *states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As flash attention does: the softmax from the log-sum, and no scores from the forward."""
    *heads, log_sum = states
    gradient, query, key, value, output = (each.transpose(0, 1) for each in (gradient, *heads))
    scores = (query @ key.transpose(-1, -2) * 8**-0.5).masked_fill(~LOWER, -torch.inf)
    shares = (scores - log_sum[..., None]).exp()
    of_shares = gradient @ value.transpose(-1, -2) - (gradient * output).sum(-1, keepdim=True)
    of_scores = shares * of_shares * 8**-0.5
    found = (
        of_scores @ key,
        of_scores.transpose(-1, -2) @ query,
        shares.transpose(-1, -2) @ gradient,
    )
    return tuple(each.transpose(0, 1) for each in found)


LOWER = torch.ones(48, 48, dtype=torch.bool).tril()


def test_sinks_around_a_kernel_without_them_have_the_right_gradients() -> None:
    inputs = (*(states(4, seed) for seed in (1, 2, 3)), SINKS)
    segments = segments_of(torch.tensor([0, 48], dtype=torch.int32), context_size=1, context_rank=0)
    wanted = sdpa(*inputs[:3], segments, style=Style(), sinks=SINKS)
    output = attend_with_sinks(*inputs, (plain_forward, flash_backward))
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(output, *inputs), gradients(wanted, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kernel", [attention_packages.te, attention_packages.flash])
def test_a_kernel_without_sinks_is_passed_over_with_the_reason(
    kernel: attention_kernels.Kernel,
) -> None:
    heads = attention_kernels.Heads(
        4, 2, 8, Variation((LayerAttention(0, 4, window=64),), has_sinks=True)
    )
    reason = attention_kernels.why_not(kernel, torch.device("cpu"), torch.float32, heads)
    assert reason is not None
    assert "is not built with attention sinks" in reason


def test_a_trial_notices_wrong_gradients_of_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = attention_kernels.Heads(4, 2, 8, Variation((LayerAttention(0, 4),), has_sinks=True))

    def with_fixed_sinks(*states: Any, style: Style, sinks: torch.Tensor) -> torch.Tensor:
        return sdpa(*states, style=style, sinks=sinks.detach())

    monkeypatch.setitem(varied_kernels._KERNELS, "varlen", with_fixed_sinks)
    reason = attention_kernels.why_not(
        attention_kernels.varlen, torch.device("cpu"), torch.float32, heads
    )
    assert reason is not None
    assert "output or gradient differs" in reason


@pytest.mark.parametrize("kernel", [attention_packages.te, attention_kernels.varlen])
def test_a_kernel_without_soft_caps_is_passed_over_with_the_reason(
    kernel: attention_kernels.Kernel,
) -> None:
    heads = attention_kernels.Heads(
        4, 2, 8, Variation((LayerAttention(0, 4, window=64),), attention_softcap=50.0)
    )
    reason = attention_kernels.why_not(kernel, torch.device("cpu"), torch.float32, heads)
    assert reason is not None
    assert "no soft-cap, and the model's is 50" in reason


def test_a_trial_has_a_window_that_its_samples_outgrow() -> None:
    layers = LayerAttention(0, 4, window=4096), LayerAttention(0, 4)
    variation = Variation(layers, softmax_scale=0.1)
    assert strictest(attention_kernels.sdpa, variation).keywords["style"].window == 16
    found = [styled(attention_kernels.sdpa, variation, layer).keywords["style"] for layer in layers]
    assert found == [Style(0.1, 4096), Style(0.1, None)]
