"""The picture: for each case, how many times as fast as each peer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from .contenders import COMPILED

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import ScalarFormatter

# The pass that stands for an op: decoding is inference, a loss is nothing without its backward.
SHOWN = {"decode": "forward", "loss": "both", "loss_and_decode": "both"}
_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:brown", "tab:purple", "tab:red", "tab:gray")


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the chart as PNG: a line per case, a dot per peer, hollow where it is compiled."""
    rows = [
        (f"{name}, {SHOWN[case['op']]}", case["passes"][SHOWN[case["op"]]]["ratios"])
        for name, case in results["cases"].items()
        if case["match"]
    ]
    peers = list(dict.fromkeys(p.removesuffix(COMPILED) for _, ratios in rows for p in ratios))
    colours = {peer: _COLOURS[i % len(_COLOURS)] for i, peer in enumerate(peers)}
    figure, axes = plt.subplots(figsize=(10, 1.8 + 0.32 * max(len(rows), 3)), layout="constrained")
    labelled = set()
    for y, (_, ratios) in enumerate(rows):
        for peer, ratio in ratios.items():
            colour = colours[peer.removesuffix(COMPILED)]
            face = "none" if peer.endswith(COMPILED) else colour
            label = None if peer in labelled else peer
            labelled.add(peer)
            axes.scatter(ratio, y, s=36, facecolors=face, edgecolors=colour, label=label)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.axvline(1, color="black", linewidth=1)
    axes.grid(alpha=0.3, which="both")
    machine = results["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    axes.set_xlabel(f"times as fast as the peer (log scale; left of 1: slower), {where}")
    if labelled:
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
