"""The nodes of a run, by the names that Argo gave them.

KFP lists a run's nodes in no order and without ids, by their last name alone: every attempt of
every step is an `executor(0)`. But each names its children, as `WORKFLOW-HASH`, and the hash is
FNV-1a of the child's full name, a path of last names:

    w(0).root(0).distil-student(0).executor(1)

in which `(1)` is the second attempt and `(1:1)` the second iteration of a loop. So every name that
could be there is hashed, and those that somebody lists are there.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

_OFFSET, _PRIME = 2166136261, 16777619  # of FNV-1a, 32 bit
_ATTEMPT = re.compile(r"(.*)\((\d+)\)")
_NO_TIME = datetime(2000, 1, 1, tzinfo=UTC)  # KFP writes 0001 or 1970 for what has not been yet
_LATE = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Node:
    """A node of a workflow: a pod, the attempts at one, or what holds others.

    Attributes:
        name: the full one.
        id: Argo's and KFP's.
        state: KFP's; None where it was left out, because what it waits for failed.
        start: None before.
        end: None before.
        error: what KFP says of it; nearly always nothing.
    """

    name: str
    id: str
    state: str | None
    start: datetime | None
    end: datetime | None
    error: str = ""

    @property
    def scope(self) -> str:
        """The full name of what it is in."""
        return self.name.rpartition(".")[0]

    @property
    def display(self) -> str:
        """The last name."""
        return self.name.rpartition(".")[2]


def node_id(workflow: str, name: str) -> str:
    """The id that Argo gives a node; the workflow's own is its name."""
    return workflow if name == workflow else f"{workflow}-{_hash(name)}"


def split_attempt(name: str) -> tuple[str, int | None]:
    """The name of what was tried, and which attempt this is: `executor(1)` -> `executor`, 1."""
    found = _ATTEMPT.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, None)


def read_nodes(details: Iterable[Any]) -> list[Node]:
    """The nodes of a run, in the order of their start.

    Args:
        details: `task_details` of KFP's API.

    Returns:
        Nothing where the server names no children: names cannot be told then.
    """
    # Those without a name are executions that ML Metadata knows, once more.
    entries = [detail for detail in details if detail.display_name]
    workflow = _workflow(entries)
    if workflow is None:
        return []
    names = _names(workflow, entries)
    placed = _by_children(workflow, entries, names)
    parents = {name: _node(workflow, name, entry) for name, entry in placed.items()}
    taken = {id(entry) for entry in placed.values()}
    leaves = [entry for entry in entries if id(entry) not in taken]
    nodes = _with_leaves(workflow, parents, leaves, set(names.values()) - parents.keys())
    return sorted(nodes.values(), key=lambda node: (node.start or _LATE, node.name))


def time_of(value: datetime | None) -> datetime | None:
    """A time of KFP's, if it has come."""
    return value if value is not None and value > _NO_TIME else None


def _hash(text: str, value: int = _OFFSET) -> int:
    for byte in text.encode():
        value = ((value ^ byte) * _PRIME) & 0xFFFFFFFF
    return value


def _children(entry: Any) -> list[str]:  # noqa: ANN401 - KFP's
    return [child.pod_name for child in entry.child_tasks or [] if child.pod_name]


def _workflow(entries: list[Any]) -> str | None:
    """The workflow's name: a node has it, and ids begin with it."""
    displays = {entry.display_name for entry in entries}
    begun_with = {child.rpartition("-")[0] for entry in entries for child in _children(entry)}
    return min(displays & begun_with, default=None)


def _names(workflow: str, entries: list[Any]) -> dict[str, str]:
    """The full names of all nodes but the workflow, by id."""
    prefix = f"{workflow}-"
    listed = {child.removeprefix(prefix) for entry in entries for child in _children(entry)}
    displays = {entry.display_name for entry in entries}
    found: dict[str, str] = {}
    scopes = ["", workflow]
    while scopes:
        scope = scopes.pop()
        path = f"{scope}." if scope else ""
        begun = _hash(path)
        for display in displays:
            value = str(_hash(display, begun))
            if value in listed and prefix + value not in found:
                found[prefix + value] = path + display
                scopes.append(path + display)
    return found


def _by_children(workflow: str, entries: list[Any], names: dict[str, str]) -> dict[str, Any]:
    """The entries that have children, by their full names.

    A node's children are its attempts, what is in it, and what waits for it, which is beside it.
    """
    known = {*names.values(), workflow}
    placed: dict[str, Any] = {}
    for entry in entries:
        display = entry.display_name
        for child in _children(entry):
            scope = names.get(child, "").rpartition(".")[0]
            beside = f"{scope}.{display}" if scope else display
            inside = scope.rpartition(".")[2] == display
            name = beside if beside in known else scope if inside else None
            if name is not None:
                placed[name] = entry
                break
    return placed


def _with_leaves(
    workflow: str, nodes: dict[str, Node], leaves: list[Any], names: set[str]
) -> dict[str, Node]:
    """Add the nodes without children, which only the times and states of what holds them tell.

    Where several would fit, as in a sweep whose variants run side by side, they are of the same
    state and of nearly the same time.
    """
    nodes = dict(nodes)
    open_names, open_leaves = defaultdict(list), defaultdict(list)
    for name in names:
        open_names[name.rpartition(".")[2]].append(name)
    for leaf in leaves:
        open_leaves[leaf.display_name].append(leaf)
    # First attempts first: the second ones begin where they end.
    for display in sorted(open_leaves, key=lambda text: (split_attempt(text)[1] or 0, text)):
        places = [_Place(name, nodes, names) for name in open_names[display]]
        free = sorted(open_leaves[display], key=lambda leaf: (_start(leaf), _end(leaf)))
        for place in sorted(places, key=lambda place: (place.earliest, place.latest, place.name)):
            if free:
                leaf = next((leaf for leaf in free if place.fits(leaf)), free[0])
                free.remove(leaf)
                nodes[place.name] = _node(workflow, place.name, leaf)
    return nodes


class _Place:
    """Where a node without children can be."""

    def __init__(self, name: str, nodes: dict[str, Node], open_names: set[str]) -> None:
        self.name = name
        tried, attempt = split_attempt(name)
        holder = nodes.get(tried if attempt is not None else name.rpartition(".")[0])
        before = nodes.get(f"{tried}({(attempt or 0) - 1})")
        begun = before.end if before else holder.start if holder else None
        self.earliest = begun or _NO_TIME
        self.latest = (holder.end if holder else None) or _LATE
        self._state: str | None = None
        self._is_repeated = False
        if attempt is not None:
            following = f"{tried}({attempt + 1})"
            self._is_repeated = following in open_names or following in nodes
            self._state = holder.state if holder and holder.end else None

    def fits(self, leaf: Any) -> bool:  # noqa: ANN401 - KFP's
        """Whether times and states allow it."""
        if not self.earliest <= _start(leaf) or (leaf.end_time and _end(leaf) > self.latest):
            return False
        if self._is_repeated:
            return bool(leaf.state == "FAILED")
        return self._state is None or bool(leaf.state == self._state)


def _start(entry: Any) -> datetime:  # noqa: ANN401 - KFP's
    return time_of(entry.start_time) or _LATE


def _end(entry: Any) -> datetime:  # noqa: ANN401 - KFP's
    return time_of(entry.end_time) or _LATE


def _node(workflow: str, name: str, entry: Any) -> Node:  # noqa: ANN401 - KFP's
    return Node(
        name=name,
        id=node_id(workflow, name),
        state=entry.state,
        start=time_of(entry.start_time),
        end=time_of(entry.end_time),
        error=(entry.error.message or "") if entry.error else "",
    )
