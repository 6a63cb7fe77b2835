"""Objects from label files that public packages carry."""

import csv
import importlib.util
import os
from pathlib import Path

import pytest
import torch


def data(package):
    """The package's folder of label files; skips where the package is not there."""
    folders = [Path(os.environ.get("DFLKERN_LABEL_PACKAGES", "")) / package]
    if spec := importlib.util.find_spec(package):
        folders.append(Path(spec.origin).parent)
    for folder in folders:
        if (folder / "data").is_dir():
            return folder / "data"
    return pytest.skip(
        f"{package} is not there: install it, or name the folder that holds it in "
        "DFLKERN_LABEL_PACKAGES"
    )


def trees(name):
    """(boxes, image size) of deepforest: tree crowns as xmin, ymin, xmax, ymax."""
    with open(data("deepforest") / name, newline="") as file:
        rows = list(csv.DictReader(file))
    boxes = [[float(row[side]) for side in ("xmin", "ymin", "xmax", "ymax")] for row in rows]
    return torch.tensor(boxes), (1280 if name == "example.csv" else 400)


def people(name):
    """(boxes, image size) of motmetrics: people in a video as left, top, width, height."""
    with open(data("motmetrics") / name / "gt.txt", newline="") as file:
        boxes = torch.tensor([[float(x) for x in row[2:6]] for row in csv.reader(file)])
    return torch.cat((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), -1), 640


FILES = [
    (trees, "OSBS_029.csv"), (trees, "example.csv"), (trees, "testfile_multi.csv"),
    (people, "TUD-Campus"), (people, "TUD-Stadtmitte"),
]  # fmt: skip
