"""The formulas of multi graders: `0.9 * exact + 0.1 * max(fuzzy, 1e-9) ^ 2`, parsed, checked and never eval'ed.

Grammar of the hosted contract: numbers, names, + - * / ^ (right-associative, binds tighter than a leading minus),
parentheses, and the functions below. All arithmetic is in floats.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping

MAX_CHARS = 10_000
_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,
}
# name -> (function, fewest arguments, most arguments)
_FUNCTIONS: dict[str, tuple[Callable[..., float], int, int]] = {
    "min": (lambda *values: min(values), 1, 100),
    "max": (lambda *values: max(values), 1, 100),
    "abs": (abs, 1, 1),
    "floor": (math.floor, 1, 1),
    "ceil": (math.ceil, 1, 1),
    "exp": (math.exp, 1, 1),
    "sqrt": (math.sqrt, 1, 1),
    "log": (math.log, 1, 1),
}


class FormulaError(ValueError):
    """The formula cannot be read, or has no value for these scores; the contract's `formula_parse_error`."""


class Formula:
    """`Formula(text, names)(values)`. Raises FormulaError when the text is wrong or names something not in `names`."""

    def __init__(self, text: str, names: frozenset[str]) -> None:
        self.text = text
        self._tree = _parse(text)
        try:
            _check(self._tree, names)
        except RecursionError:
            raise FormulaError("the formula is nested too deeply, or has too many terms") from None

    def __call__(self, values: Mapping[str, float]) -> float:
        """The value; FormulaError where arithmetic has none (a division by zero, the logarithm of 0, an overflow)."""
        try:
            value = _value(self._tree, values)
        except (ArithmeticError, ValueError) as error:
            scores = ", ".join(f"{name} = {values[name]:g}" for name in sorted(values))
            raise FormulaError(f"{self.text} has no value for {scores}: {error}") from None
        if not math.isfinite(value):
            raise FormulaError(f"{self.text} is not finite")
        return value


def _parse(text: str) -> ast.expr:
    if len(text) > MAX_CHARS:
        raise FormulaError(f"the formula is longer than {MAX_CHARS} characters")
    for foreign in ("**", "//"):
        if foreign in text:
            raise FormulaError(f"{foreign} is not an operator of formulas; write + - * / ^")
    try:
        # Python's own parser reads it: with ^ as its power operator the two grammars agree
        return ast.parse(text.strip().replace("^", "**"), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise FormulaError(f"{text!r} is not a formula; write numbers, names, + - * / ^ and parentheses") from None


def _check(node: ast.expr, names: frozenset[str]) -> None:
    """Refuse whatever is not in the grammar, before any value is known."""
    match node:
        case ast.Constant(value=bool() | str() | bytes() | complex() | None):
            raise FormulaError(f"{ast.unparse(node)} is not a number")
        case ast.Constant(value=int() | float()):
            pass
        case ast.Name(id=name) if name in names:
            pass
        case ast.Name(id=name):
            raise FormulaError(f"there is no grader named {name}; there are {', '.join(sorted(names))}")
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            _check(operand, names)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            _check(left, names)
            _check(right, names)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            _check_call(name, len(arguments))
            for argument in arguments:
                _check(argument, names)
        case _:
            raise FormulaError(f"{ast.unparse(node).replace('**', '^')} is not allowed in a formula")


def _check_call(name: str, count: int) -> None:
    if name not in _FUNCTIONS:
        raise FormulaError(f"there is no function {name}; there are {', '.join(_FUNCTIONS)}")
    _, fewest, most = _FUNCTIONS[name]
    if not fewest <= count <= most:
        raise FormulaError(f"{name} takes {fewest if fewest == most else f'{fewest} or more'} arguments, not {count}")


def _value(node: ast.expr, values: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Name(id=name):
            return float(values[name])
        case ast.UnaryOp(op=op, operand=operand):
            return -_value(operand, values) if isinstance(op, ast.USub) else _value(operand, values)
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](_value(left, values), _value(right, values))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return float(_FUNCTIONS[name][0](*(_value(argument, values) for argument in arguments)))
    raise AssertionError("`_check` lets nothing else through")
