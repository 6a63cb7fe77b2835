"""The maths of one distribution per lane: a tuple of K blocks, one block for each bin.

No shuffles and no shared memory: a lane owns its distribution. Multiply-adds are written as tl.fma
and kernels are compiled with fp fusion off, so that results depend on no compiler's mood.
`tl.maximum` swallows NaN on a GPU, which does no harm here: a NaN logit comes back through its own
exponential, a NaN target through `t * 0`, which starts the sums that the target takes part in.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def widen(z):
    """To the compute dtype."""
    dtype: tl.constexpr = tl.float64 if z.dtype == tl.float64 else tl.float32
    return z.to(dtype)


@triton.jit
def clamp(t, low, high):
    """Two selects, which keep NaN."""
    t = tl.where(t < low, low, t)
    return tl.where(t > high, high, t)


@triton.jit
def load_beside(
    ptr, offset, own_offset, live, MODE: tl.constexpr, SIDES: tl.constexpr
):  # fmt: skip
    """What a tensor beside the logits, of a `problem.Beside` mode, holds for distributions.

    `offset` is theirs in a contiguous tensor of the target's shape, `own_offset` theirs in this one
    where it has strides of its own.
    """
    if MODE == "scalar":
        return tl.load(ptr) + tl.zeros(offset.shape, ptr.dtype.element_ty)
    elif MODE == "sides":
        return tl.load(ptr + offset // SIDES, mask=live, other=0.0)
    elif MODE == "strided":
        return tl.load(ptr + own_offset, mask=live, other=0.0)
    else:
        return tl.load(ptr + offset, mask=live, other=0.0)


@triton.jit
def weighted(
    loss, weight_ptr, offset, own_offset, live, WEIGHT: tl.constexpr, SIDES: tl.constexpr
):  # fmt: skip
    """The loss of each distribution times its weight."""
    if WEIGHT == "":
        return loss
    else:
        weight = load_beside(weight_ptr, offset, own_offset, live, WEIGHT, SIDES)
        return loss * weight.to(loss.dtype)


@triton.jit
def upstream_loss(
    grad_loss_ptr, weight_ptr, normalizer_ptr, count, offset, own_offset, own_weight_offset, live,
    GRAD_LOSS: tl.constexpr, WEIGHT: tl.constexpr, DIVIDE: tl.constexpr, SIDES: tl.constexpr,
):  # fmt: skip
    """The gradient of each distribution's loss, from that of what `dfl_loss` returned."""
    grad = load_beside(grad_loss_ptr, offset, own_offset, live, GRAD_LOSS, SIDES)
    if DIVIDE == "count":
        grad = grad / count
    elif DIVIDE == "sides":
        grad = grad / SIDES
    elif DIVIDE == "normalizer":
        grad = grad / tl.load(normalizer_ptr).to(grad.dtype)
    return weighted(grad, weight_ptr, offset, own_weight_offset, live, WEIGHT, SIDES)


@triton.jit
def store_loss(loss_ptr, offset, loss, live, SUM: tl.constexpr):
    """Store each loss, or their sum in the place of this program."""
    if SUM:
        program = tl.program_id(0).to(tl.int64) + tl.num_programs(0) * (
            tl.program_id(1) + tl.num_programs(1) * tl.program_id(2).to(tl.int64)
        )
        total = tl.where(live, loss, 0.0)
        if len(loss.shape) == 2:
            total = tl.sum(total, 1)
        tl.store(loss_ptr + program, tl.sum(total, 0))
    else:
        tl.store(loss_ptr + offset, loss, mask=live)


@triton.jit
def position_of(k, project_ptr, PROJECT: tl.constexpr):
    """W_k."""
    if PROJECT:
        return tl.load(project_ptr + k)
    else:  # Triton would compile what followed this if, too, and find two types
        return k * 1.0


@triton.jit
def place_target(t, project_ptr, K: tl.constexpr, MARGIN: tl.constexpr, PROJECT: tl.constexpr):
    """The clamped target; with a project also the bin to its left and the weight of the next."""
    left = t * 0
    right_weight = left
    if PROJECT:
        first = tl.load(project_ptr)
        t = clamp(t, first, tl.maximum(tl.load(project_ptr + K - 1) - MARGIN, first))
        lower = tl.zeros_like(t) + first
        upper = tl.zeros_like(t) + tl.load(project_ptr + 1)
        left = tl.zeros_like(t)
        for k in range(1, K - 1):
            w = tl.load(project_ptr + k)
            inside = t >= w
            left = tl.where(inside, left * 0 + k, left)
            lower = tl.where(inside, w, lower)
            upper = tl.where(inside, tl.load(project_ptr + k + 1), upper)
        right_weight = (t - lower) / (upper - lower)
    else:
        t = clamp(t, 0.0, K - 1 - MARGIN)
    return t, left, right_weight


@triton.jit
def weight_of(k, t, left, right_weight, PROJECT: tl.constexpr):
    """y_k; without a project a hat that is negative where y_k is 0."""
    if PROJECT:
        y = tl.where(left == k, 1.0 - right_weight, tl.zeros_like(t))
        return tl.where(left == k - 1, right_weight, y)
    else:
        return 1.0 - tl.abs(t - k)


@triton.jit
def forward(
    z, t, left, right_weight, project_ptr,
    K: tl.constexpr, LOSS: tl.constexpr, POSITION: tl.constexpr, PROJECT: tl.constexpr,
):  # fmt: skip
    """Loss and expected position of each lane's distribution."""
    m = z[0]
    for k in tl.static_range(1, K):
        m = tl.maximum(m, z[k])
    s = tl.zeros_like(m)
    moment = tl.zeros_like(m)
    dot = t * 0
    for k in tl.static_range(K):
        x = (z[k] - m) * LOG2E
        e = tl.exp2(x)
        s += e
        if POSITION:
            moment = tl.fma(e, position_of(k, project_ptr, PROJECT), moment)
        if LOSS:
            y = weight_of(k, t, left, right_weight, PROJECT)
            dot = tl.where(y > 0, tl.fma(y, x, dot), dot)
    return (tl.log2(s) - dot) * LN2, moment / s


@triton.jit
def backward(
    z, t, left, right_weight, grad_loss, grad_position, project_ptr,
    K: tl.constexpr, LOSS: tl.constexpr, POSITION: tl.constexpr, PROJECT: tl.constexpr,
):  # fmt: skip
    """The gradient of each bin."""
    e, s, moment = exponentials(z, project_ptr, K, POSITION, PROJECT)
    return gradients(
        e, s, moment, t, left, right_weight, grad_loss, grad_position, project_ptr,
        K, LOSS, POSITION, PROJECT,
    )  # fmt: skip


@triton.jit
def exponentials(z, project_ptr, K: tl.constexpr, POSITION: tl.constexpr, PROJECT: tl.constexpr):
    """The exponential of each bin, their sum, and the sum of each times its position."""
    m = z[0]
    for k in tl.static_range(1, K):
        m = tl.maximum(m, z[k])
    s = tl.zeros_like(m)
    moment = tl.zeros_like(m)
    e = ()
    for k in tl.static_range(K):
        e_k = tl.exp2((z[k] - m) * LOG2E)
        e += (e_k,)
        s += e_k
        if POSITION:
            moment = tl.fma(e_k, position_of(k, project_ptr, PROJECT), moment)
    return e, s, moment


@triton.jit
def gradients(
    e, s, moment, t, left, right_weight, grad_loss, grad_position, project_ptr,
    K: tl.constexpr, LOSS: tl.constexpr, POSITION: tl.constexpr, PROJECT: tl.constexpr,
):  # fmt: skip
    """The gradient of each bin: e_k (a (W_k − E) + b) − grad_loss y_k."""
    a, b, expected = slopes(t, s, moment, grad_loss, grad_position, LOSS, POSITION)
    gradient = ()
    for k in tl.static_range(K):
        distance = position_of(k, project_ptr, PROJECT) - expected
        y = weight_of(k, t, left, right_weight, PROJECT)
        gradient += (bin_gradient(e[k], a, b, distance, y, grad_loss, LOSS, POSITION),)
    return gradient


@triton.jit
def slopes(t, s, moment, grad_loss, grad_position, LOSS: tl.constexpr, POSITION: tl.constexpr):
    """The a, b and E with p (g_E (W − E) + g_L) = e (a (W − E) + b).

    W − E is left to be subtracted bin by bin: folding a E into b would cancel more digits.
    """
    r = 1.0 / s
    a = r
    b = r
    expected = r
    if POSITION:
        a = grad_position * r
        expected = moment * r
    if LOSS:
        b = grad_loss * r + t * 0
    return a, b, expected


@triton.jit
def bin_gradient(
    e, a, b, distance, y, grad_loss, LOSS: tl.constexpr, POSITION: tl.constexpr
):  # fmt: skip
    """The gradient of one bin, whose position lies distance above the expected one."""
    if POSITION:
        if LOSS:
            slope = tl.fma(a, distance, b)
        else:
            slope = a * distance
    else:
        slope = b
    if LOSS:
        return tl.fma(e, slope, -grad_loss * tl.maximum(y, 0.0))
    else:
        return e * slope
