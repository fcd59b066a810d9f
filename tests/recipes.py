"""The same recipe on transformers and torch's AdamW, beside our engine."""

import re

import torch
from transformers import AutoModelForCausalLM

from roll_sft.job.job import Job
from tests import parity


def reference_run(
    job: Job, *, frozen: str | None = None
) -> tuple[list[dict[str, float]], torch.nn.Module]:
    """(loss and gradient norm of each step, model after the last) of transformers.

    Parameters whose Hugging Face names the regular expression `frozen` finds are not trained.
    """
    path, train = job.config.model.path, job.config.train
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen is None or not re.search(frozen, name))
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [each for each in trained if each.ndim >= 2]},
            {"params": [each for each in trained if each.ndim < 2], "weight_decay": 0.0},
        ],
        weight_decay=train.weight_decay,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_eps,
    )
    return parity.reference_steps(job, model, optimizer), model
