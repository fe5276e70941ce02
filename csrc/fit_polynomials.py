"""Minimax fits behind the normal generator of the noise contract (NOISE_SPEC = 1).

Prints, for every polynomial that csrc/noise.h, zo_kernels/noise.py and the Triton device functions
share, the float32 coefficients in hexadecimal and the error bound reached with them as rounded.
Run it with `python csrc/fit_polynomials.py`; needs numpy only.

The method is Lawson's iteratively reweighted least squares on Chebyshev nodes, which converges to
the weighted minimax polynomial. Coefficients are rounded to float32 one at a time, lowest power
first, and the remaining ones refitted, so that rounding errors are absorbed rather than added.

The four functions (m, h, q, y, t as in zo_kernels/noise.py):

1. radius:  -log2(u) * 2^23 = d + q * R(h), with m = 1.5 + h the mantissa of u in [1, 2),
            d the distance of u's bit pattern below that of 1, and q = (m - 1)(m - 2) = h^2 - 1/4.
            The factor q makes both ends of a binade exact, so radius 0 stays 0 and never turns NaN.
2. sqrt:    sqrt(2 ln 2 * 2^-23 * y) = a * S(w), with s the integer seed of 1/sqrt(y), a = y s and
            w = a s close to 1.
3. sine:    sin(pi t) = t * P(t^2) on |t| <= 1/2.
4. cosine:  cos(pi t) = C(t^2) on |t| <= 1/2.
"""

import numpy as np

NODES = 20001
RADIUS_DEGREE = 4
SQRT_DEGREE = 3
SINE_DEGREE = 3
COSINE_DEGREE = 3


def chebyshev_nodes(low: float, high: float, count: int = NODES) -> np.ndarray:
    """Chebyshev nodes of [low, high] with both ends included; float64 (count,)."""
    return (low + high) / 2 - (high - low) / 2 * np.cos(np.pi * np.arange(count) / (count - 1))


def lawson(
    basis: np.ndarray, target: np.ndarray, weight: np.ndarray, rounds: int = 300
) -> np.ndarray:
    """Coefficients c minimising max |weight * (basis @ c - target)|."""
    mass = np.full(len(target), 1.0 / len(target))
    best, best_error = None, np.inf
    for _ in range(rounds):
        root = np.sqrt(mass) * weight
        c, *_ = np.linalg.lstsq(basis * root[:, None], target * root, rcond=None)
        error = np.abs((basis @ c - target) * weight)
        if error.max() < best_error:
            best, best_error = c, error.max()
        mass = mass * error
        mass /= mass.sum()
    return best


def fit(x: np.ndarray, target: np.ndarray, weight: np.ndarray, degree: int) -> list[np.float32]:
    """Float32 coefficients, lowest power first, of the weighted minimax polynomial."""
    powers = np.stack([x**p for p in range(degree + 1)], axis=1)
    rest, coefficients = target.copy(), []
    for p in range(degree + 1):
        c = np.float32(lawson(powers[:, p:], rest, weight)[0])
        coefficients.append(c)
        rest = rest - powers[:, p] * float(c)
    return coefficients


def evaluate(coefficients: list[np.float32], x: np.ndarray) -> np.ndarray:
    """The polynomial in float64."""
    return np.polyval([float(c) for c in coefficients[::-1]], x)


def show(name: str, coefficients: list[np.float32], bound: float, what: str) -> None:
    """Print one polynomial: coefficients (lowest power first) and the bound."""
    print(f"{name}: {what} error {bound:.3g} = 2^{np.log2(bound):.2f}")
    for power, c in enumerate(coefficients):
        print(f"    c{power} = {float(c).hex():>22}  bits 0x{c.view(np.uint32):08x}  {float(c)!r}")


def radius(degree: int = RADIUS_DEGREE) -> tuple[list[np.float32], float]:
    """R(h) and its bound relative to the squared radius in the top binade (the worst one)."""
    h = chebyshev_nodes(-0.5, 0.5)[1:-1]
    m = 1.5 + h
    q = h * h - 0.25
    target = ((m - 1) - np.log2(m)) / q * 2.0**23
    weight = np.abs(q) / (-np.log2(m / 2)) / 2.0**23
    c = fit(h, target, weight, degree)
    return c, float(np.abs((evaluate(c, h) - target) * weight).max()) / 2


def rsqrt_seed(y: np.ndarray, magic: int) -> np.ndarray:
    """The integer seed of 1/sqrt(y): bits magic - (bits(y) >> 1); float64 of a float32 value."""
    bits = y.astype(np.float32).view(np.uint32)
    return (np.uint32(magic) - (bits >> np.uint32(1))).view(np.float32).astype(np.float64)


def square_root(degree: int = SQRT_DEGREE) -> tuple[int, list[np.float32], float]:
    """The seed constant with the narrowest w; S(w), sqrt(2 ln 2 / 2^23) folded in; its bound."""
    y = np.linspace(1.0, 4.0, 400001)[:-1].astype(np.float32)
    widths = []
    for magic in range(0x5EF00000, 0x5F500000, 0x800):
        w = y[::400] * rsqrt_seed(y[::400], magic) ** 2
        widths.append((np.sqrt(w.max() / w.min()), magic))
    magic = min(widths)[1]
    w = y * rsqrt_seed(y, magic) ** 2
    nodes = chebyshev_nodes(w.min(), w.max())
    scale = np.sqrt(2 * np.log(2) * 2.0**-23)
    target = scale / np.sqrt(nodes)
    c = fit(nodes, target, 1 / target, degree)
    print(f"seed 0x{magic:08x}: w in [{w.min():.6f}, {w.max():.6f}]")
    return magic, c, float(np.abs(evaluate(c, nodes) / target - 1).max())


def sine(degree: int = SINE_DEGREE) -> tuple[list[np.float32], float]:
    """P(t^2) and the absolute bound on sin(pi t)."""
    t = chebyshev_nodes(0.0, 0.5)[1:]
    c = fit(t * t, np.sin(np.pi * t) / t, t, degree)
    return c, float(np.abs(t * evaluate(c, t * t) - np.sin(np.pi * t)).max())


def cosine(degree: int = COSINE_DEGREE) -> tuple[list[np.float32], float]:
    """C(t^2) and the absolute bound on cos(pi t)."""
    x = chebyshev_nodes(0.0, 0.25)
    target = np.cos(np.pi * np.sqrt(x))
    c = fit(x, target, np.ones_like(x), degree)
    return c, float(np.abs(evaluate(c, x) - target).max())


def main() -> None:
    """Fit and print everything."""
    show("R(h)", *radius(), "relative (radius)")
    _, s, bound = square_root()
    show("S(w)", s, bound, "relative (radius)")
    show("P(t^2)", *sine(), "absolute")
    show("C(t^2)", *cosine(), "absolute")


if __name__ == "__main__":
    main()
