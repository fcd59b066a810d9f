"""`python -m roll_sft.run --config-name NAME [key=value ...]`: the main job's door.

Hydra composes `conf/`; this module builds the configuration, runs it, and turns every outcome into
the exit code of the contract. The last line on stderr names the cause; only faults of ours show a
traceback.
"""

import os
import signal
import sys
import traceback
from types import FrameType

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from roll_sft.checks import check_config
from roll_sft.config import build_config, nearest_key, schema
from roll_sft.errors import RollSftError

CONFIG_ERROR = 2
FAULT = 1
INTERRUPTED = 130

# No telemetry unless the user asks for it by name, and no network where a file is local.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_OFFLINE": "1",
}


def main(arguments: list[str] | None = None) -> int:
    """Run with `arguments` (default: the command line's) and return the exit code."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # Hydra then raises instead of printing a traceback and leaving with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    ConfigStore.instance().store(name="schema", node=schema())
    signal.signal(signal.SIGTERM, _leave)
    program, sys.argv = sys.argv, [sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)]
    try:
        refusal = _compose_and_run()
    except (HydraException, OmegaConfBaseException) as error:
        return _report(_hydra_message(error), CONFIG_ERROR)
    except KeyboardInterrupt:
        return _report("interrupted", INTERRUPTED)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else FAULT
    except Exception as error:  # noqa: BLE001 -- the door: everything ends in an exit code
        traceback.print_exc()
        return _report(f"{type(error).__name__}: {error}", FAULT)
    finally:
        sys.argv = program
    return _report(refusal, refusal.exit_code) if refusal else 0


def _compose_and_run() -> RollSftError | None:
    """Let Hydra read the command line and run what it composed; an error of the user's, if any."""
    refusals: list[RollSftError] = []

    @hydra.main(version_base="1.3", config_path="pkg://roll_sft.conf", config_name="base")
    def task(composed: DictConfig) -> None:
        try:
            _run(composed)
        except RollSftError as error:  # kept from Hydra, which would add lines of its own
            refusals.append(error)

    task()
    return refusals[0] if refusals else None


def _run(composed: DictConfig) -> None:
    config = build_config(composed)
    check_config(config)
    # Heavy imports after composition, so that a typo is reported in half a second.
    from roll_sft.console import set_up_logging
    from roll_sft.driver import run

    set_up_logging()
    run(config, composed_yaml=OmegaConf.to_yaml(composed, resolve=False))


def _hydra_message(error: Exception) -> str:
    """One line of what Hydra or OmegaConf refused, with the nearest key where it is a name."""
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
        return f"{cause.full_key}: no such key{nearest_key(str(cause.full_key))}"
    texts = [str(error), str(cause or "")]
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    noise = ("full_key:", "object_type=", "reference_type=", "See https:")
    lines = [line for line in lines if not line.startswith(noise)]
    return " ".join(dict.fromkeys(lines)) or type(error).__name__


def _report(error: object, code: int) -> int:
    sys.stdout.flush()
    sys.stderr.write(f"{error}\n")
    return code


def _leave(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
