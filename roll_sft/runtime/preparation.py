"""Prepares shards of data on the cluster that a run joins: one Ray task with one CPU per shard.

A node must see the driver's token cache to write into it. So each node first looks for a file that
the driver has just created there, and tasks go only to nodes that see it: a node without the cache
would return its tasks at once, and so receive most of them. Shards that no node can prepare are
prepared on the driver.
"""

import contextlib
import logging
import uuid
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from roll_sft.base.errors import ResourceError, RollSftError, first_line
from roll_sft.config.schema import RunConfig, cluster_address
from roll_sft.data.chat.chat import ChatTokenizer
from roll_sft.data.tokens.build_shard import BuiltShard, ShardTask, build_shard
from roll_sft.data.tokens.prepare import Spread, spread_for
from roll_sft.runtime.cluster import connected

LOG = logging.getLogger(__name__)
_ANSWER_TIMEOUT_S = 30.0  # to start a process on each node and look for a file
# Each task has one CPU; the tokenizer would start a thread for each core.
ENVIRONMENT = {"env_vars": {"TOKENIZERS_PARALLELISM": "false"}}


def spread_over_cluster(config: RunConfig) -> Spread | None:
    """A function that prepares shards on the cluster that the run joins; None without one."""
    if cluster_address(config) is None:
        return None

    def over_cluster(
        tokenizer: ChatTokenizer, tasks: Sequence[ShardTask]
    ) -> Generator[BuiltShard, None, None]:
        # Preparing a single shard here is faster than starting a task.
        if len(tasks) > 1:
            with connected(config), _visible(tasks[0].folder.parent) as nonce:
                left = yield from _over_nodes(tokenizer, tasks, nonce=nonce)
        else:
            left = list(tasks)
        if left:
            yield from spread_for(left, num_proc=config.data.num_proc)(tokenizer, left)

    return over_cluster


def _over_nodes(
    tokenizer: ChatTokenizer, tasks: Sequence[ShardTask], *, nonce: Path
) -> Generator[BuiltShard, None, list[ShardTask]]:
    """Yield the shards that nodes prepared; return the tasks that no node could prepare."""
    nodes = _nodes_that_see(nonce)
    if not nodes:
        LOG.info("no node of the cluster sees data.cache_dir; preparing all shards on the driver")
        return list(tasks)
    remote: Any = ray.remote(_fill_if_visible)
    remote = remote.options(
        num_cpus=1,
        scheduling_strategy="SPREAD",
        label_selector={"ray.io/node-id": f"in({','.join(nodes)})"},
        runtime_env=ENVIRONMENT,
    )
    sent_tokenizer, left = ray.put(tokenizer), list[ShardTask]()
    waiting = {remote.remote(sent_tokenizer, task, nonce): task for task in tasks}
    try:
        while waiting:
            (ready, *_), _rest = ray.wait(list(waiting))
            task = waiting.pop(ready)
            filled = _result(ready, task)
            if filled is None:
                left.append(task)
            else:
                yield filled
    finally:
        for reference in waiting:
            ray.cancel(reference)
    if left:
        LOG.info(
            "%d of %d shards ran on nodes without the data; preparing them on the driver",
            len(left),
            len(tasks),
        )
    return left


def _nodes_that_see(nonce: Path) -> list[str]:
    """Ids of the nodes that see the file `nonce` and answer within `_ANSWER_TIMEOUT_S`."""
    probe: Any = ray.remote(_sees)
    asked = {
        probe.options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(nonce): node["NodeID"]
        for node in ray.nodes()
        if node["Alive"]
    }
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_TIMEOUT_S)
    for reference in silent:
        ray.cancel(reference)
    return [asked[reference] for reference in answered if _answer(reference)]


def _answer(reference: Any) -> bool:
    try:
        seen: bool = ray.get(reference)
    except RayError:  # the node ended meanwhile
        return False
    return seen


def _sees(nonce: Path) -> bool:
    return nonce.exists()


def _fill_if_visible(tokenizer: ChatTokenizer, task: ShardTask, nonce: Path) -> BuiltShard | None:
    """Build the shard; None where this node does not see the driver's cache or the shard's file."""
    if not nonce.exists():
        return None
    is_local = "://" not in task.shard.file
    if is_local and not Path(task.shard.file).exists():
        return None
    return build_shard(tokenizer, task)


def _result(reference: Any, task: ShardTask) -> BuiltShard | None:
    try:
        filled: BuiltShard | None = ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, RollSftError):
            raise error.cause from None
        raise
    except RayError as error:
        raise ResourceError(
            f"{task.shard.file}: a Ray task that prepared it ended ({first_line(error)}); look at"
            " the memory of the nodes, or set data.num_proc and prepare it with prepare_only=true"
        ) from error
    return filled


@contextlib.contextmanager
def _visible(folder: Path) -> Iterator[Path]:
    """A file with a new name in `folder`: a node that sees it has this folder, not a namesake."""
    folder.mkdir(parents=True, exist_ok=True)
    nonce = folder / f".visible_{uuid.uuid4().hex}"
    try:
        nonce.touch()
        yield nonce
    finally:
        nonce.unlink(missing_ok=True)
