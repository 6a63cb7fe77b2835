"""Files that a doctor may be given: odd, damaged, hostile, or simply something else. Seeded.

python tests/doctor/odd_files.py FOLDER [N] writes every N-th of them into an empty folder, examines
each in one process, and prints what came of it as lines of JSON.
"""

import contextlib
import io
import json
import os
import pickle
import random
import resource
import struct
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

MEMORY = 4 << 30  # that examining may take beyond what importing has taken
SECONDS = 20  # for a file


def tensors(shape):
    """Tensors of a shape, of every kind that is not plain fp32."""
    plain = torch.rand(shape) * 8
    yield from ((str(dtype), plain.to(dtype)) for dtype in (
        torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
        torch.complex64,
    ))  # fmt: skip
    yield "float8_e8m0fnu", plain.to(torch.float8_e8m0fnu)
    yield "meta", plain.to("meta")
    yield "quantized", torch.quantize_per_tensor(plain, 0.1, 3, torch.quint8)
    yield "sparse", plain.to_sparse()
    yield "csr", torch.rand(3, 4).to_sparse_csr()
    yield "nested", torch.nested.nested_tensor([torch.rand(2, 4), torch.rand(3, 4)])
    yield "parameter", nn.Parameter(plain)
    yield "scalar", torch.tensor(3.0)
    yield "one axis", torch.rand(16)
    yield "no elements", torch.rand(0)
    yield "no rows", torch.rand(0, 4)
    yield "no columns", torch.rand(3, 0)
    yield "six axes", torch.rand(1, 2, 1, 2, 4, 16)
    yield "one number of 2**40", torch.rand(1).expand(2**40)
    yield "not finite", torch.full(shape, float("nan"))
    yield "infinite", torch.full(shape, float("-inf"))


NAMES = {
    "targets": (40, 4), "logits": (40, 4, 16), "boxes": (40, 4), "anchor_points": (40, 2),
    "stride": (40,), "losses": (40,), "weight": (40,), "normalizer": (40,), "project": (16,),
    "foreground": (40,), "gradients": (40,), "num_bins": (1,), "margin": (1,), "dim": (1,),
}  # fmt: skip


def with_odd_tensors():
    good = {"targets": torch.rand(40, 4) * 9, "num_bins": 16}
    for name, shape in NAMES.items():
        for kind, value in tensors(shape):
            yield f"{name} {kind}", {**good, name: value}
            if name in ("logits", "boxes"):
                yield f"{name} {kind} alone", {name: value, "num_bins": 16}


def with_odd_values():
    values = (
        float("inf"), float("nan"), 10**400, 10**5000, -(10**400), 10**9, 2**63, -1, 0, 1, True,
        257, None, "16", "", [16], [], [[[1.0]]], {}, {"a": {"b": 1}}, 16.0, 16.5, 1j, (1, 2),
        torch.tensor([16, 17]), [10**400], [float("nan")] * 3, [torch.rand(3)], ["a"], b"abc",
    )  # fmt: skip
    for name in NAMES:
        for i, value in enumerate(values):
            content = {"targets": torch.rand(30, 4), "num_bins": 16, name: value}
            yield f"{name} value {i}", content
    keys = (
        1, None, (1, 2), 10**5000, "x" * 5000, "\x1b[2J", "\n", "gradients/\n", "gradients/", "",
        "a.weight", torch.rand(2), float("nan"),
    )  # fmt: skip
    for i, key in enumerate(keys):
        yield f"key {i}", {key: torch.rand(3)}
        yield f"gradient's key {i}", {"gradients": {key: torch.rand(3)}}


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


class Calls:
    """A pickle that would write a file where it is loaded."""

    def __reduce__(self):
        return open, ("exploded", "w")


def checkpoints(folder):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    state = model.state_dict()
    for name, content in {
        "state_dict": state,
        "checkpoint": {"model": state, "optimizer": {"state": {}}, "epoch": 3},
        "wrapped": {"epoch": 1, "args": {}, "ema": {"module": dict(state)}},
        "pickled": {"model": model, "epoch": 3},
        "model": model,
    }.items():
        torch.save(content, folder / f"{name}.pt")
        torch.save(content, folder / f"{name}-old.pth", _use_new_zipfile_serialization=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model.eval(), torch.rand(1, 3, 4, 4)), folder / "script.pt")
    for name in ("yolo.onnx", "yolo.engine", "last.ckpt", "pytorch_model.bin", "model.pt2"):
        (folder / name).write_bytes(b"\x08\x07")


def labels(folder):
    for name, text in {
        "labels.txt": "0 0.5 0.5 0.1 0.1\n", "labels.xml": "<annotation/>", "coco.json": "{}",
        "boxes.csv": "x,y\n1,2\n", "data.yaml": "nc: 3\n", "DATA.YML": "nc: 3\n",
        "labels.pt": "0 0.5 0.5 0.1 0.1\n", "page.npz": "<html>", "noext": "x", ".pt": "x",
        "image.jpg": "\xff\xd8", "x.safetensors": "version https://git-lfs.github.com/spec/v1\n",
        "new\nline.pt": "x", "colour\x1b[31m.txt": "x", "x.PT": "x",
    }.items():  # fmt: skip
        (folder / name).write_text(text, encoding="latin-1")
    (folder / os.fsdecode(b"bytes\xff.txt")).write_text("x")


def headers():
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for key, values in {
        "shape": ([-1], [2**62, 4], [2**64], [1e400], [1.5], ["2"], None, [[2]], [], [2] * 5000),
        "data_offsets": ([0, 9], [8, 0], [-8, 0], [0, 2**63], [0], None, [0, 1e400], [4, 12]),
        "dtype": ("F33", "F8_E4M3", "C64", None, 3, "BOOL", "U64", "F4"),
    }.items():
        yield from ({"targets": {**entry, key: value}} for value in values)
    yield {"targets": entry, "logits": entry}  # overlapping
    yield {"targets": None}
    yield {"targets": entry, "__metadata__": {"a": 1}}
    yield {"targets": [entry]}
    yield [entry]
    yield 3
    yield {"": entry, "\x1b[2J": entry}


def safetensors(folder):
    def write(name, header, body=b"\0" * 8, length=None):
        length = len(header) if length is None else length
        (folder / f"{name}.safetensors").write_bytes(struct.pack("<Q", length) + header + body)

    for i, header in enumerate(headers()):
        write(f"header {i}", json.dumps(header).encode())
    write("deep", b"[" * 100_000 + b"]" * 100_000)
    write("deep object", b'{"a":' * 50_000 + b"1" + b"}" * 50_000)
    write("not json", b"\xff\xfe{")
    write("twice", b'{"a":1,"a":2}')
    for length in (0, 1, 9, 2**31, 2**62, 2**64 - 1):
        write(f"length {length}", b"{}", length=length)
    (folder / "short.safetensors").write_bytes(b"\1\2\3")


def archives(folder):
    for name, array in {
        "object": np.array([{}], dtype=object), "text": np.array(["a"]), "bytes": np.array([b"a"]),
        "structured": np.zeros(3, dtype=[("x", "f4")]), "dates": np.zeros(3, dtype="M8[s]"),
        "swapped": np.zeros(3, dtype=">f4"), "complex": np.zeros(3, dtype="c16"),
        "long double": np.zeros(3, dtype=np.longdouble), "void": np.zeros(3, dtype="V7"),
        "no axes": np.array(3.0), "uint16": np.zeros((9, 4), dtype="u2"),
    }.items():  # fmt: skip
        np.savez(folder / f"{name}.npz", targets=array, num_bins=16)
        np.savez(folder / f"{name} bins.npz", targets=np.zeros((9, 4)), num_bins=array)
    np.save(folder / "single.npy", np.zeros(3))
    (folder / "single.npy").rename(folder / "single.npz")
    for i, description in enumerate((
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "(" * 5000, "__import__('os').system('touch exploded')",
    )):  # fmt: skip
        header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(description)) + description.encode()
        with zipfile.ZipFile(folder / f"array {i}.npz", "w") as archive:
            archive.writestr("targets.npy", header + b"\0" * 64)
    for name, member in (("bomb.npz", "targets.npy"), ("bomb.pt", "bomb/data.pkl")):
        packed = zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
        with packed as archive, archive.open(member, "w", force_zip64=True) as file:
            for _ in range(40):
                file.write(bytes(16 << 20))
    lying = bytearray((folder / "bomb.npz").read_bytes())
    directory = lying.rindex(b"PK\1\2")
    struct.pack_into("<I", lying, directory + 24, 4096)  # the size it says it expands to
    (folder / "lying bomb.npz").write_bytes(lying)


def garbled(folder, count, seed=0):
    """Good files with bytes changed, removed or repeated."""
    generator = random.Random(seed)
    good = {"targets": torch.rand(40, 4), "logits": torch.rand(40, 4, 16)}
    torch.save(good, folder / "good.pt")
    torch.save(good, folder / "good.pth", _use_new_zipfile_serialization=False)
    np.savez(folder / "good.npz", **{name: value.numpy() for name, value in good.items()})
    np.savez_compressed(folder / "good2.npz", **{n: value.numpy() for n, value in good.items()})
    with contextlib.suppress(ImportError):
        from safetensors.torch import save_file

        save_file(good, folder / "good.safetensors")
    for path in sorted(folder.glob("good*")):
        for i in range(count):
            data = bytearray(path.read_bytes())
            for _ in range(generator.choice((1, 1, 8, 64))):
                data[generator.randrange(len(data))] = generator.randrange(256)
            if generator.random() < 0.3:
                del data[generator.randrange(len(data)) :]
            if generator.random() < 0.1:
                data += data[: generator.randrange(len(data))]
            (folder / f"garbled {i} {path.name}").write_bytes(data)


def special(folder):
    (folder / "empty.pt").touch()
    (folder / "folder.pt").mkdir()
    os.mkfifo(folder / "pipe.pt")
    (folder / "loop.pt").symlink_to("loop.pt")
    (folder / "dangling.npz").symlink_to("nowhere")
    (folder / "zero.pt").symlink_to("/dev/zero")
    (folder / "tty.pt").symlink_to("/dev/tty")
    (folder / "memory.pt").symlink_to("/proc/self/mem")
    torch.save({"targets": Calls()}, folder / "calls.pt")
    (folder / "raw.pt").write_bytes(pickle.dumps({"targets": Calls()}, protocol=2))
    np.savez(folder / "calls.npz", targets=np.array([Calls()], dtype=object))
    for depth in (100, 100_000):
        (folder / f"nested {depth}.pt").write_bytes(  # saving it would recurse
            b"\x80\x02}X\x07\0\0\0targets" + b"]" * depth + b"a" * (depth - 1) + b"s."
        )
    torch.save({"targets": nested(50)}, folder / "list in lists.pt")
    torch.save([torch.rand(3)], folder / "list.pt")
    torch.save(torch.rand(3), folder / "tensor.pt")
    torch.save({}, folder / "nothing.pt")
    large = torch.rand(1 << 20).expand(200, -1)
    torch.save({"losses": large}, folder / "expands.pt")
    torch.save({"targets": np.zeros((3, 4)), "num_bins": 16}, folder / "numpy.pt")


def write(folder, every=1):
    """Write the files into an empty folder.

    Args:
        folder: where to.
        every: of the odd tensors and values, every n-th; the fewer garbled files.
    """
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nested and quantized tensors, which come and go
        contents = (*with_odd_tensors(), *with_odd_values())
        for name, content in contents[::every]:
            with contextlib.suppress(Exception):  # what PyTorch cannot save is no file
                torch.save(content, folder / f"{name}.pt")
        for make in (checkpoints, labels, safetensors, archives, special):
            make(folder)
        garbled(folder, 40 // every)


def examine_all(folder):
    """Run the command on each file; print what came of it as a line of JSON."""
    from dflkern.__main__ import main

    torch.set_num_threads(1)
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(["doctor", "--demo", "--picture", "/dev/null/x.png"])  # imports what it needs
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for path in sorted(Path().iterdir()):
        for form in ([], ["--json"]):
            out, err, began = io.StringIO(), io.StringIO(), time.perf_counter()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    code = main(["doctor", str(path), "--picture", "/dev/null/x.png", *form])
                except BaseException as error:
                    code = f"{type(error).__name__}: {error}"
            seconds = time.perf_counter() - began
            result = [ascii(path.name), form, code, out.getvalue(), err.getvalue(), seconds]
            print(json.dumps(result))
            if code == 3:
                break  # it ends before the report
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))


if __name__ == "__main__":
    where = Path(sys.argv[1])
    write(where, int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    examine_all(where)
