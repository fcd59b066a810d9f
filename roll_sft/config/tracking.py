"""The section `tracking`."""

from dataclasses import dataclass
from typing import Literal

from roll_sft.config.keys import key


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingConfig:
    """Where metrics go besides the run's folder."""

    backends: list[Literal["jsonl", "mlflow", "tensorboard", "wandb"]] = key(
        ["jsonl", "mlflow"], "Trackers to write to, several at once; steps.jsonl is always written."
    )
    mlflow_uri: str | None = key(
        None, "MLflow server or database; null takes mlflow.db beside the run folders."
    )
    experiment: str = key("roll_sft", "MLflow experiment, and project of Weights & Biases.")

    @property
    def services(self) -> list[str]:
        """The trackers besides the run's own files, each once."""
        return [name for name in dict.fromkeys(self.backends) if name != "jsonl"]
