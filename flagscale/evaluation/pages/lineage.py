"""Which data, teacher, code and recipe made an artifact: its manifest's ancestors as one page.

KFP's own lineage went with its metadata store, and a student that is taken home has left it anyway:
the page needs no server, no network and no script, and says of every step what its manifest says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flagscale.artifacts import Manifest
from flagscale.evaluation.pages.template import template
from flagscale.evaluation.pages.texts import flat

_TITLES = {
    "dataset": "Data",
    "teacher": "Teacher",
    "teacher-outputs": "The teacher's outputs",
    "student": "Student before training",
    "distilled-student": "Distilled student",
    "evaluation": "Evaluation",
    "export": "Exported student",
}
_BOX, _HEIGHT, _SPACE, _GAP = 210, 46, 18, 34  # of the drawing: boxes, and what is between them


@dataclass(frozen=True)
class Node:
    """An artifact of the lineage.

    Attributes:
        digest: `sha256:...`.
        title: its kind, for people.
        parents: name -> digest of what it was made of.
        depth: steps from the first one, by the longest way.
        values: what is known of it; empty if it was made before manifests said it.
    """

    digest: str
    title: str
    parents: Mapping[str, str]
    depth: int
    values: Mapping[str, Any]

    @property
    def short(self) -> str:
        """The first digits of the digest."""
        return self.digest.removeprefix("sha256:")[:12]


def lineage(manifest: Manifest) -> list[Node]:
    """The artifact and all that it was made of, the first ones first, itself last."""
    known = manifest.lineage()
    names = {digest: name for one in known.values() for name, digest in one["parents"].items()}
    depths: dict[str, int] = {}

    def depth(digest: str) -> int:
        if digest not in depths:
            parents = known.get(digest, {}).get("parents", {}).values()
            depths[digest] = max((depth(parent) + 1 for parent in parents), default=0)
        return depths[digest]

    depth(manifest.digest)
    nodes = []
    for digest in depths:
        values = known.get(digest, {})
        kind = values.get("kind", names.get(digest, ""))
        title = _TITLES.get(kind, kind.replace("-", " "))
        nodes.append(Node(digest, title, values.get("parents", {}), depths[digest], values))
    return sorted(nodes, key=lambda node: (node.depth, node.title, node.digest))


def render(manifest: Manifest) -> str:
    """The page as HTML. The same manifest gives the same bytes."""
    nodes = lineage(manifest)
    by_digest = {node.digest: node for node in nodes}
    codes = {node.values["code"] for node in nodes if node.values.get("code")}
    return template("pages/lineage.html.j2").render(
        title=by_digest[manifest.digest].title,
        tiles=_tiles(nodes),
        drawing=_drawing(nodes),
        code=codes.pop() if len(codes) == 1 else None,
        nodes=[
            {
                "node": node,
                "parents": [(name, by_digest[d]) for name, d in sorted(node.parents.items())],
                "facts": flat(node.values.get("facts", {})),
                "recipe": flat(node.values.get("recipe", {})),
                "made": flat({"code": node.values.get("code") or "not recorded"})
                + flat(node.values.get("libraries", {})),
            }
            for node in nodes
        ],
    )


def _tiles(nodes: list[Node]) -> list[dict[str, str]]:
    """What is asked first."""
    first = {node.values.get("kind"): node for node in nodes}
    tiles = []
    if "dataset" in first:
        facts = first["dataset"].values["facts"]
        tokens = facts.get("splits", {}).get("train", {}).get("tokens", 0)
        sources = ", ".join(str(corpus["source"]) for corpus in facts.get("corpora", []))
        note = sources or first["dataset"].short
        tiles.append({"label": "Data", "value": f"{tokens:,} tokens", "note": note})
    if "teacher" in first:
        origin = first["teacher"].values["facts"].get("origin", {})
        name = origin.get("base_model") or origin.get("source") or first["teacher"].short
        note = first["teacher"].values["recipe"].get("teacher", {}).get("source") or ""
        tiles.append({"label": "Teacher", "value": str(name), "note": str(note)})
    last = nodes[-1]
    tiles.append({"label": last.title, "value": last.short, "note": last.digest})
    return tiles


def _drawing(nodes: list[Node]) -> dict[str, Any]:
    """Boxes from the first to the last, row by row, and the lines between them."""
    rows: dict[int, list[Node]] = {}
    for node in nodes:
        rows.setdefault(node.depth, []).append(node)
    width = max(len(row) for row in rows.values()) * (_BOX + _SPACE)
    places: dict[str, tuple[float, float]] = {}
    for depth, row in rows.items():
        for column, node in enumerate(row):
            x = width / 2 + (column - (len(row) - 1) / 2) * (_BOX + _SPACE)
            places[node.digest] = (x, depth * (_HEIGHT + _GAP) + 1)
    boxes = [
        {"node": node, "x": x - _BOX / 2, "y": y, "middle": x}
        for node in nodes
        for x, y in [places[node.digest]]
    ]
    lines = []
    for node in nodes:
        x, y = places[node.digest]
        for parent in _nearest(node, {one.digest: one for one in nodes}):
            px, py = places[parent]
            bottom, half = py + _HEIGHT, _GAP / 2
            lines.append(
                f"M{px:g},{bottom:g}C{px:g},{bottom + half:g} {x:g},{y - half:g} {x:g},{y:g}"
            )
    height = (max(rows) + 1) * (_HEIGHT + _GAP) - _GAP + 2
    return {
        "boxes": boxes, "lines": lines, "width": width, "height": height,
        "box_width": _BOX, "box_height": _HEIGHT,
    }  # fmt: skip


def _nearest(node: Node, by_digest: Mapping[str, Node]) -> list[str]:
    """Parents that are no ancestor of another parent: the others would cross the drawing."""
    parents = set(node.parents.values())
    further = {digest for parent in parents for digest in _ancestors(by_digest[parent], by_digest)}
    return sorted(parents - further)


def _ancestors(node: Node, by_digest: Mapping[str, Node]) -> set[str]:
    parents = set(node.parents.values())
    return parents.union(*(_ancestors(by_digest[parent], by_digest) for parent in parents))
