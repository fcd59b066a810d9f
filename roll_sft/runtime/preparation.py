"""Shards of data prepared by the cluster that a run joins, one Ray task and one CPU each.

Only a node that sees the driver's token cache can help: what it writes must be found again. So each
node is first asked for a file that the driver has just put there, and tasks go to those that see it
alone: others would answer at once, and so draw most of the queue. What no node can prepare is
prepared by the driver's machine, so a cluster without shared disks costs time and never the run.
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
# Each task has one CPU, and the tokenizer would take them all.
ENVIRONMENT = {"env_vars": {"TOKENIZERS_PARALLELISM": "false"}}


def spread_over_cluster(config: RunConfig) -> Spread | None:
    """Prepares shards on the cluster that `config` joins; None where it joins none."""
    if cluster_address(config) is None:
        return None

    def over_cluster(
        tokenizer: ChatTokenizer, tasks: Sequence[ShardTask]
    ) -> Generator[BuiltShard, None, None]:
        # One shard is quicker done than sent.
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
    """Yield what nodes prepared; return the tasks that met a node which cannot help."""
    nodes = _nodes_that_see(nonce)
    if not nodes:
        LOG.info("no node of the cluster shares data.cache_dir; this machine prepares all shards")
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
            "%d of %d shards ran on nodes without the data; preparing them on this machine",
            len(left),
            len(tasks),
        )
    return left


def _nodes_that_see(nonce: Path) -> list[str]:
    """The ids of the nodes that see the file; those that do not answer in time are left out."""
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
    except RayError:  # a node that ended meanwhile cannot help
        return False
    return seen


def _sees(nonce: Path) -> bool:
    return nonce.exists()


def _fill_if_visible(tokenizer: ChatTokenizer, task: ShardTask, nonce: Path) -> BuiltShard | None:
    """`build_shard` where this node shares the driver's cache and sees the file; None elsewhere."""
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
    """A file in `folder` that a node sees if it sees this folder and not one of the same name."""
    folder.mkdir(parents=True, exist_ok=True)
    nonce = folder / f".visible_{uuid.uuid4().hex}"
    try:
        nonce.touch()
        yield nonce
    finally:
        nonce.unlink(missing_ok=True)
