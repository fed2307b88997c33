"""The longest known beginning of a sequence of token ids, found in time proportional to its length."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Generic, TypeVar

Value = TypeVar("Value")

_WIDTH = array("I").itemsize
"""Bytes of a token id in a key. Keys are bytes, since comparing them is a memcmp."""


class Node(Generic[Value]):
    """A place in the tree: the tokens from the root to it, and what is known there."""

    def __init__(self, edge: bytes, parent: Node[Value] | None) -> None:
        self.edge = edge
        """Tokens between the parent and here."""
        self.parent = parent
        self.children: dict[bytes, Node[Value]] = {}
        """By their first token."""
        self.value: Value | None = None

    def adopt(self, child: Node[Value]) -> None:
        """Make `child`, with its edge set, a child of this node."""
        child.parent = self
        self.children[child.edge[:_WIDTH]] = child


class PrefixIndex(Generic[Value]):
    """A radix tree over token ids: exact, no hashes, and its shape depends only on what it holds."""

    def __init__(self) -> None:
        self._root: Node[Value] = Node(b"", None)

    def __bool__(self) -> bool:
        return bool(self._root.children)

    def longest(self, token_ids: Sequence[int]) -> Value | None:
        """The value of the longest entry with which `token_ids` begins, or which it equals."""
        key, node, at, best = _key(token_ids), self._root, 0, None
        while (child := node.children.get(key[at : at + _WIDTH])) and key.startswith(child.edge, at):
            node, at = child, at + len(child.edge)
            best = node.value if node.value is not None else best
        return best

    def node(self, token_ids: Sequence[int]) -> Node[Value]:
        """The node of exactly these tokens (one at least), made if need be; set its value, or remove it."""
        key, node, at = _key(token_ids), self._root, 0
        while at < len(key):
            child = node.children.get(key[at : at + _WIDTH])
            if child is None:
                child = Node(key[at:], node)
                node.adopt(child)
                return child
            shared = _common(child.edge, key[at : at + len(child.edge)])
            node = child if shared == len(child.edge) else _split(child, shared)
            at += shared
        return node

    def remove(self, node: Node[Value]) -> None:
        """Forget the value of a node, and the nodes that served it alone."""
        node.value = None
        while node.value is None and not node.children and node.parent is not None:
            parent = node.parent
            del parent.children[node.edge[:_WIDTH]]
            node = parent
        if node.value is None and len(node.children) == 1 and node.parent is not None:
            (child,) = node.children.values()
            child.edge = node.edge + child.edge
            node.parent.adopt(child)


def _key(token_ids: Sequence[int]) -> bytes:
    return array("I", token_ids).tobytes()


def _common(a: bytes, b: bytes) -> int:
    """Length of the common beginning of two keys, in bytes of whole tokens; by bisection, so by memcmp."""
    low, high = 0, min(len(a), len(b)) // _WIDTH
    while low < high:
        middle = (low + high + 1) // 2
        if a[: middle * _WIDTH] == b[: middle * _WIDTH]:
            low = middle
        else:
            high = middle - 1
    return low * _WIDTH


def _split(child: Node[Value], shared: int) -> Node[Value]:
    """A new node in the middle of the edge above `child`."""
    assert child.parent is not None
    upper: Node[Value] = Node(child.edge[:shared], child.parent)
    child.parent.adopt(upper)
    child.edge = child.edge[shared:]
    upper.adopt(child)
    return upper
