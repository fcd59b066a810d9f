"""Logits that are divided and soft-capped: losses and gradients of the head, in chunks of rows."""

from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from roll_sft.base.layout import ParallelLayout
from roll_sft.engine.micro_batch import supervised_rows
from tests.pool import RankPool

pytestmark = pytest.mark.slow

ROWS, VOCAB, WIDTH = 23, 51, 16  # the vocabulary is padded on two ranks


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(ROWS, WIDTH, generator=generator)
    weight = torch.randn(VOCAB, WIDTH, generator=generator)
    return hidden, weight, torch.randint(VOCAB, (ROWS,), generator=generator)


def head(divisor: float, cap: float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses, and the gradients of hidden states and weight on this rank. In a pool."""
    from megatron.core import parallel_state

    from roll_sft.engine import loss
    from roll_sft.models.variation import Variation

    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    hidden, weight, labels = inputs()
    share = -(-VOCAB // size)
    part = F.pad(weight, (0, 0, 0, share * size - VOCAB))[rank * share : (rank + 1) * share]
    hidden, part = hidden.requires_grad_(), part.clone().requires_grad_()
    context = supervised_rows(
        torch.arange(ROWS),
        labels,
        num_tokens=ROWS,
        vocab_size=VOCAB,
        num_shards=1,
        shard=0,
    )
    config = SimpleNamespace(
        variation=Variation((), logits_divisor=divisor, logits_softcap=cap),
        is_compiled=False,
        gradient_accumulation_fusion=False,
    )
    layer = SimpleNamespace(config=config, weight=part, _forward_pre_hooks={})
    with patch.object(loss, "chunk_rows", lambda *_, **__: 5):
        found = loss.supervised_losses(
            hidden_states=hidden[:, None], output_layer=layer, output_weight=None, context=context
        )
        found.sum().backward()
    assert hidden.grad is not None
    assert part.grad is not None
    return found.detach(), hidden.grad, part.grad


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("divisor", "cap"), [(1.0, 2.0), (3.0, None), (0.5, 4.0)])
def test_losses_and_gradients_are_those_of_the_changed_logits(
    divisor: float, cap: float | None, size: int, pool: RankPool
) -> None:
    hidden, weight, labels = inputs()
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = hidden @ weight.t() / divisor
    if cap is not None:
        logits = cap * (logits / cap).tanh()
    wanted = F.cross_entropy(logits, labels, reduction="none")
    wanted.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    found = pool.run(head, ParallelLayout(size, tensor_size=size), divisor, cap)
    for losses, of_hidden, _ in found:
        close(losses, wanted.detach().float())
        close(of_hidden, hidden.grad.float())
    close(torch.cat([part for _, _, part in found])[:VOCAB], weight.grad.float())
