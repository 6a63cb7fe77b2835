"""Read the arguments of `examine` from a file, without running code from it."""

from __future__ import annotations

import contextlib
import stat
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TENSORS = (
    "targets", "logits", "boxes", "anchor_points", "stride", "losses", "gradients", "project",
    "weight", "normalizer", "foreground",
)  # fmt: skip
NUMBERS = ("num_bins", "margin", "dim")
GRADIENT = "gradients/"  # a layer's gradient, in formats without nested dictionaries
MAX_BYTES = 512 << 20  # of a file, and of what it expands to
LABELS = (".txt", ".xml", ".json", ".csv", ".yaml", ".yml")
MODELS = (
    ".onnx", ".torchscript", ".pt2", ".ckpt", ".bin", ".engine", ".pdparams", ".tflite", ".h5",
)  # fmt: skip
PARAMETERS = (".weight", ".bias", ".running_mean")  # how the names in a state_dict end
SAVE = "torch.save({'targets': targets, 'logits': logits, 'num_bins': 16}, 'doctor.pt')"
RECORD = (
    f"The doctor examines what the DFL loss is called with. Record that in a training step: {SAVE}"
    "; or watch a few steps: with dflkern.doctor.watch(model) as w: ...; print(w.report)."
)


class UnreadableError(ValueError):
    """The file is not what the doctor can read; the message says why and the way out."""


def read(path: Path) -> dict[str, Any]:
    """The keyword arguments of `examine` in a .pt, .pth, .npz or .safetensors file.

    Raises:
        UnreadableError: for a file that is missing, unreadable, in another format, damaged, larger
            than `MAX_BYTES` (also after decompression), a model, or whose names `examine` does not
            have.
    """
    _check_file(path)
    readers = {".pt": _pt, ".pth": _pt, ".npz": _npz, ".safetensors": _safetensors}
    suffix = path.suffix.lower()
    if suffix in readers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of readers, on formats that they refuse right after
            return _named(path, readers[suffix](path))
    if suffix in LABELS:
        raise UnreadableError(
            f"{path.name} is a text file, such as labels or a data set's description. {RECORD}"
        )
    if suffix in MODELS:
        raise UnreadableError(f"{path.name} is a model, not recorded tensors. {RECORD}")
    raise UnreadableError(
        f"{path.name} ends in {suffix or 'nothing'}; {', '.join(readers)} are read. {RECORD}"
    )


def _check_file(path: Path) -> None:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a device or a socket"
            raise UnreadableError(f"{path} is {kind}; a file is needed.")
        path.open("rb").close()
    except FileNotFoundError as error:
        raise UnreadableError(f"There is no file {path}.") from error
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror}.") from error
    if not status.st_size:
        raise UnreadableError(f"{path.name} is empty. {RECORD}")
    _check_size(path, status.st_size)


def _check_size(path: Path, size: int) -> None:
    if size > MAX_BYTES:
        raise UnreadableError(
            f"{path.name} expands to {size / 2**30:.1f} GiB; up to {MAX_BYTES >> 20} MiB are read. "
            f"Record fewer steps, or every n-th anchor. {RECORD}"
        )


def _check_members(path: Path) -> None:
    """Check what a zip archive expands to, before a byte of it is decompressed."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            _check_size(path, sum(member.file_size for member in archive.infolist()))


def _pt(path: Path) -> dict[Any, Any]:
    try:
        _check_members(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnreadableError:
        raise
    except Exception as error:  # whatever a broken or hostile pickle raises
        raise UnreadableError(_refused(path)) from error
    if not isinstance(content, dict):
        raise UnreadableError(
            f"{path.name} holds a {type(content).__name__}; a dictionary is needed: {SAVE}."
        )
    return content


def _refused(path: Path) -> str:
    """Why torch.load refused a file: objects that only code can restore, or damage."""
    names: list[str] = []
    script = False
    with contextlib.suppress(Exception):  # not an archive of torch.save
        members = zipfile.ZipFile(path).namelist()
        script = any(member.endswith("/constants.pkl") for member in members)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if script or any(name.startswith("torch.nn.modules.") for name in names):
        return f"{path.name} is a model, not recorded tensors. {RECORD}"
    held = f" It holds {_listed(names)}." if names else ""
    return (
        f"{path.name} cannot be read without running code from it, or is damaged.{held} Save plain "
        f"tensors and numbers: {SAVE}."
    )


def _npz(path: Path) -> dict[str, Any]:
    try:
        import numpy as np
    except ImportError as error:
        raise UnreadableError(f"{path.name} needs numpy: pip install numpy.") from error
    try:
        _check_members(path)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except UnreadableError:
        raise
    except Exception as error:  # zip, header and dtype errors of many kinds
        raise UnreadableError(
            f"{path.name} is no archive of plain arrays, or is damaged. Save numbers only: "
            "numpy.savez('doctor.npz', targets=targets, num_bins=16)."
        ) from error


def _safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UnreadableError(
            f'{path.name} needs safetensors: pip install "dflkern[doctor]" brings it.'
        ) from error
    try:
        content: dict[str, Any] = load_file(path)
    except Exception as error:  # its own errors, and those of dtypes that this torch lacks
        raise UnreadableError(f"{path.name} is no .safetensors file, or is damaged.") from error
    return content


def _named(path: Path, content: Mapping[Any, Any]) -> dict[str, Any]:
    """The arguments by name, numbers as Python numbers, the gradients of layers in one mapping."""
    if _is_model(content):
        raise UnreadableError(
            f"{path.name} holds a model's parameters or a training checkpoint. {RECORD}"
        )
    arguments: dict[str, Any] = {}
    gradients: dict[str, Any] = {}
    unknown = []
    for name, value in content.items():
        if isinstance(name, str) and name.startswith(GRADIENT):
            gradients[name.removeprefix(GRADIENT)] = value
        elif name == "gradients" and isinstance(value, Mapping):
            gradients |= value
        elif name in NUMBERS:
            arguments[name] = _number(path, name, value)
        elif name in TENSORS:
            arguments[name] = value
        else:
            unknown.append(name)
    unknown += [name for name in gradients if not isinstance(name, str) or not name.isprintable()]
    if unknown:
        raise UnreadableError(
            f"{path.name} holds {_listed(unknown)}, which the doctor does not know. It reads "
            f"{', '.join((*TENSORS, *NUMBERS))}, and {GRADIENT}NAME for the gradient of a layer."
        )
    if gradients:
        arguments["gradients"] = gradients
    tensors = [value for value in (*arguments.values(), *gradients.values())
               if isinstance(value, Tensor)]  # fmt: skip
    _check_size(path, sum(value.numel() * value.element_size() for value in tensors))
    return arguments


def _is_model(content: Mapping[Any, Any], depth: int = 2) -> bool:
    """There are parameters in it, or in a mapping within it such as `model` or `state_dict`."""
    return any(
        (isinstance(name, str) and name.endswith(PARAMETERS) and not name.startswith(GRADIENT))
        or (depth and name != "gradients" and isinstance(value, Mapping)
            and _is_model(value, depth - 1))
        for name, value in content.items()
    )  # fmt: skip


def _number(path: Path, name: str, value: Any) -> Any:
    """A Python number of a number or of a tensor with one element."""
    if isinstance(value, Tensor) and value.numel() == 1 and value.layout is torch.strided:
        value = value.detach().item() if not value.is_meta else value
    if not isinstance(value, (int, float)) or (isinstance(value, int) and abs(value) >> 63):
        raise UnreadableError(
            f"{path.name}: {name} is a {type(value).__name__}"
            f"{' of more than 64 bits' * isinstance(value, int)}; a number is needed."
        )
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _listed(names: list[Any]) -> str:
    """The first five names, without control characters that a terminal would obey."""
    shown = [
        name if isinstance(name, str) and name.isprintable() and 0 < len(name) < 60
        else ascii(name[:60]) if isinstance(name, str) else f"a key of type {type(name).__name__}"
        for name in names
    ]  # fmt: skip
    return ", ".join(sorted(shown)[:5]) + (", …" if len(shown) > 5 else "")
