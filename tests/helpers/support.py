"""What several test files share: logits of many layouts, the three functions as one, the budget."""

import torch

import dflkern

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BINS = (8, 10, 16, 17, 19, 22, 33, 91)
OPS = ("loss", "decode", "both")
# What a kernel may add to the error of PyTorch in the same dtype, in units of the dtype's epsilon.
# An exponential of base 2 costs a unit in the last place for each unit of the exponent, and W − E
# cancels some digits of it; a rounding to half precision is the same everywhere.
SLACK = {torch.float32: 32, torch.float64: 32, torch.float16: 1, torch.bfloat16: 1}


def logits_of(layout, num_bins, dtype, device="cpu", scale=3.0):
    """Random logits of a named layout, and the axis of their bins."""
    k = num_bins

    def random(*shape):
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype).to(device)

    if layout == "rows":
        return random(41, k), 1
    if layout == "rows-4d":
        return random(2, 5, 4, k), -1
    if layout == "padded":
        return random(19, k + 3)[:, 1 : 1 + k], 1
    if layout == "offset":
        return random(19 * k + 1)[1:].view(19, k), 1
    if layout == "columns":
        return random(2, 4 * k, 35).view(2, 4, k, 35), 2
    if layout == "slice":  # box channels between others, anchors out of a longer axis
        return random(2, 4 * k + 5, 50)[:, 2 : 2 + 4 * k].view(2, 4, k, 50)[..., :33], 2
    if layout == "strided":
        return random(23, 2 * k)[:, ::2], 1
    if layout in ("expanded", "single"):
        scale = 1.0  # a lone sharp distribution has W − E near 0, where no digits are left
    if layout == "expanded":
        return random(1, k).expand(9, k), 1
    if layout == "permuted":
        return random(3, 4, k, 5).permute(2, 3, 1, 0), 0
    if layout == "unmergeable":
        return random(3, 4, 5, 6, k)[::2, ::2, ::2, ::2], -1
    if layout == "single":
        return random(k), 0
    if layout == "empty":
        return random(0, 4, k), 2
    raise ValueError(layout)


LAYOUTS = (
    "rows", "rows-4d", "padded", "offset", "columns", "slice", "strided", "expanded", "permuted",
    "unmergeable", "single", "empty",
)  # fmt: skip


def targets_for(logits, dim, low=-1.0, high=None, dtype=torch.float32):
    """Random targets, some beyond the bins on either side."""
    high = logits.shape[dim] if high is None else high
    shape = list(logits.shape)
    del shape[dim]
    t = torch.rand(shape, dtype=torch.float64) * (high - low) + low
    return t.to(dtype).to(logits.device)


def positions_for(num_bins):
    """Non-uniform positions with a negative start."""
    return [-1.5 + 0.9 * k + 0.01 * k * k for k in range(num_bins)]


def evaluate(op, logits, target, dim, project=None, margin=0.01):
    """The results of one of OPS as a tuple."""
    if op == "loss":
        return (dflkern.dfl_loss(logits, target, dim=dim, project=project, margin=margin),)
    if op == "decode":
        return (dflkern.dfl_decode(logits, dim=dim, project=project),)
    return dflkern.dfl_loss_and_decode(logits, target, dim=dim, project=project, margin=margin)


def run(op, logits, target, dim, project=None, margin=0.01, upstream=None):
    """Results and the gradient of the logits, for given or random upstream gradients."""
    leaf = logits.detach().requires_grad_()
    results = evaluate(op, leaf, target, dim, project, margin)
    if upstream is None:
        upstream = upstream_for(results)
    upstream = [g.to(r.dtype) for g, r in zip(upstream, results, strict=True)]
    (gradient,) = torch.autograd.grad(results, leaf, upstream)
    return [result.detach() for result in results], gradient


def upstream_for(results):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.device) for r in results
    ]


def truth(op, logits, target, dim, project=None, margin=0.01, upstream=None):
    """The same in float64 on the reference backend, which other tests hold against closed forms."""
    if isinstance(project, torch.Tensor):
        project = project.double()
    with dflkern.use_backend("reference"):
        return run(op, logits.double(), target.double(), dim, project, margin, upstream)


def same_specials(actual, expected):
    """NaN, inf and −inf in the same places."""
    return all(
        torch.equal(kind(actual), kind(expected))
        for kind in (torch.isnan, torch.isposinf, torch.isneginf)
    )


def budget_faults(actual, peer, exact):
    """Why actual's error exceeds that of peer, PyTorch in the same dtype, by more than a term.

    Elementwise, and as a vector: relative L2 error, cosine, signed bias. Empty if it does not.
    """
    if actual.shape != exact.shape or actual.dtype != peer.dtype:
        return [f"{actual.shape} {actual.dtype}, not {exact.shape} {peer.dtype}"]
    if not same_specials(actual, exact):
        return ["NaN or inf in other places"]
    term = SLACK[actual.dtype] * torch.finfo(actual.dtype).eps
    finite = torch.isfinite(exact)
    actual, peer, exact = (x[finite].double().flatten() for x in (actual, peer, exact))
    if not exact.any():
        return ["not zero"] if actual.any() else []
    error, peer_error = actual - exact, peer - exact
    size, scale = exact.norm(), exact.abs().max()
    checks = {
        "elementwise": (error.abs().max(), peer_error.abs().max() + term * scale),
        "relative L2": (error.norm() / size, peer_error.norm() / size + term),
        "cosine": (1 - (actual @ exact) / (actual.norm() * size), 1e-4),
        "signed bias": (error.mean().abs(), peer_error.mean().abs() + term * exact.abs().mean()),
    }
    return [
        f"{name}: {float(value):.3g} above {float(bound):.3g}"
        for name, (value, bound) in checks.items()
        if not value <= bound
    ]


def assert_within_budget(actual, peer, exact):
    """Results and gradient of `run` against those of the reference and of `truth`."""
    names = [f"result {i}" for i in range(len(exact[0]))] + ["gradient"]
    values = zip([*actual[0], actual[1]], [*peer[0], peer[1]], [*exact[0], exact[1]], strict=True)
    faults = {
        name: found
        for name, value in zip(names, values, strict=True)
        if (found := budget_faults(*value))
    }
    assert not faults, faults
