"""Kernels for distributions that are one contiguous range of memory, row after row.

chunk  a lane owns a row and reads it in 16-byte granules: rows of whole granules, forward
tile   a two-dimensional tile, reduced across lanes: coalesced stores, and rows too long for a lane
lazy   a lane owns C = 16 / itemsize rows, which are exactly K granules: any K
"""

import triton
import triton.language as tl

from .distribution import (
    LN2,
    LOG2E,
    backward,
    clamp,
    forward,
    load_beside,
    place_target,
    slopes,
    store_loss,
    upstream_loss,
    weighted,
    widen,
)


@triton.jit
def rows_chunk_forward_kernel(
    logits_ptr, target_ptr, weight_ptr, loss_ptr, position_ptr, n,
    K: tl.constexpr, MARGIN: tl.constexpr, LOSS: tl.constexpr, POSITION: tl.constexpr,
    WEIGHT: tl.constexpr, SIDES: tl.constexpr, SUM: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss and expected position; K is a multiple of CHUNK."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < n
    within = tl.arange(0, CHUNK)
    chunk_ptr = logits_ptr + row[:, None] * K + within[None, :]
    z = ()
    for c in tl.static_range(K // CHUNK):
        z += (widen(tl.load(chunk_ptr + c * CHUNK, mask=live[:, None], other=0.0)),)
    m = tl.max(z[0], 1)
    for c in tl.static_range(1, K // CHUNK):
        m = tl.maximum(m, tl.max(z[c], 1))
    t = tl.zeros_like(m)
    if LOSS:
        t = tl.load(target_ptr + row, mask=live, other=0.0).to(m.dtype)
        t = clamp(t, 0.0, K - 1 - MARGIN)
    s = tl.zeros_like(m)
    moment = tl.zeros_like(m)
    dot = t * 0
    for c in tl.static_range(K // CHUNK):
        k = (within + c * CHUNK).to(m.dtype)[None, :]
        x = (z[c] - m[:, None]) * LOG2E
        e = tl.exp2(x)
        s += tl.sum(e, 1)
        if POSITION:
            moment += tl.sum(e * k, 1)
        if LOSS:
            y = 1.0 - tl.abs(t[:, None] - k)
            dot += tl.sum(tl.where(y > 0, y * x, 0.0), 1)
    if LOSS:
        loss = weighted((tl.log2(s) - dot) * LN2, weight_ptr, row, row, live, WEIGHT, SIDES)
        store_loss(loss_ptr, row, loss, live, SUM)
    if POSITION:
        tl.store(position_ptr + row, moment / s, mask=live)


@triton.jit
def rows_tile_forward_kernel(
    logits_ptr, target_ptr, weight_ptr, loss_ptr, position_ptr, n,
    K: tl.constexpr, MARGIN: tl.constexpr, LOSS: tl.constexpr, POSITION: tl.constexpr,
    WEIGHT: tl.constexpr, SIDES: tl.constexpr, SUM: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Loss and expected position, the bins padded to BLOCK_K."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < n
    bins = tl.arange(0, BLOCK_K)
    mask = live[:, None] & (bins < K)[None, :]
    z = widen(
        tl.load(logits_ptr + row[:, None] * K + bins[None, :], mask=mask, other=float("-inf"))
    )
    m = tl.max(z, 1)
    k = bins.to(m.dtype)[None, :]
    x = (z - m[:, None]) * LOG2E
    e = tl.exp2(x)
    s = tl.sum(e, 1)
    if LOSS:
        t = tl.load(target_ptr + row, mask=live, other=0.0).to(m.dtype)
        t = clamp(t, 0.0, K - 1 - MARGIN)
        y = 1.0 - tl.abs(t[:, None] - k)
        dot = tl.sum(tl.where(y > 0, y * x, 0.0), 1) + t * 0
        loss = weighted((tl.log2(s) - dot) * LN2, weight_ptr, row, row, live, WEIGHT, SIDES)
        store_loss(loss_ptr, row, loss, live, SUM)
    if POSITION:
        tl.store(position_ptr + row, tl.sum(e * k, 1) / s, mask=live)


@triton.jit
def rows_tile_backward_kernel(
    logits_ptr, target_ptr, weight_ptr, normalizer_ptr, grad_loss_ptr, grad_position_ptr,
    grad_logits_ptr, n,
    K: tl.constexpr, MARGIN: tl.constexpr, LOSS: tl.constexpr, POSITION: tl.constexpr,
    WEIGHT: tl.constexpr, SIDES: tl.constexpr, DIVIDE: tl.constexpr,
    GRAD_LOSS: tl.constexpr, GRAD_POSITION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits, the bins padded to BLOCK_K."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < n
    bins = tl.arange(0, BLOCK_K)
    mask = live[:, None] & (bins < K)[None, :]
    offset = row[:, None] * K + bins[None, :]
    z = widen(tl.load(logits_ptr + offset, mask=mask, other=float("-inf")))
    m = tl.max(z, 1)
    k = bins.to(m.dtype)[None, :]
    e = tl.exp2((z - m[:, None]) * LOG2E)
    s = tl.sum(e, 1)
    t = tl.zeros_like(m)
    moment = t
    grad_loss = t
    grad_position = t
    if LOSS:
        t = tl.load(target_ptr + row, mask=live, other=0.0).to(m.dtype)
        t = clamp(t, 0.0, K - 1 - MARGIN)
        grad_loss = upstream_loss(
            grad_loss_ptr, weight_ptr, normalizer_ptr, n, row, row, row, live,
            GRAD_LOSS, WEIGHT, DIVIDE, SIDES,
        )  # fmt: skip
    if POSITION:
        moment = tl.sum(e * k, 1)
        grad_position = load_beside(grad_position_ptr, row, row, live, GRAD_POSITION, SIDES)
    a, b, expected = slopes(t, s, moment, grad_loss, grad_position, LOSS, POSITION)
    slope = tl.broadcast_to(b[:, None], e.shape)
    if POSITION:
        slope = a[:, None] * (k - expected[:, None])
        if LOSS:
            slope += b[:, None]
    gradient = e * slope
    if LOSS:
        gradient -= grad_loss[:, None] * tl.maximum(1.0 - tl.abs(t[:, None] - k), 0.0)
    tl.store(grad_logits_ptr + offset, gradient, mask=mask)


@triton.jit
def take(tile, C: tl.constexpr):
    """A [P, C] tile as C blocks [P], in registers."""
    if C == 2:
        return tl.split(tile)
    else:  # Triton would compile what followed this if, too
        P: tl.constexpr = tile.shape[0]
        even, odd = tl.split(tl.reshape(tile, (P, C // 2, 2)))
        evens = take(even, C // 2)
        odds = take(odd, C // 2)
        blocks = ()
        for i in tl.static_range(C // 2):
            blocks += (evens[i], odds[i])
        return blocks


@triton.jit
def put(blocks, C: tl.constexpr):
    """C blocks [P] as a [P, C] tile, in registers."""
    if C == 2:
        return tl.join(blocks[0], blocks[1])
    else:
        evens = ()
        odds = ()
        for i in tl.static_range(C // 2):
            evens += (blocks[2 * i],)
            odds += (blocks[2 * i + 1],)
        tile = tl.join(put(evens, C // 2), put(odds, C // 2))
        P: tl.constexpr = tile.shape[0]
        return tl.reshape(tile, (P, C))


@triton.jit
def _row(z, i: tl.constexpr, K: tl.constexpr):
    """Bins i·K to (i + 1)·K of the granules read so far, in the compute dtype."""
    row = ()
    for k in tl.static_range(K):
        row += (widen(z[i * K + k]),)
    return row


@triton.jit
def _load_row(logits_ptr, row, live, K: tl.constexpr):
    z = ()
    for k in tl.static_range(K):
        z += (widen(tl.load(logits_ptr + row * K + k, mask=live, other=0.0)),)
    return z


@triton.jit
def _leftover_forward(
    logits_ptr, target_ptr, project_ptr, weight_ptr, loss_ptr, position_ptr, groups, n,
    K: tl.constexpr, MARGIN: tl.constexpr, LOSS: tl.constexpr, POSITION: tl.constexpr,
    WEIGHT: tl.constexpr, SIDES: tl.constexpr, SUM: tl.constexpr,
    PROJECT: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    last = groups.to(tl.int64) * C + tl.arange(0, C)
    left_over = last < n
    z = _load_row(logits_ptr, last, left_over, K)
    t = tl.zeros_like(z[0])
    if LOSS:
        t = tl.load(target_ptr + last, mask=left_over, other=0.0).to(t.dtype)
    t, left, right_weight = place_target(t, project_ptr, K, MARGIN, PROJECT)
    loss, position = forward(z, t, left, right_weight, project_ptr, K, LOSS, POSITION, PROJECT)
    if LOSS:
        loss = weighted(loss, weight_ptr, last, last, left_over, WEIGHT, SIDES)
        store_loss(loss_ptr, last, loss, left_over, SUM)
    if POSITION:
        tl.store(position_ptr + last, position, mask=left_over)


@triton.jit
def _leftover_backward(
    logits_ptr, target_ptr, project_ptr, weight_ptr, normalizer_ptr, grad_loss_ptr,
    grad_position_ptr, grad_logits_ptr, groups, n,
    K: tl.constexpr, MARGIN: tl.constexpr, LOSS: tl.constexpr, POSITION: tl.constexpr,
    WEIGHT: tl.constexpr, SIDES: tl.constexpr, DIVIDE: tl.constexpr,
    GRAD_LOSS: tl.constexpr, GRAD_POSITION: tl.constexpr,
    PROJECT: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    last = groups.to(tl.int64) * C + tl.arange(0, C)
    left_over = last < n
    z = _load_row(logits_ptr, last, left_over, K)
    t = tl.zeros_like(z[0])
    grad_loss = t
    grad_position = t
    if LOSS:
        t = tl.load(target_ptr + last, mask=left_over, other=0.0).to(t.dtype)
        grad_loss = upstream_loss(
            grad_loss_ptr, weight_ptr, normalizer_ptr, n, last, last, last, left_over,
            GRAD_LOSS, WEIGHT, DIVIDE, SIDES,
        )  # fmt: skip
    if POSITION:
        grad_position = load_beside(
            grad_position_ptr, last, last, left_over, GRAD_POSITION, SIDES
        )  # fmt: skip
    t, left, right_weight = place_target(t, project_ptr, K, MARGIN, PROJECT)
    gradient = backward(
        z, t, left, right_weight, grad_loss, grad_position, project_ptr,
        K, LOSS, POSITION, PROJECT,
    )  # fmt: skip
    for k in tl.static_range(K):
        tl.store(grad_logits_ptr + last * K + k, gradient[k], mask=left_over)


@triton.jit
def rows_lazy_forward_kernel(
    logits_ptr, target_ptr, project_ptr, weight_ptr, loss_ptr, position_ptr, n,
    K: tl.constexpr, MARGIN: tl.constexpr, LOSS: tl.constexpr, POSITION: tl.constexpr,
    WEIGHT: tl.constexpr, SIDES: tl.constexpr, SUM: tl.constexpr,
    PROJECT: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss and expected position. A lane owns C rows; the last program takes the n % C left."""
    groups = n // C
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if first < groups:
        group = first + tl.arange(0, BLOCK)
        live = (group < groups)[:, None]
        within = tl.arange(0, C)[None, :]
        rows = group[:, None] * C + within
        granule_ptr = logits_ptr + group[:, None] * (C * K) + within
        if LOSS:
            targets = take(tl.load(target_ptr + rows, mask=live, other=0.0), C)
        z = ()
        losses = ()
        positions = ()
        for i in tl.static_range(C):
            for j in tl.static_range((i * K + C - 1) // C, ((i + 1) * K + C - 1) // C):
                z += take(tl.load(granule_ptr + j * C, mask=live, other=0.0), C)
            row = _row(z, i, K)
            t = tl.zeros_like(row[0])
            if LOSS:
                t = targets[i].to(t.dtype)
            t, left, right_weight = place_target(t, project_ptr, K, MARGIN, PROJECT)
            loss, position = forward(
                row, t, left, right_weight, project_ptr, K, LOSS, POSITION, PROJECT
            )
            losses += (loss,)
            positions += (position,)
        if LOSS:
            loss = weighted(put(losses, C), weight_ptr, rows, rows, live, WEIGHT, SIDES)
            store_loss(loss_ptr, rows, loss, live, SUM)
        if POSITION:
            tl.store(position_ptr + rows, put(positions, C), mask=live)
    else:
        _leftover_forward(
            logits_ptr, target_ptr, project_ptr, weight_ptr, loss_ptr, position_ptr, groups, n,
            K, MARGIN, LOSS, POSITION, WEIGHT, SIDES, SUM, PROJECT, C,
        )  # fmt: skip


@triton.jit
def rows_lazy_backward_kernel(
    logits_ptr, target_ptr, project_ptr, weight_ptr, normalizer_ptr, grad_loss_ptr,
    grad_position_ptr, grad_logits_ptr, n,
    K: tl.constexpr, MARGIN: tl.constexpr, LOSS: tl.constexpr, POSITION: tl.constexpr,
    WEIGHT: tl.constexpr, SIDES: tl.constexpr, DIVIDE: tl.constexpr,
    GRAD_LOSS: tl.constexpr, GRAD_POSITION: tl.constexpr,
    PROJECT: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits. A granule is stored as soon as its C elements exist."""
    groups = n // C
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if first < groups:
        group = first + tl.arange(0, BLOCK)
        live = (group < groups)[:, None]
        within = tl.arange(0, C)[None, :]
        rows = group[:, None] * C + within
        granules = group[:, None] * (C * K) + within
        if LOSS:
            targets = take(tl.load(target_ptr + rows, mask=live, other=0.0), C)
            upstream = upstream_loss(
                grad_loss_ptr, weight_ptr, normalizer_ptr, n, rows, rows, rows, live,
                GRAD_LOSS, WEIGHT, DIVIDE, SIDES,
            )  # fmt: skip
            grad_losses = take(upstream, C)
        if POSITION:
            grad_positions = take(
                load_beside(grad_position_ptr, rows, rows, live, GRAD_POSITION, SIDES), C
            )
        z = ()
        gradient = ()
        for i in tl.static_range(C):
            for j in tl.static_range((i * K + C - 1) // C, ((i + 1) * K + C - 1) // C):
                z += take(tl.load(logits_ptr + granules + j * C, mask=live, other=0.0), C)
            row = _row(z, i, K)
            t = tl.zeros_like(row[0])
            grad_loss = t
            grad_position = t
            if LOSS:
                t = targets[i].to(t.dtype)
                grad_loss = grad_losses[i]
            if POSITION:
                grad_position = grad_positions[i]
            t, left, right_weight = place_target(t, project_ptr, K, MARGIN, PROJECT)
            row_gradient = backward(
                row, t, left, right_weight, grad_loss, grad_position, project_ptr,
                K, LOSS, POSITION, PROJECT,
            )  # fmt: skip
            for k in tl.static_range(K):
                gradient += (row_gradient[k].to(grad_logits_ptr.dtype.element_ty),)
            for j in tl.static_range((i * K) // C, ((i + 1) * K) // C):
                granule = put(gradient[j * C : (j + 1) * C], C)
                tl.store(grad_logits_ptr + granules + j * C, granule, mask=live)
    else:
        _leftover_backward(
            logits_ptr, target_ptr, project_ptr, weight_ptr, normalizer_ptr, grad_loss_ptr,
            grad_position_ptr, grad_logits_ptr, groups, n, K, MARGIN, LOSS, POSITION,
            WEIGHT, SIDES, DIVIDE, GRAD_LOSS, GRAD_POSITION, PROJECT, C,
        )  # fmt: skip
