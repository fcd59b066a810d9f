"""Models named by a hub id: fetched once per node under a lock, then like any local folder.

The driver decides which commit is meant; every other node asks for that commit, so that a model
which moves during a start is the same one everywhere. Authentication, mirrors, proxies and the
place of the cache are `huggingface_hub`'s own (HF_TOKEN, HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from roll_sft.base.errors import ConfigError, ResourceError, first_line

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")
# An export has the licence and the card of the model: see assets.py.
ASSET_FILES = (
    "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "README.md", "LICENSE*", "NOTICE*",
    "USE_POLICY*",
)  # fmt: skip
WEIGHT_FILES = ("*.safetensors",)
# Copies of the weights in another format, and files in subfolders.
NOT_FETCHED = ("consolidated*", "*/*")


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model on the hub at one commit."""

    repo_id: str
    commit: str

    def folder(self) -> Path:
        """Where this node has it; never touches the network."""
        return _snapshot(self.repo_id, revision=self.commit, only_local=True)

    def fetch(self) -> None:
        """Make this node have it."""
        fetch(self.repo_id, revision=self.commit, with_weights=True)


def fetch(repo_id: str, *, revision: str | None, with_weights: bool) -> Path:
    """Download missing files and return the folder; one process of a node at a time.

    Raises `ConfigError` if there is no such model or it is not open to us, `ResourceError` if the
    hub cannot be reached and this node does not have it.
    """
    from filelock import FileLock
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{repo_id.replace('/', '--')}.roll_sft.lock"):
            return _snapshot(repo_id, revision=revision, with_weights=with_weights)
    except OSError as error:
        raise ResourceError(
            f"model.path: {repo_id!r} cannot be fetched into {cache} ({first_line(error)}); make"
            " room there, set HF_HOME, or give a local folder"
        ) from error


def _snapshot(
    repo_id: str, *, revision: str | None, with_weights: bool = True, only_local: bool = False
) -> Path:
    # slow to import
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    patterns = [*ASSET_FILES, *(WEIGHT_FILES if with_weights else ())]
    try:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=list(NOT_FETCHED),
            local_files_only=only_local,
        )
    except (RepositoryNotFoundError, GatedRepoError) as error:
        raise ConfigError(_refused(repo_id, error)) from error
    except OSError as error:  # every huggingface_hub error derives from OSError
        raise ResourceError(
            f"model.path: {repo_id!r} is no folder here, and the hub cannot be reached or lacks it"
            f" ({first_line(error)}); check the network and HF_ENDPOINT, or give a local folder"
        ) from error
    return Path(folder)


def _refused(repo_id: str, error: "HfHubHTTPError") -> str:
    return (
        f"model.path: {repo_id!r} is no folder here, and the hub refuses it"
        f" ({first_line(error)}); check the name, or set HF_TOKEN for a model that is not public"
    )
