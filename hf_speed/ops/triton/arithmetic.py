"""The arithmetic of each update rule on a tile in registers: `reference.RULES`, in Triton.

One operation a line where the order matters. The kernels are compiled without FMA contraction
(`update.OPTIONS`), and divide and take roots rounded to nearest.
"""

import triton
import triton.language as tl


@triton.jit
def adam_averages(
    g: tl.tensor, m: tl.tensor, v: tl.tensor, row: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """New m, the denominator, and new v; columns 4 ... 7, 9 and 10 of an AdamRow at `row`."""
    lerp, from_grad = tl.load(row + 4), tl.load(row + 5)
    beta2, rest2 = tl.load(row + 6), tl.load(row + 7)
    root_correction, eps = tl.load(row + 9), tl.load(row + 10)
    base = tl.where(from_grad != 0, g, m)
    m = base + lerp * (g - m)
    v = v * beta2 + (rest2 * g) * g
    denominator = tl.sqrt_rn(v) * root_correction + eps
    return m, denominator, v


@triton.jit
def adam(
    p: tl.tensor, g: tl.tensor, m: tl.tensor, v: tl.tensor, row: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Columns 2 ... 10 of an AdamRow at `row`."""
    l2, decay, step_size = tl.load(row + 2), tl.load(row + 3), tl.load(row + 8)
    g = g + l2 * p
    p = p * decay
    m, denominator, v = adam_averages(g, m, v, row)
    p = p - tl.div_rn(step_size * m, denominator)
    return p, m, v


@triton.jit
def adam_direction(
    p: tl.tensor, g: tl.tensor, m: tl.tensor, v: tl.tensor, row: tl.tensor
) -> tl.tensor:
    """What `reference.span_norms` sums the squares of."""
    l2, step_size = tl.load(row + 2), tl.load(row + 8)
    m, denominator, _ = adam_averages(g, m, v, row)
    return tl.div_rn(step_size * m, denominator) + l2 * p


@triton.jit
def lion(p: tl.tensor, g: tl.tensor, m: tl.tensor, row: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Columns 2 ... 7 of a LionRow at `row`."""
    decay, beta1, rest1 = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    beta2, rest2, lr = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    mixed = m * beta1 + rest1 * g
    sign = tl.where(mixed > 0, 1.0, 0.0) - tl.where(mixed < 0, 1.0, 0.0)
    p = p * decay
    p = p - lr * sign
    m = m * beta2 + rest2 * g
    return p, m


@triton.jit
def adagrad(
    p: tl.tensor, g: tl.tensor, s: tl.tensor, row: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Columns 2 ... 4 of an AdagradRow at `row`."""
    l2, step_size, eps = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    g = g + l2 * p
    s = s + g * g
    p = p - tl.div_rn(step_size * g, tl.sqrt_rn(s) + eps)
    return p, s


@triton.jit
def sgd(p: tl.tensor, g: tl.tensor, m: tl.tensor, row: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Columns 2 ... 7 of an SgdRow at `row`."""
    l2, momentum, undamped = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    of_grad, of_momentum, lr = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    g = g + l2 * p
    m = m * momentum + undamped * g
    p = p - lr * (of_grad * g + of_momentum * m)
    return p, m


@triton.jit
def sgd_plain(p: tl.tensor, g: tl.tensor, row: tl.tensor) -> tl.tensor:
    """Columns 2 and 7 of an SgdRow at `row`."""
    l2, lr = tl.load(row + 2), tl.load(row + 7)
    g = g + l2 * p
    return p - lr * g


@triton.jit
def apply_rule(
    p: tl.tensor,
    g: tl.tensor,
    m: tl.tensor,
    v: tl.tensor,
    row: tl.tensor,
    RULE: tl.constexpr,  # noqa: N803  Triton's convention for constants.
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The rule named RULE; a moment that it does not have comes back as it went in."""
    if RULE == "adam":
        p, m, v = adam(p, g, m, v, row)
    elif RULE == "lion":
        p, m = lion(p, g, m, row)
    elif RULE == "adagrad":
        p, m = adagrad(p, g, m, row)
    elif RULE == "sgd":
        p, m = sgd(p, g, m, row)
    else:
        p = sgd_plain(p, g, row)
    return p, m, v
