"""The second launch of a reduced loss, over what the first one wrote."""

import triton
import triton.language as tl


@triton.jit
def sums_total_kernel(
    partials_ptr, normalizer_ptr, loss_ptr, n, count, DIVIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The sum of n partial sums, divided by the count, the normalizer or nothing; one program."""
    within = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), partials_ptr.dtype.element_ty)
    for start in range(0, n, BLOCK):
        total += tl.load(partials_ptr + start + within, mask=start + within < n, other=0.0)
    loss = tl.sum(total, 0)
    if DIVIDE == "count":
        loss = loss / count
    elif DIVIDE == "normalizer":
        loss = loss / tl.load(normalizer_ptr).to(loss.dtype)
    tl.store(loss_ptr, loss)


@triton.jit
def _mean(each_ptr, loss_ptr, stride, live, SIDES: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), each_ptr.dtype.element_ty)
    for _ in range(SIDES):
        total += tl.load(each_ptr, mask=live, other=0.0)
        each_ptr += stride
    tl.store(loss_ptr, total / SIDES, mask=live)


@triton.jit
def sums_rows_kernel(each_ptr, loss_ptr, n, SIDES: tl.constexpr, BLOCK: tl.constexpr):
    """The mean over the sides, which are the last axis of n losses."""
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _mean(each_ptr + lane * SIDES, loss_ptr + lane, 1, lane * SIDES < n, SIDES, BLOCK)


@triton.jit
def sums_columns_kernel(each_ptr, loss_ptr, n, SIDES: tl.constexpr, BLOCK: tl.constexpr):
    """The mean over the sides, of which neighbours are n losses apart.

    The first axis of the grid walks what is outside of the sides, the second one blocks of n.
    """
    lane = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    outer = tl.program_id(0).to(tl.int64)
    _mean(
        each_ptr + outer * n * SIDES + lane, loss_ptr + outer * n + lane, n, lane < n, SIDES, BLOCK
    )
