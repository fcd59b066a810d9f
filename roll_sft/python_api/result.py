"""What `roll_sft.train` returns: a run's folder, read as it is asked for."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from roll_sft.base.errors import CheckpointError, ConfigError
from roll_sft.base.files import json_lines
from roll_sft.config.schema import RunConfig
from roll_sft.python_api.guest import as_guest
from roll_sft.training.run_folder import ADAPTER, CHECKPOINTS, MODEL


class History(Mapping[str, list[Any]]):
    """Metric -> its values, one for each step, from `steps.jsonl` and `eval.jsonl`.

    A value of a validation set, such as `eval/validation/loss`, is None at steps without one.
    """

    def __init__(self, folder: Path) -> None:
        steps = {line["step"]: dict(line) for line in json_lines(folder / "steps.jsonl")}
        for line in json_lines(folder / "eval.jsonl"):
            found = steps.setdefault(line["step"], {"step": line["step"]})
            name = line.get("name", "")
            more = {key: each for key, each in line.items() if key not in ("step", "name")}
            more |= more.pop("metrics", {})  # of answers
            found |= {"/".join(filter(None, ("eval", name, key))): more[key] for key in more}
        rows = [steps[step] for step in sorted(steps)]
        names = dict.fromkeys(name for row in rows for name in row)
        self._values = {name: [row.get(name) for row in rows] for name in names}

    def __getitem__(self, name: str) -> list[Any]:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def frame(self) -> Any:
        """A pandas DataFrame with a row for each step; `ConfigError` without pandas."""
        try:
            import pandas
        except ImportError as error:
            raise ConfigError("history.frame: needs pandas; pip install pandas") from error
        return pandas.DataFrame(self._values).set_index("step")


class Result:
    """A run that ended. `folder` has its files, `config` its configuration, `history` its metrics.

    `history` maps each metric to a list with a value for each step.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder, self.config = folder, config
        self.history = History(folder)

    def __repr__(self) -> str:
        losses = self.history.get("train_loss", [])
        told = f", train_loss {losses[-1]:.4f}" if losses and losses[-1] is not None else ""
        return f"<Result of {self.folder}: {len(losses)} steps{told}>"

    @property
    def checkpoint(self) -> Path | None:
        """The newest checkpoint; None where the run kept none."""
        steps = sorted((self.folder / CHECKPOINTS).glob("step_*"))
        return steps[-1] if steps else None

    @property
    def model(self) -> Path | None:
        """The folder of the exported model or, of LoRA without a merged one, of the adapter."""
        found = (self.folder / MODEL / "config.json", self.folder / ADAPTER / "adapter_config.json")
        return next((path.parent for path in found if path.is_file()), None)

    def generate(
        self,
        prompts: Sequence[Any],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 42,
        plain: bool = False,
    ) -> list[str]:
        """The model's answers to `prompts`, each a user's text or a list of messages.

        `temperature` 0 takes the most likely token; above it tokens are drawn by `seed`. `plain`
        continues texts without the chat template, for a model that was trained on texts. Raises
        `ConfigError` where the run exported no model, `DataError` for a prompt that cannot be used.
        """
        from roll_sft.chat.command import answer_lines
        from roll_sft.chat.prompts import asked
        from roll_sft.chat.speaker import Sampling

        given = [prompts] if isinstance(prompts, str) else list(prompts)
        questions = [asked(each, where=f"prompts[{index}]") for index, each in enumerate(given)]
        sampling = Sampling(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
        )
        with as_guest():
            lines = answer_lines(self._speaker, questions, sampling, is_plain=plain)
        return [line["output"] for line in lines]

    def save_pretrained(self, output: str | Path) -> Path:
        """Make the folder `output` a copy of the exported model or adapter; returns it.

        The newest checkpoint is exported where the run exported none. An earlier model in
        `output` is replaced. Raises `CheckpointError` where something else is in the way.
        """
        import shutil

        from roll_sft.convert.new_folder import new_folder
        from roll_sft.convert.to_hf import export
        from roll_sft.models.files.model_folder import local_model

        target, model = Path(output), self.model
        if model is None:
            if self.checkpoint is None:
                raise CheckpointError(
                    f"{self.folder}: has neither a model nor a checkpoint to save; train with"
                    " checkpoint.save=true"
                )
            base, path = None, self.config.model.path
            if self.config.train.freezes and path is not None:
                base = Path(local_model(path, with_weights=True)[0])
            export(self.checkpoint, target, dtype=None, replace=True, base=base)
            return target
        is_adapter = model.name == ADAPTER
        marker = "adapter_config.json" if is_adapter else "config.json"
        kind = "adapter" if is_adapter else "model"
        with new_folder(target, kind=kind, marker=marker, replace=True) as draft:
            shutil.copytree(model, draft, dirs_exist_ok=True)
        return target

    def push_to_hub(
        self, repo_id: str, *, private: bool = True, revision: str | None = None
    ) -> list[str]:
        """Push the exported model, of LoRA all that was exported, to a repository of the hub.

        A missing repository is made, `private` unless said otherwise, and so is the branch
        `revision`. Returns a line for each push. Raises `ConfigError` without a token, rights or a
        model, `ResourceError` where the hub does not answer: the same call goes on from there.
        """
        from roll_sft.convert.push import Destination, push_run

        with as_guest():
            return push_run(self.folder, Destination(repo_id, private, revision))

    def report(self) -> Path:
        """Write `report.html` and `loss.png` into the folder of the run; returns the page's path.

        The page needs no network; a run makes it at its end by itself.
        """
        from roll_sft.report.command import make

        with as_guest():
            return make([self.folder], None)

    @functools.cached_property
    def _speaker(self) -> Any:
        from roll_sft.chat.places import find_model
        from roll_sft.chat.speaker import Speaker

        base = self.config.model.path if self.config.lora.rank else None
        return Speaker(find_model(str(self.folder), base=base))
