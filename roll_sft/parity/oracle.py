"""The oracle of parity: one batch through transformers alone, unpadded and sample by sample.

Assumes one process with room for the model in fp32: weights on its device, gradients and what is
written of them in host memory and on disk. Uses nothing of Megatron-Core, and of this package only
the tokens, and the seeded weights where a run starts from random ones. Computes in fp32, on weights
rounded to the dtype that the run trains in, so that what differs is what the run adds.
"""

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file

from roll_sft.config.schema import RunConfig
from roll_sft.models.files.config_file import load_hf_config
from roll_sft.models.files.safetensors_in import SafetensorsSource
from roll_sft.models.source import ModelSource
from roll_sft.parity.task import ParityTask

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Tokens of a batch whose module outputs are kept: enough to see which module errs first, and less
# than a GiB for a 7B model.
PROBED_TOKENS = 128
_FACTS, _LOSSES, _OUTPUTS, _GRADIENTS = "reference.json", "losses", "outputs", "gradients"
_FILE = "model.safetensors"  # the name that `SafetensorsSource` looks for


@dataclass(frozen=True, slots=True)
class Facts:
    """The numbers of a reference; `loss` is the mean over its supervised tokens.

    `largest` has the largest |gradient| of each parameter and `largest_output` the largest |output|
    of its module, in the order in which the forward pass uses them.
    """

    supervised_tokens: int
    loss: float
    grad_norm: float
    largest: dict[str, float]
    largest_output: dict[str, float]


@dataclass(frozen=True, slots=True)
class Reference:
    """What `write_reference` left in a folder.

    `losses` by sample id, float32 [tokens of the sample], NaN where a token is not supervised.
    `outputs` and `gradients` by Hugging Face parameter name, float32; an output is that of the
    parameter's module, features first: [features, columns], with the columns of `probed_columns`.
    """

    facts: Facts
    losses: SafetensorsSource
    outputs: SafetensorsSource
    gradients: SafetensorsSource


def write_reference(task: ParityTask, *, device: torch.device) -> None:
    """Compute the batch of `task` on `device` and leave the result in its folder."""
    samples = {index: task.tokens.sample(index) for index in task.plan.sample_ids}
    model = load_model(task.config, task.source).to(device).train()
    outputs = _module_outputs(model, task)
    gradients = _accumulating(model)
    # Or eager attention keeps its scores of every layer: 50 GiB for 4096 tokens of a 7B model.
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    losses, total, num_supervised = {}, 0.0, 0
    for index, (tokens, label_mask) in samples.items():
        of_rows = token_losses(model, tokens, label_mask)
        (of_rows.sum() / task.plan.supervised_tokens).backward()
        known = of_rows.detach().cpu()
        losses[str(index)] = torch.full((tokens.size,), torch.nan)
        losses[str(index)][np.flatnonzero(label_mask)] = known
        total += float(known.double().sum())
        num_supervised += known.numel()
    facts = Facts(
        supervised_tokens=num_supervised,
        loss=total / num_supervised,
        grad_norm=_norm(gradients.values()),
        largest={name: float(gradient.abs().max()) for name, gradient in gradients.items()},
        largest_output={name: float(output.abs().max()) for name, output in outputs.items()},
    )
    for part, tensors in ((_LOSSES, losses), (_OUTPUTS, outputs), (_GRADIENTS, gradients)):
        (task.folder / part).mkdir()
        save_file(tensors, task.folder / part / _FILE)
    (task.folder / _FACTS).write_text(json.dumps(asdict(facts)), encoding="utf-8")


def read_reference(folder: Path) -> Reference:
    """The reference in `folder`; its tensors are mapped, not read."""
    parts = [SafetensorsSource(folder / part) for part in (_LOSSES, _OUTPUTS, _GRADIENTS)]
    return Reference(read_facts(folder), *parts)


def read_facts(folder: Path) -> Facts:
    """The numbers of the reference in `folder`."""
    return Facts(**json.loads((folder / _FACTS).read_text(encoding="utf-8")))


def probed_columns(task: ParityTask) -> dict[int, tuple[int, torch.Tensor]]:
    """Sample id -> the first column of the outputs that is the sample's, and its positions there.

    Positions int64 [k], spread over the sample, its ends included: samples late in a pack and the
    parts of every context rank are seen.
    """
    columns, start = {}, 0
    for index in task.plan.sample_ids:
        length = task.tokens.sample(index)[0].size
        count = min(length, max(2, PROBED_TOKENS // len(task.plan.sample_ids)))
        positions = torch.linspace(0, length - 1, count).round().long()
        columns[index] = start, positions
        start += count
    return columns


def load_model(config: RunConfig, source: ModelSource) -> Any:
    """The model that a run starts from, as transformers builds it, fp32 on the CPU."""
    from transformers import AutoModelForCausalLM  # slow: paid by whoever asks the oracle

    assert config.model.path is not None, "check_config refuses a missing model.path"
    options: dict[str, Any] = {"attn_implementation": "eager", "dtype": torch.float32}
    trusted = config.model.trust_remote_code
    with torch.no_grad():
        if config.model.random_init:
            hf_config = load_hf_config(config.model.path, trust_remote_code=trusted)
            model = AutoModelForCausalLM.from_config(hf_config, **options)
            for name, parameter in model.named_parameters():
                parameter.copy_(source.tensors.read(name))
        else:
            model = AutoModelForCausalLM.from_pretrained(
                config.model.path, local_files_only=True, trust_remote_code=trusted, **options
            )
        for parameter in model.parameters():
            parameter.copy_(parameter.to(DTYPES[config.model.dtype]))
    # transformers gives the row of the padding token no gradient; in a text it is a word like any.
    model.get_input_embeddings().padding_idx = None
    return model


def token_losses(
    model: Any, tokens: NDArray[np.int32], label_mask: NDArray[np.uint8]
) -> torch.Tensor:
    """Cross-entropies at the supervised positions of one unpadded sample, float32 [R]."""
    ids = torch.from_numpy(tokens.astype(np.int64)).to(model.device)
    rows = torch.from_numpy(np.flatnonzero(label_mask)).to(model.device)
    logits = model(ids[None], logits_to_keep=rows, use_cache=False).logits[0]
    return F.cross_entropy(logits.float(), ids[rows + 1], reduction="none")


def _module_outputs(model: Any, task: ParityTask) -> dict[str, torch.Tensor]:
    """Parameter name -> output of its module at the probed tokens, in the order of the modules.

    Of each module but the head, whose output is as wide as the vocabulary.
    """
    names = task.source.family.hf_shapes(task.source.shape).keys() - {"lm_head.weight"}
    modules = {name: name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    parts: dict[str, list[torch.Tensor]] = {}
    length = 0  # of the sample

    def keep(name: str, at: torch.Tensor, _module: Any, _inputs: Any, output: torch.Tensor) -> None:
        if output.ndim == 4 and output.shape[1] != length:  # heads before tokens, as in Gemma 3
            output = output.transpose(1, 2)
        parts.setdefault(name, []).append(output[0, at].flatten(1).T.float().cpu())

    for index, (_, positions) in probed_columns(task).items():
        hooks = [
            model.get_submodule(module).register_forward_hook(
                functools.partial(keep, name, positions)
            )
            for name, module in modules.items()
        ]
        ids = torch.from_numpy(task.tokens.sample(index)[0].astype(np.int64)).to(model.device)
        length = len(ids)
        with torch.no_grad():
            model(ids[None], logits_to_keep=1, use_cache=False)
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(columns, dim=1) for name, columns in parts.items()}


def _accumulating(model: Any) -> dict[str, torch.Tensor]:
    """Sums of all gradients to come, in host memory: the device has room for one of them only."""
    sums = {
        name: torch.zeros(parameter.shape, device="cpu")
        for name, parameter in model.named_parameters()
    }

    def keeper(name: str) -> Callable[[torch.Tensor], None]:
        def keep(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None, f"{name} has no gradient"
            sums[name] += parameter.grad.cpu()
            parameter.grad = None

        return keep

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(keeper(name))
    return sums


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    """Norm of all `tensors` as one vector."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return float(torch.stack(norms).norm())
