"""The same recipe on transformers and torch's AdamW, beside our engine."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from roll_sft.config.schema import RunConfig
from roll_sft.job.job import Job
from tests import parity

Steps = list[dict[str, float]]


def reference_run(
    job: Job, *, frozen: str | None = None, groups: dict[str, dict[str, float]] | None = None
) -> tuple[Steps, torch.nn.Module]:
    """(loss and gradient norm of each step, model after the last) of transformers.

    Parameters whose Hugging Face names the regular expression `frozen` finds are not trained.
    `groups` are regular expressions, and what parameters that they find have of their own: `factor`
    of the learning rate, `weight_decay`.
    """
    path, train = job.config.model.path, job.config.train
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").train()
    of_parameters = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen is None or not re.search(frozen, name))
        own = {"factor": 1.0, "weight_decay": train.weight_decay if parameter.ndim >= 2 else 0.0}
        for pattern, values in (groups or {}).items():
            own |= values if re.search(pattern, name) else {}
        if parameter.requires_grad:
            of_parameters.append({"params": [parameter], **own})
    optimizer = torch.optim.AdamW(
        of_parameters, betas=(train.adam_beta1, train.adam_beta2), eps=train.adam_eps
    )
    return _steps(job, model, optimizer), model


def _steps(job: Job, model: Any, optimizer: torch.optim.Optimizer) -> Steps:
    """Each step sample by sample, by the formulas of data/steps/objective.py written out."""
    train, steps = job.config.train, Steps()
    weights, noise = _weights(job), _Noise(job.config)
    model.get_input_embeddings().register_forward_hook(noise.add)
    trained = [each for group in optimizer.param_groups for each in group["params"]]
    for step in range(1, job.total_steps + 1):
        ids = job.planner.step(step).sample_ids
        counts = {index: int(job.data.train.sample(index)[1].sum()) for index in ids}
        by_tokens = sum(weights[index] * counts[index] for index in ids)
        by_samples = sum(weights[index] for index in ids)
        denominator = by_samples if train.loss == "sample_mean" else by_tokens
        denominator = len(ids) if train.loss_reduction == "sum" else denominator
        optimizer.zero_grad()
        plain_sum = objective = 0.0
        for index in ids:
            noise.begin(step, index)
            plain, with_terms = _losses(model, *job.data.train.sample(index), train=train)
            own = weights[index] * with_terms.sum() / denominator
            if train.loss == "sample_mean":
                own = own / counts[index]
            own.backward()
            plain_sum += float(plain.detach().double().sum())
            objective += float(own.detach())
        norm = torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm or torch.inf)
        for group in optimizer.param_groups:
            group["lr"] = job.schedule.at(step) * group["factor"]
        optimizer.step()
        loss = plain_sum / sum(counts.values())
        steps.append({"loss": loss, "grad_norm": float(norm), "objective": objective})
    return steps


def _losses(
    model: Any, tokens: NDArray[np.int32], mask: NDArray[np.uint8], *, train: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of each supervised token, and the same with the terms of the recipe."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    places = torch.from_numpy(np.flatnonzero(mask))
    logits, labels = model(ids[None]).logits[0][places], ids[places + 1]
    plain = F.cross_entropy(logits, labels, reduction="none")
    smooth = train.label_smoothing
    terms = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smooth)
    return plain, terms + train.z_loss_coef * logits.logsumexp(-1).square()


def _weights(job: Job) -> dict[int, float]:
    """The weight of each sample, from its row in the file."""
    lines = Path(str(job.config.data.train[0].path)).read_text().splitlines()
    of_rows = [json.loads(line).get("weight", 1.0) for line in lines]
    names = (job.data.train.sample_name(index) for index in range(len(job.data.train)))
    return {index: of_rows[int(name.rpartition(":")[2])] for index, name in enumerate(names)}


class _Noise:
    """transformers' NEFTune, with the uniform numbers that the engine draws by a hash."""

    def __init__(self, config: RunConfig) -> None:
        self._alpha, self._seed = config.train.neftune_noise_alpha, config.seed

    def begin(self, step: int, sample: int) -> None:
        self._step, self._sample = step, sample

    def add(self, module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training or not self._alpha:
            return output
        length, width = output.shape[1:]
        largest = self._alpha / (length * width) ** 0.5
        numbers = uniform_numbers(self._seed, self._step, self._sample, length, width)
        return output + largest * torch.from_numpy(numbers).float()


def uniform_numbers(
    seed: int, step: int, sample: int, length: int, width: int
) -> NDArray[np.float64]:
    """In [-1, 1), of each token and column of a sample, by MurmurHash3's finalizer."""
    digest = hashlib.sha256(f"{seed}:{step}:neftune".encode()).digest()
    salt = np.frombuffer(digest[:4], "<u4")[0]
    keys = _mixed(_mixed(np.uint32([sample])) ^ np.arange(length, dtype=np.uint32)) ^ salt
    columns = _mixed(np.arange(width, dtype=np.uint32))
    numbers = _mixed(_mixed(keys)[:, None] ^ columns) & np.uint32(0x7FFFFFFF)
    return numbers.astype(np.float32).astype(np.float64) / 2**30 - 1


def _mixed(numbers: NDArray[np.uint32]) -> NDArray[np.uint32]:
    numbers = (numbers ^ (numbers >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    numbers = (numbers ^ (numbers >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return numbers ^ (numbers >> np.uint32(16))


def write_weighted_rows(path: Path) -> Path:
    """The rows of `parity.write_rows`, most of them with a weight; one is left out by it."""
    lines = parity.write_rows(path).read_text().splitlines()
    weights = [0.25, 1.0, 3.5, None, 1e-3]
    for number, line in enumerate(lines):
        weight = 0 if number == 4 else weights[number % len(weights)]
        row = json.loads(line)
        lines[number] = json.dumps(row if weight is None else {**row, "weight": weight})
    path.write_text("\n".join(lines) + "\n")
    return path
