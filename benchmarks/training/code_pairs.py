"""Pairs of Python functions, for confidence off the training data: the standard library's own against one with a fault.

    python -m benchmarks.training.code_pairs runs/code_pairs.jsonl

The prompt is a function's signature and docstring. The chosen response is its source. The rejected one has one fault of
the kinds of mutation testing: a comparison or an operator is exchanged, a condition negated, a constant moved by one, a
statement left out. Which is better is certain, and the texts are unlike any chat. The pairs depend on the Python version.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

FunctionDef = ast.FunctionDef
_SHORTEST, _LONGEST = 3, 30  # statements of a function's body
_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Mod: ast.FloorDiv,
    ast.FloorDiv: ast.Mod,
}


def functions(folder: Path) -> Iterator[FunctionDef]:
    """Yields the documented functions of a folder's modules, in the order of their names."""
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, FunctionDef) and ast.get_docstring(node):
                size = sum(isinstance(part, ast.stmt) for part in ast.walk(node)) - 2  # without def and docstring
                if _SHORTEST <= size <= _LONGEST:
                    yield node


def pair_of(function: FunctionDef, random: Random) -> dict[str, str] | None:
    """Returns a function's pair, or None if no fault of these kinds can be made in it."""
    documentation = ast.get_docstring(function)
    function = copy.deepcopy(function)
    function.body = function.body[1:]
    function.decorator_list = []
    faulty = copy.deepcopy(function)
    places = [change for node in ast.walk(faulty) for change in _faults(node)]
    if not places or not function.body:
        return None
    node, name, value = random.choice(places)
    setattr(node, name, value)
    signature = f"{function.name}({ast.unparse(function.args)})"
    return {
        "prompt": f"Write the Python function `{signature}`.\n\n{documentation}",
        "chosen": f"```python\n{ast.unparse(function)}\n```",
        "rejected": f"```python\n{ast.unparse(faulty)}\n```",
    }


def _faults(node: ast.AST) -> Iterator[tuple[ast.AST, str, Any]]:
    """Yields the changes that put one fault into a node: the node, its field and the field's new value."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARISONS:
        yield node, "ops", [_COMPARISONS[type(node.ops[0])](), *node.ops[1:]]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        yield node, "op", _OPERATORS[type(node.op)]()
    if isinstance(node, ast.If | ast.While):
        yield node, "test", ast.UnaryOp(ast.Not(), node.test)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield node, "value", node.value + 1
    body = getattr(node, "body", None)
    if isinstance(body, list) and len(body) > 1:
        yield from ((node, "body", body[:place] + body[place + 1 :]) for place in range(len(body)))


def main() -> None:
    """Writes the pairs as JSONL."""
    parser = argparse.ArgumentParser(description="Write pairs of Python functions, one of which has a fault.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--pairs", type=int, default=600, help="most pairs (default: 600)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random = Random(options.seed)
    found = list(functions(Path(ast.__file__).parent))
    random.shuffle(found)
    pairs = [pair for function in found if (pair := pair_of(function, random)) is not None][: options.pairs]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    sys.stderr.write(f"{len(pairs)} pairs of {len(found)} functions\n")


if __name__ == "__main__":
    main()
