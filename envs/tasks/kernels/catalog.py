"""The kernels: 100 C functions in 22 families, each with a signature, a sentence, a naive version and its shapes.

Owns what is right and on which shapes that is asked. Deterministic. A model is shown signature and sentence, and in a
repair prompt the naive version with a fault in it; nothing else. It is a table, hence its length.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]
_LENGTHS = ((5,), (16,)), ((0,), (1,), (7,), (33,), (100,)), (150_000,)
_NOT_EMPTY = ((5,), (16,)), ((1,), (2,), (2,), (2,), (2,), (2,), (3,), (7,), (33,), (100,)), (150_000,)
_GRIDS = ((3, 4), (8, 8)), ((1, 1), (1, 7), (7, 1), (5, 3), (17, 33)), (600, 600)


@dataclass(frozen=True, slots=True)
class Pointer:
    """An array argument; inputs are filled uniformly between low and high (an int array: without high)."""

    name: str
    is_out: bool = False
    is_int: bool = False
    low: float = -1.0
    high: float = 1.0

    @property
    def declaration(self) -> str:
        return f"{'' if self.is_out else 'const '}{'int' if self.is_int else 'float'} *{self.name}"


@dataclass(frozen=True, slots=True)
class Kernel:
    """`sizes` gives the elements of each pointer for the values of `ints`; `shapes`: visible, hidden, and the timed."""

    name: str
    family: str
    sentence: str
    body: str
    pointers: tuple[Pointer, ...]
    sizes: Callable[..., list[int]]
    shapes: tuple[tuple[Shape, ...], tuple[Shape, ...], Shape]
    ints: tuple[str, ...] = ("n",)
    floats: tuple[str, ...] = ()
    is_stable: bool = False  # also asked with inputs a hundred times as large

    @property
    def signature(self) -> str:
        scalars = [*(f"float {name}" for name in self.floats), *(f"int {name}" for name in self.ints)]
        return f"void {self.name}({', '.join([*(p.declaration for p in self.pointers), *scalars])})"

    @property
    def naive(self) -> str:
        return f"{self.signature} {{ {self.body} }}"

    def keys(self) -> dict[str, Any]:
        """What tools and grader need of it, as keys of a row."""
        visible, hidden, timed = self.shapes
        cases = [self._case(shape, f"hidden {index}") for index, shape in enumerate(hidden)]
        if self.is_stable:
            cases.append({**self._case(visible[-1], "large"), "scale": 100.0})
        pointers = [
            {"is_int": p.is_int, "is_out": p.is_out, "low": p.low, "high": p.high, "name": p.name}
            for p in self.pointers
        ]
        return {
            "kernel": self.name,
            "family": self.family,
            "signature": self.signature,
            "reference": self.naive,
            "pointers": pointers,
            "floats": list(self.floats),
            "ints": list(self.ints),
            "visible": [self._case(shape, f"visible {index}") for index, shape in enumerate(visible)],
            "hidden": cases,
            "timed": self._case(timed, "timed"),
        }

    def _case(self, shape: Shape, purpose: str) -> dict[str, Any]:
        sizes = self.sizes(*shape)
        seed = zlib.crc32(f"{self.name} {purpose}".encode())
        floats = [(-1) ** i * (1 + (seed >> 8 * i) % 8) / 4 for i in range(len(self.floats))][::-1]
        outs = [size for size, pointer in zip(sizes, self.pointers, strict=True) if pointer.is_out]
        trivial = not any(outs)
        return {
            "seed": seed,
            "scale": 1.0,
            "sizes": sizes,
            "floats": floats,
            "ints": list(shape),
            "is_trivial": trivial,
        }


Y, X = Pointer("y", is_out=True), Pointer("x")
A, B = Pointer("a"), Pointer("b")
EACH = "for (int i = 0; i < n; i++) "
TWICE = "for (int i = 0; i < m; i++) for (int j = 0; j < n; j++) "


def _maps() -> Iterator[Kernel]:
    """y[i] from x[i], and perhaps from scalars."""
    rows = [
        ("activation", "relu", "x[i] > 0 ? x[i] : 0", "y[i] is x[i] where it is positive, else 0", ""),
        ("activation", "leaky_relu", "x[i] > 0 ? x[i] : 0.1f * x[i]", "y[i] is x[i], negative ones times 0.1", ""),
        ("activation", "relu6", "fminf(fmaxf(4 * x[i], 0), 6)", "y[i] is 4 * x[i] held between 0 and 6", ""),
        ("activation", "sigmoid", "1 / (1 + expf(-x[i]))", "y[i] is 1 / (1 + exp(-x[i]))", ""),
        ("activation", "silu", "x[i] / (1 + expf(-x[i]))", "y[i] is x[i] times its sigmoid", ""),
        ("activation", "softplus", "logf(1 + expf(x[i]))", "y[i] is log(1 + exp(x[i]))", ""),
        ("activation", "elu", "x[i] > 0 ? x[i] : expf(x[i]) - 1", "y[i] is x[i], or exp(x[i]) - 1 below 0", ""),
        ("activation", "gelu", "0.5f * x[i] * (1 + erff(x[i] * 0.70710678f))", "y[i] is the exact GELU of x[i]", ""),
        ("arithmetic", "square", "x[i] * x[i]", "y[i] is the square of x[i]", ""),
        ("arithmetic", "cube", "x[i] * x[i] * x[i]", "y[i] is the cube of x[i]", ""),
        ("arithmetic", "negate", "-x[i]", "y[i] is minus x[i]", ""),
        ("arithmetic", "absolute", "fabsf(x[i])", "y[i] is the absolute value of x[i]", ""),
        ("arithmetic", "root", "sqrtf(fabsf(x[i]))", "y[i] is the square root of the absolute value of x[i]", ""),
        ("arithmetic", "exponential", "expf(x[i])", "y[i] is exp(x[i])", ""),
        ("arithmetic", "sign", "(x[i] > 0) - (x[i] < 0)", "y[i] is the sign of x[i]: -1, 0 or 1", ""),
        ("scalar", "scale", "s * x[i]", "y[i] is s times x[i]", "s"),
        ("scalar", "add_scalar", "x[i] + s", "y[i] is x[i] plus s", "s"),
        ("scalar", "subtract_from", "s - x[i]", "y[i] is s minus x[i]", "s"),
        ("scalar", "affine", "s * x[i] + t", "y[i] is s * x[i] + t", "s t"),
        ("scalar", "at_least", "x[i] > s ? x[i] : s", "y[i] is the larger of x[i] and s", "s"),
        ("scalar", "at_most", "x[i] < s ? x[i] : s", "y[i] is the smaller of x[i] and s", "s"),
        ("scalar", "above", "x[i] > s ? 1 : 0", "y[i] is 1 where x[i] is above s, else 0", "s"),
        ("polynomial", "quadratic", "x[i] * x[i] + s * x[i] + t", "y[i] is x[i]^2 + s * x[i] + t", "s t"),
        ("polynomial", "cubic", "x[i] * x[i] * x[i] - s * x[i]", "y[i] is x[i]^3 - s * x[i]", "s"),
        ("polynomial", "horner", "1 + x[i] * (s + x[i] * t)", "y[i] is 1 + s * x[i] + t * x[i]^2", "s t"),
        ("polynomial", "even_part", "s + t * x[i] * x[i]", "y[i] is s + t * x[i]^2", "s t"),
    ]
    for family, name, value, sentence, scalars in rows:
        body, floats = f"{EACH}y[i] = {value};", tuple(scalars.split())
        yield Kernel(name, family, sentence, body, (Y, X), lambda n: [n, n], _LENGTHS, floats=floats)


def _pairs() -> Iterator[Kernel]:
    """y[i] from a[i] and b[i]."""
    rows = [
        ("pair", "add", "a[i] + b[i]", "y[i] is a[i] plus b[i]", ""),
        ("pair", "subtract", "a[i] - b[i]", "y[i] is a[i] minus b[i]", ""),
        ("pair", "multiply", "a[i] * b[i]", "y[i] is a[i] times b[i]", ""),
        ("pair", "larger", "a[i] > b[i] ? a[i] : b[i]", "y[i] is the larger of a[i] and b[i]", ""),
        ("pair", "smaller", "a[i] < b[i] ? a[i] : b[i]", "y[i] is the smaller of a[i] and b[i]", ""),
        ("pair", "distance", "fabsf(a[i] - b[i])", "y[i] is the distance of a[i] and b[i]", ""),
        ("pair", "middle", "0.5f * (a[i] + b[i])", "y[i] is the mean of a[i] and b[i]", ""),
        ("axpy", "axpy", "s * a[i] + b[i]", "y[i] is s * a[i] + b[i]", "s"),
        ("axpy", "axpby", "s * a[i] + t * b[i]", "y[i] is s * a[i] + t * b[i]", "s t"),
        ("axpy", "mix", "a[i] + s * (b[i] - a[i])", "y[i] is a[i] + s * (b[i] - a[i])", "s"),
        ("axpy", "scaled_product", "s * a[i] * b[i]", "y[i] is s * a[i] * b[i]", "s"),
    ]
    for family, name, value, sentence, scalars in rows:
        body, floats = f"{EACH}y[i] = {value};", tuple(scalars.split())
        yield Kernel(name, family, sentence, body, (Y, A, B), lambda n: [n, n, n], _LENGTHS, floats=floats)


def _sums() -> Iterator[Kernel]:
    """One number from one or two arrays."""
    rows = [
        ("sum", "sum", "x[i]", "s", "y[0] is the sum of x"),
        ("sum", "sum_squares", "x[i] * x[i]", "s", "y[0] is the sum of the squares of x"),
        ("sum", "sum_absolute", "fabsf(x[i])", "s", "y[0] is the sum of the absolute values of x"),
        ("sum", "count_positive", "x[i] > 0", "s", "y[0] is how many of x are positive"),
        ("sum", "norm", "x[i] * x[i]", "sqrtf(s)", "y[0] is the square root of the sum of the squares of x"),
        ("sum", "sum_exponential", "expf(x[i])", "s", "y[0] is the sum of exp(x[i])"),
        ("dot", "dot", "a[i] * b[i]", "s", "y[0] is the sum of a[i] * b[i]"),
        ("dot", "manhattan", "fabsf(a[i] - b[i])", "s", "y[0] is the sum of the distances of a[i] and b[i]"),
        ("dot", "squared_error", "(a[i] - b[i]) * (a[i] - b[i])", "s", "y[0] is the sum of (a[i] - b[i])^2"),
        ("dot", "sum_larger", "a[i] > b[i] ? a[i] : b[i]", "s", "y[0] is the sum of the larger of a[i] and b[i]"),
        ("dot", "count_above", "a[i] > b[i]", "s", "y[0] is how often a[i] is above b[i]"),
        ("dot", "euclidean", "(a[i] - b[i]) * (a[i] - b[i])", "sqrtf(s)", "y[0] is the Euclidean distance of a and b"),
    ]
    for family, name, value, result, sentence in rows:
        inputs = (A, B) if family == "dot" else (X,)
        sizes = (lambda n: [1, n, n]) if family == "dot" else (lambda n: [1, n])
        body = f"float s = 0; {EACH}s += {value}; y[0] = {result};"
        yield Kernel(name, family, sentence, body, (Y, *inputs), sizes, _LENGTHS)


def _extremes() -> Iterator[Kernel]:
    pick = "float s = x[0]; for (int i = 1; i < n; i++) {step} y[0] = s;"
    rows = [
        ("maximum", "if (x[i] > s) s = x[i];", "y[0] is the largest of x"),
        ("minimum", "if (x[i] < s) s = x[i];", "y[0] is the smallest of x"),
        ("product", "s *= x[i];", "y[0] is the product of x"),
    ]
    for name, step, sentence in rows:
        x = Pointer("x", low=0.9, high=1.1) if name == "product" else X
        yield Kernel(name, "extreme", sentence, pick.format(step=step), (Y, x), lambda n: [1, n], _NOT_EMPTY)
    place = "int k = 0; for (int i = 1; i < n; i++) if ({better}) k = i; y[0] = k;"
    places = [
        ("argmax", "x[i] > x[k]", "y[0] is the index of the largest of x, the first of equals"),
        ("argmin", "x[i] < x[k]", "y[0] is the index of the smallest of x, the first of equals"),
        ("argmax_absolute", "fabsf(x[i]) > fabsf(x[k])", "y[0] is the index of the largest absolute value of x"),
    ]
    for name, better, sentence in places:
        pointers = (Pointer("y", is_out=True, is_int=True), X)
        yield Kernel(name, "place", sentence, place.format(better=better), pointers, lambda n: [1, n], _NOT_EMPTY)


def _scans() -> Iterator[Kernel]:
    rows = [
        ("prefix_sum", f"float s = 0; {EACH}{{ s += x[i]; y[i] = s; }}", "y[i] is the sum of x[0] to x[i]"),
        ("exclusive_sum", f"float s = 0; {EACH}{{ y[i] = s; s += x[i]; }}", "y[i] is the sum of x[0] to x[i - 1]"),
        ("prefix_squares", f"float s = 0; {EACH}{{ s += x[i] * x[i]; y[i] = s; }}", "y[i] sums x[0]^2 to x[i]^2"),
        (
            "smooth",
            f"float s = 0; {EACH}{{ s = 0.5f * (s + x[i]); y[i] = s; }}",
            "y[i] is (y[i - 1] + x[i]) / 2, y[-1] is 0",
        ),
    ]
    for name, body, sentence in rows:
        yield Kernel(name, "scan", sentence, body, (Y, X), lambda n: [n, n], _LENGTHS)


def _moves() -> Iterator[Kernel]:
    """Values at other places."""
    rows: list[tuple[str, str, str, Callable[[int], list[int]]]] = [
        ("reverse", f"{EACH}y[i] = x[n - 1 - i];", "y is x in reverse order", lambda n: [n, n]),
        ("copy", f"{EACH}y[i] = x[i];", "y is a copy of x", lambda n: [n, n]),
        ("evens", f"{EACH}y[i] = x[2 * i];", "y[i] is x[2 * i]; x has 2 * n numbers", lambda n: [n, 2 * n]),
        ("odds", f"{EACH}y[i] = x[2 * i + 1];", "y[i] is x[2 * i + 1]; x has 2 * n numbers", lambda n: [n, 2 * n]),
        ("repeat", f"{EACH}y[2 * i] = y[2 * i + 1] = x[i];", "y has each x[i] twice in a row", lambda n: [2 * n, n]),
    ]
    for name, body, sentence, sizes in rows:
        yield Kernel(name, "move", sentence, body, (Y, X), sizes, _LENGTHS)
    index = Pointer("k", is_int=True, low=0, high=8)
    body = f"{EACH}y[i] = x[k[i]];"
    yield Kernel("gather", "move", "y[i] is x[k[i]]", body, (Y, X, index), lambda n: [n, 8, n], _LENGTHS)


def _neighbours() -> Iterator[Kernel]:
    rows: list[tuple[str, str, str, str, int]] = [
        ("stencil", "difference", "x[i + 1] - x[i]", "y[i] is x[i + 1] - x[i]; x has n + 1 numbers", 1),
        (
            "stencil",
            "laplace",
            "x[i] - 2 * x[i + 1] + x[i + 2]",
            "y[i] is x[i] - 2 * x[i + 1] + x[i + 2]; x has n + 2",
            2,
        ),
        (
            "stencil",
            "blur",
            "(x[i] + x[i + 1] + x[i + 2]) / 3",
            "y[i] is the mean of x[i], x[i + 1], x[i + 2]; x has n + 2",
            2,
        ),
        ("stencil", "central", "0.5f * (x[i + 2] - x[i])", "y[i] is half of x[i + 2] - x[i]; x has n + 2 numbers", 2),
    ]
    for family, name, value, sentence, more in rows:
        sizes = lambda n, more=more: [n, n + more]  # noqa: E731
        yield Kernel(name, family, sentence, f"{EACH}y[i] = {value};", (Y, X), sizes, _LENGTHS)
    pools = [
        ("max_pool", "fmaxf(x[2 * i], x[2 * i + 1])", "y[i] is the larger of x[2 * i] and x[2 * i + 1]"),
        ("min_pool", "fminf(x[2 * i], x[2 * i + 1])", "y[i] is the smaller of x[2 * i] and x[2 * i + 1]"),
        ("mean_pool", "0.5f * (x[2 * i] + x[2 * i + 1])", "y[i] is the mean of x[2 * i] and x[2 * i + 1]"),
        ("sum_pool", "x[2 * i] + x[2 * i + 1]", "y[i] is the sum of x[2 * i] and x[2 * i + 1]"),
    ]
    for name, value, sentence in pools:
        body = f"{EACH}y[i] = {value};"
        yield Kernel(name, "pool", sentence, body, (Y, X), lambda n: [n, 2 * n], _LENGTHS)
    shapes = ((4, 2), (8, 3)), ((1, 1), (1, 5), (7, 1), (13, 4), (33, 7)), (4_000, 31)
    inner = "for (int i = 0; i < n; i++) {{ float s = 0; for (int j = 0; j < m; j++) s += {value}; y[i] = {result}; }}"
    filters = [
        ("correlate", (Y, A, B), "a[i + j] * b[j]", "s", "y[i] is the sum over j < m of a[i + j] * b[j]"),
        (
            "convolve",
            (Y, A, B),
            "a[i + m - 1 - j] * b[j]",
            "s",
            "y[i] is the sum over j < m of a[i + m - 1 - j] * b[j]",
        ),
        ("moving_sum", (Y, X), "x[i + j]", "s", "y[i] is the sum of the m numbers from x[i] on"),
        ("moving_mean", (Y, X), "x[i + j]", "s / m", "y[i] is the mean of the m numbers from x[i] on"),
    ]
    for name, pointers, value, result, sentence in filters:
        num_filters = len(pointers) - 2
        body = inner.format(value=value, result=result)
        yield Kernel(name, "filter", sentence, body, pointers, _filter_sizes(num_filters), shapes, ints=("n", "m"))


def _filter_sizes(num_filters: int) -> Callable[..., list[int]]:
    return lambda n, m: [n, n + m - 1, *[m] * num_filters]


def _grids() -> Iterator[Kernel]:
    """Matrices of m rows and n columns, row after row."""
    rows: list[tuple[str, str, str, str, str]] = [
        ("grid", "transpose", f"{TWICE}y[j * m + i] = x[i * n + j];", "y is the transpose of the m x n matrix x", "mn"),
        (
            "grid",
            "flip_rows",
            f"{TWICE}y[i * n + j] = x[(m - 1 - i) * n + j];",
            "y is the m x n matrix x, last row first",
            "mn",
        ),
        (
            "grid",
            "flip_columns",
            f"{TWICE}y[i * n + j] = x[i * n + n - 1 - j];",
            "y is the m x n matrix x, last column first",
            "mn",
        ),
        ("rows", "row_sums", "x[i * n + j]|s", "y[i] is the sum of row i of the m x n matrix x", "m"),
        (
            "rows",
            "row_squares",
            "x[i * n + j] * x[i * n + j]|s",
            "y[i] is the sum of squares of row i of the m x n matrix x",
            "m",
        ),
        (
            "rows",
            "row_norms",
            "x[i * n + j] * x[i * n + j]|sqrtf(s)",
            "y[i] is the Euclidean norm of row i of the m x n matrix x",
            "m",
        ),
        ("rows", "row_means", "x[i * n + j]|s / n", "y[i] is the mean of row i of the m x n matrix x", "m"),
    ]
    for family, name, code, sentence, size in rows:
        value, _, result = code.partition("|")
        loop = (
            f"for (int i = 0; i < m; i++) {{ float s = 0; for (int j = 0; j < n; j++) s += {value}; y[i] = {result}; }}"
        )
        sizes = lambda m, n, whole=size == "mn": [m * n if whole else m, m * n]  # noqa: E731
        yield Kernel(name, family, sentence, loop if result else code, (Y, X), sizes, _GRIDS, ints=("m", "n"))
    loop = "for (int i = 0; i < m; i++) {{ float s = 0; for (int j = 0; j < n; j++) s += a[{at}] * x[j]; y[i] = s; }}"
    for name, at, text in (
        ("matvec", "i * n + j", "the m x n matrix a"),
        ("matvec_transposed", "j * m + i", "the transpose of the n x m matrix a"),
    ):
        yield Kernel(
            name,
            "matvec",
            f"y is {text} times the vector x",
            loop.format(at=at),
            (Y, A, X),
            lambda m, n: [m, m * n, n],
            _GRIDS,
            ints=("m", "n"),
        )
    yield Kernel(
        "outer",
        "matvec",
        "y[i * n + j] is a[i] * b[j], for m numbers a and n numbers b",
        f"{TWICE}y[i * n + j] = a[i] * b[j];",
        (Y, A, B),
        lambda m, n: [m * n, m, n],
        _GRIDS,
        ints=("m", "n"),
    )
    shapes = ((2, 3, 4), (8, 8, 8)), ((1, 1, 1), (1, 5, 3), (7, 1, 2), (5, 6, 7), (17, 9, 33)), (96, 96, 96)
    product = (
        "for (int i = 0; i < m; i++) for (int j = 0; j < n; j++) "
        "{{ float s = 0; for (int l = 0; l < k; l++) s += {a} * {b}; y[i * n + j] = s; }}"
    )
    products = [
        ("matmul", "a[i * k + l]", "b[l * n + j]", "y (m x n) is a (m x k) times b (k x n)"),
        ("matmul_nt", "a[i * k + l]", "b[j * k + l]", "y (m x n) is a (m x k) times the transpose of b (n x k)"),
        ("matmul_tn", "a[l * m + i]", "b[l * n + j]", "y (m x n) is the transpose of a (k x m) times b (k x n)"),
    ]
    for name, a, b, sentence in products:
        yield Kernel(
            name,
            "matmul",
            sentence,
            product.format(a=a, b=b),
            (Y, A, B),
            lambda m, n, k: [m * n, m * k, k * n],
            shapes,
            ints=("m", "n", "k"),
        )


def _norms() -> Iterator[Kernel]:
    top = "float t = x[0]; for (int i = 1; i < n; i++) t = fmaxf(t, x[i]); "
    squares = f"float s = 0; {EACH}s += x[i] * x[i]; "
    rows = [
        (
            "softmax",
            "softmax",
            f"{top}float s = 0; {EACH}s += y[i] = expf(x[i] - t); {EACH}y[i] /= s;",
            "y is the softmax of x, also for large x",
        ),
        (
            "softmax",
            "log_softmax",
            f"{top}float s = 0; {EACH}s += expf(x[i] - t); {EACH}y[i] = x[i] - t - logf(s);",
            "y is the logarithm of the softmax of x, also for large x",
        ),
        (
            "norm",
            "rmsnorm",
            f"{squares}s = sqrtf(s / n + 1e-5f); {EACH}y[i] = x[i] / s;",
            "y[i] is x[i] / sqrt(mean of the squares + 1e-5)",
        ),
        (
            "norm",
            "unit_length",
            f"{squares}{EACH}y[i] = x[i] / sqrtf(s + 1e-5f);",
            "y[i] is x[i] / sqrt(sum of the squares + 1e-5)",
        ),
        (
            "norm",
            "center",
            f"float s = 0; {EACH}s += x[i]; {EACH}y[i] = x[i] - s / n;",
            "y[i] is x[i] minus the mean of x",
        ),
        (
            "norm",
            "share",
            f"float s = 1; {EACH}s += fabsf(x[i]); {EACH}y[i] = x[i] / s;",
            "y[i] is x[i] / (1 + the sum of the absolute values of x)",
        ),
        (
            "norm",
            "layernorm",
            f"float s = 0, v = 0; {EACH}s += x[i] / n; {EACH}v += (x[i] - s) * (x[i] - s) / n; "
            f"{EACH}y[i] = (x[i] - s) / sqrtf(v + 1e-5f);",
            "y[i] is (x[i] - mean) / sqrt(variance + 1e-5)",
        ),
    ]
    for family, name, body, sentence in rows:
        yield Kernel(name, family, sentence, body, (Y, X), lambda n: [n, n], _NOT_EMPTY, is_stable=family == "softmax")


def _histograms() -> Iterator[Kernel]:
    x, counts = Pointer("x", is_int=True, low=0, high=8), Pointer("y", is_out=True, is_int=True)
    clear = "for (int i = 0; i < 8; i++) y[i] = 0; "
    rows = [
        ("histogram", f"{clear}{EACH}y[x[i]]++;", "y[k] is how many of x are k, for k from 0 to 7", (counts, x), 8),
        (
            "coarse_histogram",
            f"for (int i = 0; i < 4; i++) y[i] = 0; {EACH}y[x[i] / 2]++;",
            "y[k] is how many of x are 2 * k or 2 * k + 1, for k from 0 to 3; x is from 0 to 7",
            (counts, x),
            4,
        ),
        (
            "weighted_histogram",
            f"{clear}{EACH}y[x[i]] += a[i];",
            "y[k] is the sum of a[i] where x[i] is k, for k from 0 to 7",
            (Y, x, A),
            8,
        ),
    ]
    for name, body, sentence, pointers, first in rows:
        num_inputs = len(pointers) - 1
        sizes = lambda n, first=first, num_inputs=num_inputs: [first, *[n] * num_inputs]  # noqa: E731
        yield Kernel(name, "histogram", sentence, body, pointers, sizes, _LENGTHS)


def kernels() -> list[Kernel]:
    """All of them, in a fixed order."""
    makers = (_maps, _pairs, _sums, _extremes, _scans, _moves, _neighbours, _grids, _norms, _histograms)
    return [kernel for make in makers for kernel in make()]
