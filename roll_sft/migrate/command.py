"""`roll-sft import-config FILE`: another trainer's configuration into ours."""

import argparse
import fnmatch
import importlib
import sys
from pathlib import Path
from typing import Any

from roll_sft.base.errors import ConfigError, report
from roll_sft.base.files import write_durably
from roll_sft.config.build import build_config
from roll_sft.config.schema import RunConfig
from roll_sft.config.validate import check_config
from roll_sft.migrate.draft import OFF, Draft, shown_value
from roll_sft.migrate.given import WORLD, Given, read_given
from roll_sft.migrate.meanings import is_secret
from roll_sft.migrate.pages import as_yaml, nested, report_lines
from roll_sft.migrate.splits import settle_splits

# Name on the command line -> module of this folder.
TRAINERS = {
    "trl": "trl",
    "openrlhf": "openrlhf",
    "open-instruct": "open_instruct",
    "roll": "roll",
    "verl": "verl",
    "nemo-rl": "nemo_rl",
    "llama-factory": "llama_factory",
    "axolotl": "axolotl",
    "ms-swift": "ms_swift",
    "skyrl": "skyrl",
    "trlx": "trlx",
}
# The first that fits: (trainer, words of its command, keys that it alone has).
_SIGNS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("openrlhf", ("openrlhf",), ("model.model_name_or_path", "pretrain_mode")),
    ("open-instruct", ("open_instruct", "finetune"), ("dataset_mixer_list", "mixer_list")),
    ("verl", ("verl",), ("data.train_files", "trainer.total_epochs")),
    ("ms-swift", ("megatron", "swift"), ("mcore_model", "tuner_type", "train_type")),
    ("llama-factory", ("llamafactory", "llamafactory-cli"), ("finetuning_type", "cutoff_len")),
    ("skyrl", ("skyrl",), ("train_datasets", "placement.num_gpus_per_node")),
    ("roll", ("roll",), ("sft_train.device_mapping", "sft_train.training_args.learning_rate")),
    ("nemo-rl", ("run_sft", "nemo_rl"), ("policy.model_name", "policy.train_global_batch_size")),
    ("axolotl", ("axolotl",), ("base_model",)),
    ("trlx", ("trlx",), ("model.model_path", "method.name")),
    ("trl", ("trl", "sft.py"), ("model_name_or_path", "per_device_train_batch_size")),
)


def main(arguments: list[str] | None = None, *, program: str | None = None) -> int:
    """The command line; returns the exit code, the cause as the last line on stderr."""
    parser = argparse.ArgumentParser(prog=program, description=__doc__, allow_abbrev=False)
    parser.add_argument("file", type=Path, help="YAML, JSON, or the script with the command")
    parser.add_argument("--output", type=Path, help="the file to write; default: show it")
    parser.add_argument("--from", dest="trainer", choices=TRAINERS, help="default: by its keys")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs that the run has there")
    parser.add_argument("--check", action="store_true", help="compare batches, steps and rates")
    parser.add_argument("--samples", type=int, metavar="N", help="of the data, for --check")
    parser.add_argument(
        "--mean-tokens", type=float, metavar="N", help="of a sample, for --check of packed rows"
    )
    options = parser.parse_args(arguments)
    try:
        draft = imported(options.file, trainer=options.trainer, gpus=options.gpus)
        config = built(draft)
        _write(draft, options.file, options.output)
        lines = [*report_lines(draft)]
        if options.check:
            from roll_sft.migrate.check import comparison

            lines += comparison(draft, config, options.samples, options.mean_tokens)
        if options.output is not None:
            folder, name = options.output.parent, options.output.stem
            lines.append(f"next: roll-sft plan --config-dir {folder} --config-name {name}")
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    except Exception as error:  # noqa: BLE001 -- the door: everything ends in an exit code
        return report(error)
    return 0


def imported(path: Path, *, trainer: str | None = None, gpus: int | None = None) -> Draft:
    """Our configuration of the trainer's in `path`, and what became of each of its keys.

    Raises `ConfigError` for a file that no trainer's is, or that leaves the number of GPUs open.
    """
    if gpus is not None and gpus < 1:
        raise ConfigError(f"--gpus: {gpus} must be at least 1")
    given = read_given(path)
    module = importlib.import_module(
        f"roll_sft.migrate.{TRAINERS[trainer or _trainer_of(given, path)]}"
    )
    draft = Draft(module.NAME)
    try:
        module.translate(given, draft, gpus=gpus)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise ConfigError(
            f"{path}: a value has not the form that {module.NAME} gives it ({error}); mend it, then"
            " import"
        ) from error
    settle_splits(draft)
    _account(given, draft, module)
    return draft


def built(draft: Draft) -> RunConfig:
    """The configuration that `draft` makes; what it still lacks becomes `draft.to_set`."""
    config = build_config(nested(draft))
    try:
        check_config(config)
    except ConfigError as error:
        draft.to_set = str(error).splitlines()
    return config


def _write(draft: Draft, source: Path, output: Path | None) -> None:
    text = as_yaml(draft, source)
    if output is None:
        sys.stdout.write(f"{text}\n")
        return
    if output.exists():
        raise ConfigError(f"--output: '{output}' exists; name another file, or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_durably(output, f"{text}\n")


def _trainer_of(given: Given, path: Path) -> str:
    words = given.command.replace("/", " ").replace(".", " ").split()
    for trainer, programs, _ in _SIGNS:
        if any(program in (*words, given.command.rpartition("/")[2]) for program in programs):
            return trainer
    for trainer, _, keys in _SIGNS:
        if any(key in given for key in keys):
            return trainer
    raise ConfigError(
        f"{path}: no keys of a known trainer; name it with --from, one of {', '.join(TRAINERS)}"
    )


def _account(given: Given, draft: Draft, module: Any) -> None:
    """What becomes of each key that nothing has taken."""
    for name in given.left():
        value = given.values[name]
        shown = f"{name}: {shown_value(value)}"
        why_not_needed = _matching(name, module.NOT_NEEDED)
        why_unsupported = _matching(name, module.UNSUPPORTED)
        if is_secret(name) and value not in OFF:
            draft.secrets.append(name)
        elif name.startswith(WORLD):
            draft.not_needed[name] = "of the launcher; workers are Ray's"
        elif why_not_needed is not None:
            draft.not_needed[shown] = why_not_needed
        elif why_unsupported is not None and value in OFF:
            draft.not_needed[shown] = "off"
        elif why_unsupported is not None:
            draft.unsupported[shown] = why_unsupported
        elif value in OFF and not isinstance(value, int):
            draft.not_needed[shown] = "empty"
        else:
            draft.unknown.append(shown)
    _tell_of_taken(given, draft)


def _tell_of_taken(given: Given, draft: Draft) -> None:
    """Tell of keys that were read and left no line of their own, such as a switch that is off."""
    origins = [origin for _, origin in draft.lines.values()]
    told = "\n".join([*origins, *draft.unsupported, *draft.not_needed, *draft.notes])
    sections = [each for each in draft.not_needed if each.endswith(".*")]
    for name in (each for each in given.values if each in given.taken):
        is_told = any(fnmatch.fnmatchcase(name, section) for section in sections)
        if not is_told and name.rpartition(".")[2] not in told:
            draft.used.append(f"{name}: {shown_value(given.values[name])}")


def _matching(name: str, patterns: dict[str, str]) -> str | None:
    return next((why for each, why in patterns.items() if fnmatch.fnmatchcase(name, each)), None)
