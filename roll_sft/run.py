"""The main job: `roll-sft train`, or `python -m roll_sft.run`, `--config-name NAME key=value ...`.

Hydra composes `conf/`; this module builds the configuration, runs it, and turns every outcome into
the exit code of the contract. The last line on stderr names the cause; only faults of ours show a
traceback.
"""

import argparse
import dataclasses
import difflib
import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from roll_sft.base.console import set_up_logging
from roll_sft.base.errors import FAULT, ConfigError, PreemptedError, RollSftError, report
from roll_sft.base.gc_pauses import imports_kept, leave_quickly
from roll_sft.base.text import redacted_tree, shown
from roll_sft.config.build import build_config, no_such_key
from roll_sft.config.composed import (
    override_as_typed,
    resolved,
    schema,
    yaml_as_typed,
)
from roll_sft.config.fields import section_of
from roll_sft.config.reference import help_text
from roll_sft.config.schema import RunConfig
from roll_sft.config.validate import check_config
from roll_sft.demo import demo
from roll_sft.signals import noted_signals
from roll_sft.training.run_folder import output_folder

# No telemetry unless the user asks for it by name.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Ray says this, in a long paragraph and late, of every worker whose end the run has explained.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^A worker died or was killed",
    # So that a dead server is known, and said, in seconds; the tracker tries again by itself.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "WANDB_ERROR_REPORTING": "false",
    # Otherwise Ray hides a node's GPUs from actors that ask for none, and warns that it does.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def main(
    arguments: list[str] | None = None,
    *,
    action: Callable[[RunConfig, str], None] | None = None,
) -> int:
    """Run with `arguments` (default: the command line's) and return the exit code.

    `action` is what to do with the configuration and its text instead of running it.
    """
    leave_quickly()
    be_quiet()
    with noted_signals() as signals:
        try:
            composed = compose(sys.argv[1:] if arguments is None else arguments)
            if composed is not None:
                set_up_logging()
                if demo.is_asked(composed[0]):
                    demo.make_assets(demo.ASSETS)
                (action or _run)(*composed)
        except RollSftError as error:
            return report(error)
        except KeyboardInterrupt:
            return _ended_by(signals, is_run=action is None)
        except SystemExit as leaving:
            return leaving.code if isinstance(leaving.code, int) else FAULT
        except Exception as error:  # noqa: BLE001 -- the door: everything ends in an exit code
            return report(error)
    return 0


def be_quiet() -> None:
    """Turn telemetry and long retries off, unless the user has asked for them."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def compose(arguments: list[str]) -> tuple[RunConfig, str] | None:
    """The checked configuration that `arguments` ask for, and its text to keep.

    The text has interpolations as they are, and no credentials.

    None where they ask Hydra to show something. Raises `ConfigError`, also for Hydra's errors.
    """
    flags = _flags(arguments)
    if flags.help:
        sys.stdout.write(_help())
        return None
    if flags.multirun:
        raise ConfigError("--multirun: not available in this version; start each run by itself")
    ConfigStore.instance().store(name="schema", node=schema())
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, instead of a traceback and exit code 1
    outcome: list[tuple[RunConfig, str] | ConfigError] = []
    is_composed = False

    @hydra.main(version_base="1.3", config_path=str(shipped_configurations()), config_name="base")
    def task(composed: DictConfig) -> None:
        nonlocal is_composed
        is_composed = True
        try:
            written = redacted_tree(OmegaConf.to_container(composed, resolve=False))
            outcome.append((_checked(composed), OmegaConf.to_yaml(OmegaConf.create(written))))
        except ConfigError as error:  # kept from Hydra, which would add lines of its own
            outcome.append(error)

    program, sys.argv = sys.argv, [sys.argv[0], *_flags_first(arguments)]
    try:
        with yaml_as_typed():
            task()
    except SystemExit as leaving:  # Hydra has said why, sometimes with the exit code of a fault
        raise SystemExit(ConfigError.exit_code if leaving.code == FAULT else leaving.code) from None
    except Exception as error:
        if is_composed:
            raise
        # Hydra's own errors, and those that it lets through: of YAML, of files, of values.
        raise ConfigError(hydra_message(error, arguments, flags.config_dir)) from error
    finally:
        sys.argv = program
    for result in outcome:
        if isinstance(result, ConfigError):
            raise result
        return result
    return None


def shipped_configurations() -> Path:
    """The folder of our own YAML: inside the package once installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return next(each for each in (package / "conf", package.parent / "conf") if each.is_dir())


def _checked(composed: DictConfig) -> RunConfig:
    config = build_config(resolved(complete(composed)))
    check_config(config)
    return config


def complete(composed: DictConfig) -> DictConfig:
    """`composed`, which builds on base; raises `ConfigError` if it does not."""
    absent = [field.name for field in dataclasses.fields(RunConfig) if field.name not in composed]
    if absent:
        raise ConfigError(
            f"--config-name: the configuration lacks {absent[0]!r}, so it does not build on base;"
            " begin its file with `defaults: [base, _self_]`"
        )
    return composed


def _run(config: RunConfig, composed_yaml: str) -> None:
    # Heavy imports after composition, so that a typo is reported in half a second.
    with imports_kept():
        from roll_sft.stages import run

    run(config, composed_yaml=composed_yaml)
    model = output_folder(config) / "hf"
    if demo.is_asked(config) and model.is_dir() and not (config.dry_run or config.prepare_only):
        demo.show_answer(model)


def _flags(arguments: list[str]) -> argparse.Namespace:
    """The flags of Hydra's that matter here."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--multirun", "-m", action="store_true")
    return parser.parse_known_args(arguments)[0]


def _flags_first(arguments: list[str]) -> list[str]:
    """`arguments` with the overrides as they were typed, and after the flags.

    Hydra's parser takes one group of overrides: a flag between two of them ends it.
    """
    given_flags, overrides = list[str](), list[str]()
    for before, word in zip(["", *arguments], arguments, strict=False):
        is_value = before in ("--config-dir", "-cd", "--config-name", "-cn")
        if not is_value and re.match(r"~|[^-].*=", word):
            overrides.append(override_as_typed(word) if "=" in word else word)
        else:
            given_flags.append(word)
    return [*given_flags, *overrides]


def _help() -> str:
    """Usage, the configurations there are, and every key."""
    width = shutil.get_terminal_size().columns
    usage = (
        "usage: roll-sft train [--config-name NAME] [--config-dir FOLDER] [key=value ...]\n"
        "       --cfg job prints the composed configuration; dry_run=true prints the plan\n"
    )
    names = textwrap.fill(f"configurations: {', '.join(_shipped_names())}", width=width)
    return f"{usage}{names}\n\n{help_text(width=width)}"


def _shipped_names(folder: str | None = None) -> list[str]:
    """Names for --config-name: ours, and those in `folder`."""
    folders = [shipped_configurations(), *([Path(folder)] if folder else [])]
    paths = [path.name for folder in folders for path in folder.iterdir()]
    return sorted({path.removesuffix(".yaml") for path in paths if path.endswith(".yaml")})


def hydra_message(error: Exception, arguments: list[str], config_dir: str | None) -> str:
    """One line of what Hydra refused, with the nearest real name where a name is wrong."""
    text, cause = str(error), error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        override = re.search(r"Could not override '([^']+)'", text)
        key = override.group(1) if override else str(cause.full_key)
        return no_such_key(key)
    if isinstance(error, MissingConfigException):
        return _missing_config(error, config_dir)
    lines = [line.strip() for line in [*text.splitlines(), *str(cause or "").splitlines()]]
    noise = ("full_key:", "object_type=", "reference_type=", "See https:")
    text = " ".join(dict.fromkeys(line for line in lines if line and not line.startswith(noise)))
    if isinstance(error, OverrideParseException):
        remedy = "write key=value, and a value with ( ) { } [ ] : , or = as key='\"a (b)\"'"
        return f"{shown(error.override)}: {text}; {remedy}"
    if not isinstance(error, HydraException):
        if (refused := _refused_override(arguments)) is not None:
            key = refused.partition("=")[0]
            return (
                f"{shown(refused)}: {key} is a section; write {key}.KEY=VALUE for one of its keys"
            )
        return f"--config-name: the file cannot be read: {text}; correct it"
    return text or type(error).__name__


def _refused_override(arguments: list[str]) -> str | None:
    """The argument that gives a section a bare value; Hydra refuses it without naming it."""
    sections = {item.name for item in dataclasses.fields(RunConfig) if section_of(item.type)}
    parser = OverridesParser.create()
    for argument in (each for each in arguments if "=" in each):
        try:
            override = parser.parse_override(argument)
        except HydraException:
            continue  # a flag, or one which names itself: it is not what stopped Hydra
        names_file = override.value() is None or isinstance(override.value(), str | list)
        if override.key_or_group in sections and not names_file:
            return argument
    return None


def _missing_config(error: MissingConfigException, config_dir: str | None) -> str:
    """Which file there is not, and those that there are."""
    text = " ".join(str(error).partition("Config search path:")[0].split())
    if error.options or not error.missing_cfg_file:
        return text
    names = _shipped_names(config_dir)
    nearest = difflib.get_close_matches(error.missing_cfg_file, names, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    if text.startswith("Cannot find primary config"):
        text = f"--config-name: there is no configuration {shown(error.missing_cfg_file)}"
    names_shown = ", ".join(names)
    return f"{text.rstrip('.')}; {hint}there are {names_shown}; --config-dir adds a folder of yours"


def _ended_by(signals: list[signal.Signals], *, is_run: bool) -> int:
    """The exit code of a command that a signal ended before the run, which handles its own."""
    sys.stdout.flush()
    reason = f"ended by {signals[0].name}" if signals else "interrupted"
    if is_run and signals:
        return report(PreemptedError(f"{reason}: the same command begins the run"))
    sys.stderr.write(f"{reason}\n")
    return 128 + (signals[0] if signals else signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
