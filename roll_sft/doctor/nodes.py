"""Verdicts on what the devices of one or several nodes were measured to do."""

import statistics
from collections.abc import Iterator
from typing import Any

from roll_sft.doctor.finding import Finding

_SLOW = 0.9  # of the median of equal devices
_MOST_SKEW_S = 2.0


def look_at_nodes(nodes: list[dict[str, Any]]) -> Iterator[Finding]:
    """Devices, sums, clocks and storage of `nodes`, as `roll_sft.runtime.survey` reports them."""
    by_kind: dict[str, list[tuple[str, float]]] = {}
    for node in nodes:
        where = f" on {node['host']}" if len(nodes) > 1 else ""
        if "error" in node:
            yield Finding(f"devices{where}", "fail", node["error"], "run it on that node alone")
            continue
        names = [f"{each['name']} {each['tflops']:.3g} TFLOP/s" for each in node["devices"]]
        driver = f", driver {node['driver']}, NCCL {node['nccl']}" if node.get("driver") else ""
        yield Finding(f"devices{where}", "ok", ", ".join(names) + driver)
        for each in node["devices"]:
            place = f"{node['host']} {each['device']}"
            by_kind.setdefault(each["name"], []).append((place, each["tflops"]))
        yield from _sum_of(node, where)
    yield from _outliers(by_kind)
    if len(nodes) > 1:
        yield _clocks(nodes)
        yield from _shared(nodes)


def _sum_of(node: dict[str, Any], where: str) -> Iterator[Finding]:
    total = node.get("all_reduce")
    if total is None:
        return
    name = f"all-reduce{where}"
    if "error" in total:
        remedy = "set NCCL_DEBUG=INFO and run it again; it names what NCCL could not use"
        yield Finding(name, "fail", total["error"], remedy)
    else:
        yield Finding(name, "ok", f"{total['gb_s']:.3g} GB/s over {total['ranks']} ranks")


def _outliers(by_kind: dict[str, list[tuple[str, float]]]) -> Iterator[Finding]:
    """Devices that are slower than others of their kind: each step waits for the slowest."""
    for name, devices in by_kind.items():
        middle = statistics.median(speed for _, speed in devices)
        for place, speed in devices:
            if speed < _SLOW * middle:
                found = f"{place}: {speed:.3g} TFLOP/s, {speed / middle:.2f} of the median"
                remedy = "look for other processes and for its clock and temperature"
                yield Finding(f"slow {name}", "warn", found, remedy)


def _clocks(nodes: list[dict[str, Any]]) -> Finding:
    skews = {node["host"]: node["skew_s"] for node in nodes if "skew_s" in node}
    worst = max(skews, key=lambda host: abs(skews[host]), default="")
    skew = abs(skews.get(worst, 0.0))
    text = f"{skew:.2f} s at most between this machine and {worst or 'the others'}"
    if skew > _MOST_SKEW_S:
        return Finding("clocks", "warn", text, "run chrony or ntpd on the nodes")
    return Finding("clocks", "ok", text)


def _shared(nodes: list[dict[str, Any]]) -> Iterator[Finding]:
    for key in ("output_dir", "data.cache_dir"):
        blind = [node["host"] for node in nodes if not node.get("sees", {}).get(key, False)]
        if blind:
            found = f"{', '.join(blind)} do not see it"
            yield Finding(f"{key} is shared", "fail", found, f"set {key} to storage of all nodes")
        else:
            yield Finding(f"{key} is shared", "ok", f"{len(nodes)} nodes see it")
