"""A causal tree as data, with every significant parent and every number of an edge.

``.json`` is the tree nested. ``.graphml`` has nodes and edges for graph programs, a node's tokens as a JSON list.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalkit.report.views.causal_tree.data import Edge, Key, Tree
from evalkit.util.files import publish
from evalkit.util.outputs import writing

if TYPE_CHECKING:
    import networkx

DATA = (".json", ".graphml")


def write_tree(tree: Tree, path: Path) -> None:
    """Write ``tree`` to ``path``, in the form that its suffix names."""
    with writing(path, "the tree"), publish(path) as temporary:
        if path.suffix.lower() == ".json":
            temporary.write_text(json.dumps(nested(tree), indent=1) + "\n", encoding="utf-8")
        else:
            import networkx  # half a second, which no other command needs

            networkx.write_graphml(graph(tree), temporary, named_key_ids=True)


def nested(tree: Tree) -> dict[str, Any]:
    """The tree as nested objects. A feature that is a parent twice is given with its own parents once, the first time."""
    below: dict[Key, list[Edge]] = {}
    for edge in tree.edges:
        below.setdefault(edge.child, []).append(edge)

    def of(node: Key) -> dict[str, Any]:
        found: dict[str, Any] = {"hook_point": node[0], "feature": node[1], "tokens": tree.tokens.get(node, [])}
        if node in tree.explanations:
            found["explanation"] = tree.explanations[node]
        found["parents"] = [{**of(edge.parent), **edge.numbers} for edge in below.pop(node, [])]
        return found

    return {"dictionary": tree.dictionary, **of(tree.target)}


def graph(tree: Tree) -> networkx.DiGraph[str]:
    """Nodes and edges, edges from the parent to the child whose activation it raises. Values that are missing are left out."""
    import networkx

    found: networkx.DiGraph[str] = networkx.DiGraph(id="tree", dictionary=_printable(tree.dictionary))
    for node in tree.nodes:
        about = {"hook_point": _printable(node[0]), "feature": node[1]}
        about["tokens"] = _printable(json.dumps(tree.tokens.get(node, []), ensure_ascii=False))
        if node in tree.explanations:
            about["explanation"] = _printable(tree.explanations[node])
        found.add_node(_name(node), **about)
    for edge in tree.edges:
        numbers = {name: value for name, value in edge.numbers.items() if value is not None}
        found.add_edge(_name(edge.parent), _name(edge.child), **numbers)
    return found


def _name(node: Key) -> str:
    return f"{node[0]}:{node[1]}"


def _printable(text: str) -> str:
    """Without the control characters that XML cannot hold."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
