"""The process that reads answers: ids become text, and metrics are measured.

So the process that trains holds no tokenizer, and a metric that crashes or hangs takes nothing with
it. `python -m roll_sft.evaluation.scoring FILE TOKENIZER` reads a JSON object from stdin and writes
another to FILE:

- with `ids`: the texts of these, as `outputs`, and the metrics of `evaluation/metrics.py`;
- with `outputs`: the metrics of the function `metric_fn` alone.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from roll_sft.base.errors import report
from roll_sft.evaluation.measure import measured
from roll_sft.evaluation.metrics import BUILT_IN


def main(arguments: list[str]) -> int:
    """The process; returns its exit code."""
    try:
        task = json.load(sys.stdin)
        answer = _of_user(task) if "outputs" in task else _of_ours(task, Path(arguments[1]))
        Path(arguments[0]).write_text(json.dumps(answer), encoding="utf-8")
    except Exception as error:  # noqa: BLE001 -- a process ends here, with an exit code
        return report(error)
    return 0


def _of_ours(task: dict[str, Any], tokenizer_file: Path) -> dict[str, Any]:
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    outputs = [tokenizer.decode(ids, skip_special_tokens=True) for ids in task["ids"]]
    metrics, problems = dict[str, Any](), dict[str, str]()
    for function in BUILT_IN:
        found, problem = measured(
            function, len(outputs), outputs=outputs, references=task["references"]
        )
        metrics |= found
        if problem is not None:
            problems[function.__name__] = problem
    return {"outputs": outputs, "metrics": metrics, "problems": problems}


def _of_user(task: dict[str, Any]) -> dict[str, Any]:
    name = task.pop("metric_fn")
    module, _, function = name.rpartition(".")
    metrics, problem = measured(
        getattr(importlib.import_module(module), function), len(task["outputs"]), **task
    )
    return {"metrics": metrics, "problems": {} if problem is None else {name: problem}}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
