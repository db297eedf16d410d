"""Formulas of multi graders: the contract's grammar, and nothing else."""

from __future__ import annotations

import math

import pytest

from rft.graders.formula import Formula, FormulaError

NAMES = {"a": 0.25, "b": 0.5, "precision": 0.0, "recall": 0.0, "max": 3.0}


def value(text: str) -> float:
    return Formula(text, frozenset(NAMES))(NAMES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", 0.25),
        ("a + b", 0.75),
        ("a - b", -0.25),
        ("a * b", 0.125),
        ("a / b", 0.5),
        ("b ^ 2", 0.25),
        ("2 ^ 3 ^ 2", 512),
        ("-2 ^ 2", -4),
        ("(-2) ^ 2", 4),
        ("2 ^ -1", 0.5),
        ("-a", -0.25),
        ("+a", 0.25),
        ("1 - 2 - 3", -4),
        ("8 / 4 / 2", 1),
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("1e-9", 1e-9),
        (".5", 0.5),
        ("  0.9 * a +\t0.1 * b ", 0.275),
        ("min(a, b)", 0.25),
        ("max(a, b, 2)", 2),
        ("max", 3),
        ("max(max, 1)", 3),
        ("abs(-a)", 0.25),
        ("floor(1.7)", 1),
        ("floor(-1.2)", -2),
        ("ceil(1.2)", 2),
        ("exp(0)", 1),
        ("sqrt(4)", 2),
        ("log(exp(1))", 1),
        ("2 * precision * recall / max(precision + recall, 1e-9)", 0),
        ("min(a)", 0.25),
    ],
)
def test_values(text: str, expected: float) -> None:
    assert value(text) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("c", "no grader named c"),
        ("a +", "is not a formula"),
        ("", "is not a formula"),
        ("a b", "is not a formula"),
        ("a ** b", "\\*\\* is not an operator"),
        ("a // b", "// is not an operator"),
        ("a % b", "not allowed"),
        ("a if b else 1", "not allowed"),
        ("a < b", "not allowed"),
        ("[a]", "not allowed"),
        ("lambda: a", "not allowed"),
        ("a.real", "not allowed"),
        ("__import__('os')", "no function __import__"),
        ("a(1)", "no function a"),
        ("round(a)", "no function round"),
        ("min()", "takes 1 or more"),
        ("abs(a, b)", "takes 1 arguments, not 2"),
        ("log(a, b)", "takes 1"),
        ("min(*a)", "not allowed"),
        ("max(a, key=b)", "not allowed"),
        ("'a'", "not a number"),
        ("True", "not a number"),
        ("1j", "not a number"),
        ("(a := 1)", "not allowed"),
        ("a; b", "is not a formula"),
        ("(" * 300 + "a" + ")" * 300, "is not a formula"),
        ("a" + "+a" * 4000, "too many terms|is not a formula"),
        ("1" * 10_001, "longer than"),
        ("f'{a}'", "not allowed"),
        ("a & b", "not allowed"),
        ("~a", "not allowed"),
    ],
)
def test_what_is_refused(text: str, problem: str) -> None:
    with pytest.raises(FormulaError, match=problem):
        Formula(text, frozenset(NAMES))


@pytest.mark.parametrize(
    "text", ["1 / 0", "a / precision", "log(0)", "sqrt(-1)", "9 ^ 9 ^ 9 ^ 9", "exp(1000)", "(0 - 8) ^ 0.5", "0 ^ -1"]
)
def test_arithmetic_without_a_value_is_an_error(text: str) -> None:
    with pytest.raises(FormulaError, match=r"has no value|not finite"):
        value(text)


def test_huge_numbers_are_errors_and_not_infinite() -> None:
    with pytest.raises(FormulaError):
        Formula("x * 1e308", frozenset({"x"}))({"x": 10.0})
    assert math.isfinite(Formula("x * 1e307", frozenset({"x"}))({"x": 10.0}))
