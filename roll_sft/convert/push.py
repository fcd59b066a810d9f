"""`roll-sft push RUN --repo-id OWNER/NAME`: an exported model to a repository of the hub.

The same function pushes at the end of a run, and may be called from Python. Token, endpoint and
proxies are huggingface_hub's own (`hf auth login`, HF_TOKEN, HF_ENDPOINT).

Promises: the token is neither written nor logged; what an earlier attempt has sent is not sent
again; a file of the repository that is neither weights nor in the folder stays as it is.
"""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from roll_sft.base.errors import ConfigError, ResourceError, first_line, report
from roll_sft.base.text import redacted
from roll_sft.config.export import Pushed, branch_problem, repo_problem

LOG = logging.getLogger(__name__)
T = TypeVar("T")
RETRY_PAUSES_S = (2.0, 10.0, 30.0)
MODEL, ADAPTER = "hf", "adapter"  # the folders of a run, and of the repository where it has both
# An earlier model may have had more of these.
WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]


@dataclass(frozen=True, slots=True)
class Destination:
    """A branch of a repository of models; `revision` None is main."""

    repo_id: str
    private: bool = True
    revision: str | None = None


def check_push(destination: Destination) -> None:
    """Make the repository if it is missing, and check that the token may write to it.

    Raises `ConfigError` without a token or rights. A hub that does not answer costs a warning: it
    may answer when the model is there.
    """
    try:
        _ready(destination)
    except ResourceError as error:
        LOG.warning("%s; the model is pushed at the end", error)


def push_run(folder: Path, destination: Destination, *, what: Pushed | None = None) -> list[str]:
    """Push the model, the adapter, or both, of the run in `folder`; returns a line for each.

    `folder` may be an exported model or adapter itself. `what` None pushes all that is there. The
    merged model of both is at the root of the repository, the adapter in `adapter/`. Raises
    `ConfigError` without a token, rights, or anything to push, `ResourceError` where the hub does
    not answer after some attempts: the same call goes on from there.
    """
    parts = list(_parts(folder, what))
    _ready(destination)
    return [_push(part, destination, place=place) for part, place in parts]


def main(arguments: list[str] | None = None, *, program: str | None = None) -> int:
    """The command line; returns the exit code, the cause as the last line on stderr."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Push the exported model of a run to a repository of the Hugging Face hub.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="output_dir, or an exported model")
    parser.add_argument("--repo-id", required=True, metavar="OWNER/NAME")
    parser.add_argument("--revision", metavar="BRANCH", help="default: main")
    parser.add_argument(
        "--public", action="store_true", help="make a missing repository public; default: private"
    )
    parser.add_argument(
        "--what", choices=("model", "adapter", "merged", "both"), help="default: all that is there"
    )
    options = parser.parse_args(arguments)
    destination = Destination(options.repo_id, not options.public, options.revision)
    try:
        for line in push_run(options.run, destination, what=options.what):
            sys.stdout.write(f"{line}\n")
    except Exception as error:  # noqa: BLE001 -- the door: everything ends in an exit code
        return report(error)
    return 0


def _parts(folder: Path, what: Pushed | None) -> Iterator[tuple[Path, str]]:
    """Folders to push, and the place of each in the repository."""
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        yield folder, ""
        return
    model, adapter = folder / MODEL, folder / ADAPTER
    wanted = {
        "model": [model],
        "merged": [model],
        "adapter": [adapter],
        "both": [model, adapter],
        None: [each for each in (model, adapter) if each.is_dir()],
    }[what]
    missing = [str(each) for each in wanted if not each.is_dir()]
    if missing or not wanted:
        lacking = " and ".join(missing) or f"neither {MODEL}/ nor {ADAPTER}/"
        raise ConfigError(
            f"{folder}: nothing to push, {lacking} is missing; export the run first, by"
            " checkpoint.hf_export or `roll-sft convert`"
        )
    for each in wanted:
        yield each, ADAPTER if len(wanted) == 2 and each == adapter else ""


def _ready(destination: Destination) -> None:
    """Make repository and branch where they are missing."""
    from huggingface_hub import HfApi, get_token

    repo_id, revision = destination.repo_id, destination.revision
    problem = repo_problem(repo_id)
    if problem is None and revision is not None:
        problem = branch_problem(revision)
    if problem is not None:
        raise ConfigError(f"export.push_to_hub: {problem}")
    if get_token() is None:
        raise ConfigError(
            f"export.push_to_hub: no token of the hub for {repo_id!r}; run `hf auth login`, or set"
            " HF_TOKEN to a token that may write"
        )
    hub = HfApi()
    _asked(lambda: hub.create_repo(repo_id, private=destination.private, exist_ok=True), repo_id)
    _asked(lambda: hub.auth_check(repo_id, write=True), repo_id)
    if revision is not None:
        _asked(lambda: hub.create_branch(repo_id, branch=revision, exist_ok=True), repo_id)


def _push(folder: Path, destination: Destination, *, place: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    hub, repo_id = HfApi(), destination.repo_id
    commit: Any = _asked(
        lambda: hub.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=place or None,
            revision=destination.revision,
            delete_patterns=None if place else WEIGHTS,
            commit_message=f"Upload {folder.name} of {folder.resolve().parent.name}",
        ),
        repo_id,
    )
    return redacted(f"{folder} is at {commit.commit_url}")


def _asked(request: Callable[[], T], repo_id: str) -> T:
    """The answer of the hub to `request`, which is repeated where the hub does not answer."""
    for pause_s in (*RETRY_PAUSES_S, None):
        try:
            return request()
        except Exception as error:
            # Its network errors are those of its HTTP and Xet libraries.
            refused = _refusal(error, repo_id)
            if refused is not None:
                raise refused from error
            if pause_s is None:
                raise ResourceError(
                    f"export.push_to_hub: the hub does not take {repo_id!r} ({first_line(error)});"
                    " check the network and HF_ENDPOINT, then `roll-sft push RUN --repo-id"
                    f" {repo_id}` goes on"
                ) from error
            LOG.info("the hub does not answer (%s); trying again", first_line(error))
            time.sleep(pause_s)
    raise AssertionError("the last attempt returns or raises")


def _refusal(error: Exception, repo_id: str) -> ConfigError | None:
    """What to say of an answer that another attempt would get again; None of any other."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(error, HFValidationError):
        return ConfigError(f"export.push_to_hub.repo_id: {first_line(error)}; write owner/name")
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return ConfigError(
            f"export.push_to_hub: the hub does not know the token for {repo_id!r}; run `hf auth"
            " login`, or set HF_TOKEN to a token that may write"
        )
    if status in (403, 404):
        return ConfigError(
            f"export.push_to_hub.repo_id: the token may not write to {repo_id!r}; give a repository"
            " of its owner, or a token with write access to that one"
        )
    if status is not None and 400 <= status < 500 and status not in (408, 409, 412, 429):
        return ConfigError(f"export.push_to_hub: {repo_id!r}: {first_line(error)}; correct it")
    return None


if __name__ == "__main__":
    sys.exit(main())
