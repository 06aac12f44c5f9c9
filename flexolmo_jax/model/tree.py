"""Parameter trees as flat dicts by path ("trunk/layers/attention/q/kernel") and back; picking parts
of them by path."""

from collections.abc import Callable, Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": x}}` -> `{"a/b": x}`, in sorted order."""
    flat = {}
    for key in sorted(tree):
        value = tree[key]
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *branches, leaf = path.split("/")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[leaf] = value
    return tree


def partition(
    tree: Mapping[str, Any], belongs: Callable[[str], bool]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parts of a tree whose paths belong, and the rest."""
    flat = flatten(tree)
    chosen = {path: value for path, value in flat.items() if belongs(path)}
    rest = {path: value for path, value in flat.items() if path not in chosen}
    return unflatten(chosen), unflatten(rest)


def combine(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """The union of trees that share no leaf."""
    return unflatten({path: value for tree in trees for path, value in flatten(tree).items()})
