"""Tables of results/modelled.json."""

from __future__ import annotations

from typing import Any

from tables import table


def modelled(recorded: dict[str, Any]) -> str:
    """The worst of each group of kernels over the architectures, and what torch.compile gets."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for kernel in recorded["kernels"]:
        if kernel["bins"] in (16, 17) and kernel["dtype"] in ("fp32", "fp16"):
            name = ("backend", "layout", "bins", "dtype")
            groups.setdefault(tuple(kernel[part] for part in name), []).append(kernel)
    rows = [
        (
            f"{backend}, {layout}", f"{bins}, {dtype}",
            _pair(_worst(group, "registers")), _pair(_worst(group, "sass_per_distribution"), ".1f"),
            _pair(_worst(group, "sectors"), ".2f"), _pair(_worst(group, "time"), ".2f"),
            _pair(_worst(group, "share"), ".2f"),
        )
        for (backend, layout, bins, dtype), group in sorted(groups.items())
    ]  # fmt: skip
    columns = (
        "kernel", "K, logits", "registers", "warp instructions per distribution",
        "sectors / least", "modelled time / DRAM floor", "busiest other resource / DRAM floor",
    )  # fmt: skip
    peers = [
        (
            peer["work"], peer["dtype"], str(peer["launches"]), f"{peer['microseconds']:g} µs",
            f"{peer['microseconds'] / peer['fused']:.1f}×",
        )
        for peer in recorded["peers"]
    ]  # fmt: skip
    return (
        "Modelled, never measured: `dfl_loss_and_decode`, forward / backward, at "
        f"{recorded['distributions']:,} distributions, the worse of A100 (sm_80) and H100 (sm_90). "
        "Instructions are those of the machine code.\n\n"
        f"{table(columns, rows)}\n\n"
        "What torch.compile's own kernels come to in the same model (H100, K = 16), as a multiple "
        "of one fused pass at DRAM's speed:\n\n"
        f"{table(('work', 'logits', 'launches', 'modelled', 'of the fused floor'), peers)}"
    )


def modelled_in_full(recorded: dict[str, Any]) -> str:
    """Every kernel that was counted, a line each."""
    columns = (
        "kernel", "logits", "K", "layout", "arch", "registers", "SASS",
        "SASS, PTX per distribution", "sectors, stores / least", "modelled time", "busiest other",
    )  # fmt: skip
    rows = [
        (
            f"`{k['kernel']}`", k["dtype"], str(k["bins"]), k["layout"], f"sm_{k['arch']}",
            str(k["registers"]), str(k["sass"]),
            f"{k['sass_per_distribution'] or 0:.1f}, {k['ptx_per_distribution']:.1f}",
            f"{k['sectors']:.2f}, {k['store_sectors']:.2f}",
            f"{k['time']:.2f}", f"{k['share']:.2f} {k['bound']}",
        )
        for k in recorded["kernels"]
    ]  # fmt: skip
    return table(columns, rows)


def _worst(kernels: list[dict[str, Any]], what: str) -> tuple[float, float]:
    """The largest of the forward kernels, and of the backward ones."""
    backward = [kernel[what] for kernel in kernels if kernel["op"].endswith("_backward")]
    forward = [kernel[what] for kernel in kernels if not kernel["op"].endswith("_backward")]
    return max(forward), max(backward)


def _pair(values: tuple[float, float], form: str = "d") -> str:
    return " / ".join(format(value, form) for value in values)
