"""Reading what `examine` takes from a file, in ways that cannot run code."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TENSORS = (
    "targets", "logits", "boxes", "anchor_points", "stride", "losses", "gradients", "project",
    "weight", "normalizer", "foreground",
)  # fmt: skip
NUMBERS = {"num_bins": int, "margin": float, "dim": int}
GRADIENT = "gradients/"  # a layer's gradient, where the format has no dictionaries in dictionaries
MAX_HEADER = 100_000_000
SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class UnreadableError(ValueError):
    """The file is not what the doctor can read; the message says why and the way out."""


def read(path: Path) -> dict[str, Any]:
    """The keyword arguments of `examine` in a .pt, .pth, .npz or .safetensors file.

    Raises:
        UnreadableError: for a missing file, another format, code in it, or names that examine
            does not have.
    """
    readers = {".pt": _pt, ".pth": _pt, ".npz": _npz, ".safetensors": _safetensors}
    reader = readers.get(path.suffix)
    if reader is None:
        raise UnreadableError(
            f"{path.name} ends in {path.suffix or 'nothing'}; {', '.join(readers)} are read."
        )
    if not path.is_file():
        raise UnreadableError(f"There is no file {path}.")
    return _named(path, reader(path))


def _pt(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken or hostile pickle raises
        raise UnreadableError(
            f"{path.name} cannot be read without running code from it, or is damaged. Save plain "
            "tensors: torch.save({'targets': targets, 'num_bins': 16}, 'doctor.pt')."
        ) from error
    if not isinstance(content, dict):
        raise UnreadableError(
            f"{path.name} holds a {type(content).__name__}; a dictionary is needed: "
            "torch.save({'targets': targets, 'num_bins': 16}, 'doctor.pt')."
        )
    return content


def _npz(path: Path) -> dict[str, Any]:
    try:
        import numpy as np
    except ImportError as error:
        raise UnreadableError(f"{path.name} needs numpy: pip install numpy.") from error
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except Exception as error:  # zip, header and dtype errors of many kinds
        raise UnreadableError(
            f"{path.name} is no archive of plain arrays, or is damaged. Save numbers only: "
            "numpy.savez('doctor.npz', targets=targets, num_bins=16)."
        ) from error


def _safetensors(path: Path) -> dict[str, Any]:
    """Eight bytes with the length of a JSON header, the header, the tensors' bytes."""
    data = path.read_bytes()
    try:
        (length,) = struct.unpack_from("<Q", data)
        if length > min(MAX_HEADER, len(data) - 8):
            raise ValueError("the header is longer than the file")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        body = data[8 + length :]
        return {name: _tensor(entry, body) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UnreadableError(f"{path.name} is no .safetensors file, or is damaged.") from error


def _tensor(entry: dict[str, Any], body: bytes) -> Tensor:
    dtype, shape = SAFETENSORS[entry["dtype"]], [int(size) for size in entry["shape"]]
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= len(body) or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor lies outside the file")
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(body[begin:end]), dtype=dtype).reshape(shape)


def _named(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    gradients: dict[str, Any] = {}
    unknown = []
    for name, value in content.items():
        if str(name).startswith(GRADIENT):
            gradients[name.removeprefix(GRADIENT)] = value
        elif name in NUMBERS:
            arguments[name] = NUMBERS[name](value)
        elif name in TENSORS:
            arguments[name] = value
        else:
            unknown.append(str(name))
    if unknown:
        raise UnreadableError(
            f"{path.name} holds {', '.join(sorted(unknown)[:5])}"
            f"{', …' if len(unknown) > 5 else ''}, which the doctor does not know. It reads "
            f"{', '.join((*TENSORS, *NUMBERS))}, and {GRADIENT}NAME for the gradient of a layer."
        )
    if gradients:
        arguments["gradients"] = gradients
    return arguments
