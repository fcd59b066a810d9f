"""The peer of a step on one GPU: transformers with torch's compiler, on the same packs.

Nothing but forward, backward, clipping and a fused AdamW in bf16. Packs lie on the device, each
document attends to itself alone by the kernel that we take, and labels are the same; the head takes
every token, as transformers does. Assumes our process groups are up, for the device.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from models import Tokens
from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM

from roll_sft.base.layout import ParallelLayout
from roll_sft.data.steps.batch import build_batch
from roll_sft.data.steps.plan import StepPlan
from roll_sft.engine.attention_kernels import Heads, choose_kernel
from roll_sft.engine.micro_batch import Segments, segments_of

NO_LABEL = -100
_segments: list[Segments] = []  # of the pack that runs


def seconds_of(
    config: Qwen2Config, tokens: Tokens, plans: list[StepPlan], *, warm_up: int
) -> float:
    """Seconds that all `plans` take but the first `warm_up`, the device's work included."""
    device = torch.device(torch.cuda.current_device())
    model, step_of = _model(config, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    steps = [[_pack(tokens, ids, device) for ids in plan.ranks[0]] for plan in plans]
    for number, packs in enumerate(steps):
        if number == warm_up:
            torch.cuda.synchronize()
            started = time.perf_counter()
        for inputs, segments in packs:
            _segments[:] = [segments]
            step_of(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def _model(
    config: Qwen2Config, device: torch.device
) -> tuple[Qwen2ForCausalLM, Callable[..., Any]]:
    """The model, and what to call."""
    heads = Heads(
        config.num_attention_heads,
        config.num_key_value_heads,
        config.hidden_size // config.num_attention_heads,
    )
    kernel = choose_kernel("auto", device=device, dtype=torch.bfloat16, heads=heads)

    @torch.compiler.disable
    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        """[1, H, T, E] and keys and values [1, G, T, E] -> [1, T, H, E]."""
        states = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
        return kernel(*states, _segments[0])[None], None

    AttentionInterface.register("segments", attention)
    with _default_dtype(torch.bfloat16), device:
        model = Qwen2ForCausalLM._from_config(config, attn_implementation="segments").train()
    return model, torch.compile(model, dynamic=True) if device.type == "cuda" else model


def _pack(
    tokens: Tokens, ids: tuple[int, ...], device: torch.device
) -> tuple[dict[str, torch.Tensor], Segments]:
    samples = [tokens.sample(index) for index in ids]
    pack = build_batch(samples, layout=ParallelLayout(1), context_rank=0)
    # Transformers takes the label of a token from the place of the next one.
    labels_T = torch.full_like(pack.labels_T, NO_LABEL)
    labels_T[pack.rows + 1] = pack.row_labels
    inputs = {
        "input_ids": pack.tokens_T,
        "position_ids": pack.positions_T,
        "labels": labels_T[None],
    }
    segments = segments_of(pack.cu_seqlens, context_size=1, context_rank=0)
    moved = {name: tensor.to(device) for name, tensor in inputs.items()}
    return moved, segments.moved(lambda tensor: tensor.to(device))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
