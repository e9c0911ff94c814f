"""The operators that make mutants: each looks at a node of a kernel's syntax tree and says which
others could stand in its place by mistake."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable, Iterator


@dataclasses.dataclass(frozen=True)
class Site:
    """Where an operator looks: a node, its text, those of other nodes, and whether it is inside a
    loop; `names` are the local names of the function."""

    node: ast.AST
    text: Callable[[ast.AST], str]
    in_loop: bool
    names: frozenset[str]


Change = tuple[ast.AST, str]
"""A node and the text that takes its place."""


def called(node: ast.AST, *names: str) -> bool:
    """Whether the node is a call of one of these functions, by the end of its name."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) in names


def bounds(site: Site) -> Iterator[Change]:
    """A bound that takes one more, or one less."""
    other = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}
    node = site.node
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in other:
        left, right = site.text(node.left), site.text(node.comparators[0])
        yield node, f"{left} {other[type(node.ops[0])]} {right}"


def shifts(site: Site) -> Iterator[Change]:
    """Ranges that begin one later or end one earlier, and a one that is forgotten."""
    node = site.node
    if called(node, "tl.arange"):
        yield node, f"({site.text(node)} + 1)"
    if called(node, "range"):
        stop = node.args[0] if len(node.args) == 1 else node.args[1]
        yield stop, f"({site.text(stop)}) - 1"
        if len(node.args) > 1:
            yield node.args[0], f"({site.text(node.args[0])}) + 1"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        if isinstance(node.right, ast.Constant) and node.right.value == 1:
            yield node, f"({site.text(node.left)})"
        if isinstance(node.left, ast.Constant) and node.left.value == 1:
            yield node, f"({site.text(node.right)})"


def masks(site: Site) -> Iterator[Change]:
    """A load or store without its mask or its `other`, a condition without one of its parts."""
    node = site.node
    if called(node, "tl.load", "tl.store"):
        parts = {keyword.arg: keyword for keyword in node.keywords}
        for dropped in ({"mask", "other"}, {"other"}):
            if not dropped & parts.keys() or (dropped == {"other"} and "other" not in parts):
                continue
            kept = [site.text(x) for x in node.args]
            kept += [f"{k}={site.text(v.value)}" for k, v in parts.items() if k not in dropped]
            yield node, f"{site.text(node.func)}({', '.join(kept)})"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr):
        yield node, f"({site.text(node.left)})"
        yield node, f"({site.text(node.right)})"


def casts(site: Site) -> Iterator[Change]:
    """A conversion that is left out; those of indices to 64 bits are `truncations`."""
    node = site.node
    method = node.func if isinstance(node, ast.Call) else None
    if isinstance(method, ast.Attribute) and method.attr in ("to", "float", "contiguous"):
        yield node, f"({site.text(method.value)})"


def truncations(site: Site) -> Iterator[Change]:
    """Indices of 32 bits where 64 were taken, 16-bit numbers where 32 were."""
    if isinstance(site.node, ast.Attribute):
        for wide, narrow in (("tl.int64", "tl.int32"), ("torch.float32", "torch.bfloat16")):
            if ast.unparse(site.node) == wide:
                yield site.node, narrow


def frozen(site: Site) -> Iterator[Change]:
    """Values that a loop should carry on and does not; sums that are not added up."""
    node = site.node
    if isinstance(node, ast.AugAssign):
        yield node, "pass"
        yield node, f"{site.text(node.target)} = {site.text(node.value)}"
    if not site.in_loop or not isinstance(node, ast.Assign):
        return
    (target,) = node.targets
    names = target.elts if isinstance(target, ast.Tuple) else [target]
    used = {name.id for name in ast.walk(node.value) if isinstance(name, ast.Name)}
    for name in names:
        if isinstance(name, ast.Name) and name.id in used:
            yield name, f"_{name.id}"


PAIRS = {
    "stride_t": "stride_h",
    "stride_h": "stride_t",
    "stride_b": "stride_h",
    "stride_s": "stride_t",
    "n_queries": "n_keys",
    "n_keys": "n_queries",
    "stride_row": "stride_column",
    "batch": "head",
    "head": "batch",
    "k_head": "v_head",
    "v_head": "k_head",
    "WIDTH": "COLUMNS",
    "M": "N",
    "N": "M",
    "n_rows": "n_columns",
    "row": "column",
    "first": "start",
    "low": "high",
    "high": "low",
    "cos": "sin",
    "c": "s",
    "k_tile": "v_tile",
    "v_tile": "k_tile",
    "full_begin": "begin",
    "full_end": "end",
    "n_heads": "n_tokens",
    "grad_k": "grad_v",
}


def exchanges(site: Site) -> Iterator[Change]:
    """One head, stride, size or tile taken for another; a quotient for a remainder."""
    node = site.node
    if isinstance(node, ast.Attribute) and node.attr in PAIRS:
        yield node, f"{site.text(node.value)}.{PAIRS[node.attr]}"
    read = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    if read and PAIRS.get(node.id) in site.names:
        yield node, PAIRS[node.id]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv | ast.Mod):
        sign = "%" if isinstance(node.op, ast.FloorDiv) else "//"
        yield node, f"{site.text(node.left)} {sign} {site.text(node.right)}"


def factors(site: Site) -> Iterator[Change]:
    """A product or quotient without one of its factors."""
    node = site.node
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        yield node, f"({site.text(node.left)})"
        yield node, f"({site.text(node.right)})"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        yield node, f"({site.text(node.left)})"


def extremes(site: Site) -> Iterator[Change]:
    """The smaller for the larger."""
    other = {
        "tl.maximum": "tl.minimum", "tl.minimum": "tl.maximum", "tl.max": "tl.min",
        "tl.min": "tl.max", "min": "max", "max": "min",
    }  # fmt: skip
    if isinstance(site.node, ast.Call) and ast.unparse(site.node.func) in other:
        yield site.node.func, other[ast.unparse(site.node.func)]


def signs(site: Site) -> Iterator[Change]:
    """A sum for a difference."""
    node = site.node
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        sign = "-" if isinstance(node.op, ast.Add) else "+"
        yield node, f"{site.text(node.left)} {sign} {site.text(node.right)}"
    minus = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    if minus and not isinstance(node.operand, ast.Constant):
        yield node, site.text(node.operand)


def selections(site: Site) -> Iterator[Change]:
    """One side of a choice always, a branch taken when it should not be."""
    node = site.node
    if called(node, "tl.where", "torch.where"):
        yield node, f"({site.text(node.args[1])})"
        yield node, f"({site.text(node.args[2])})"
    if isinstance(node, ast.If | ast.IfExp) and not re.search(r"\bNone\b", site.text(node.test)):
        yield node.test, f"not ({site.text(node.test)})"


OPERATORS: dict[str, Callable[[Site], Iterator[Change]]] = {
    operator.__name__: operator
    for operator in (
        bounds,
        shifts,
        masks,
        casts,
        truncations,
        frozen,
        exchanges,
        factors,
        extremes,
        signs,
        selections,
    )
}
