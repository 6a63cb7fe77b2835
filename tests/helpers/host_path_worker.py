"""Runs cases of `host_path` on the stub CUDA device and compares them with the reference.

In an environment of `cuda_stub.environment`, with two devices:

    python -m host_path_worker '[{"sources": null, "cases": [{"op": "dfl_loss"}]}, …]'

prints one JSON list of outcomes a line for each job. `sources` is a folder with another copy of
dflkern, such as one with a fault. The launch code is the real one, and the kernels that it launches
are run in the PTX emulator, so that results are those of a GPU.
"""

import ctypes
import json
import os
import sys
import warnings
from dataclasses import asdict, dataclass, field

import torch

from cuda_stub.emulated import Emulation, poison
from cuda_stub.torch_on_cpu import TorchOnCpu, on_device, on_host
from host_path import Case, call, inputs_for, upstream_for


@dataclass
class Outcome:
    """What a case came to; `faults` is empty if all is well.

    Attributes:
        launched: names of the kernels that were run.
        pytorch: names of PyTorch's operators that the call used on the device.
    """

    faults: list = field(default_factory=list)
    launched: list = field(default_factory=list)
    pytorch: list = field(default_factory=list)


class Device:
    """The stub device of this process."""

    def __init__(self):
        self.emulation = Emulation().start()
        self.pytorch = TorchOnCpu(self.emulation)

    def show_ptx_of_cuda_kernels(self):
        """Tell the emulation of the PTX of each CUDA kernel that is loaded: caches hold none."""
        from dflkern.gpu.cuda import loading, nvrtc

        obtain = loading.obtain

        def obtain_and_tell(kernel, arch):
            found = obtain(kernel, arch)
            ptx = nvrtc.compile_kernel(kernel, arch).ptx
            self.emulation.know(found.path.read_bytes(), ptx)
            return found

        loading.obtain = obtain_and_tell

    def outcome(self, case):
        """Run a case on the device and by the reference."""
        import dflkern

        tensors = inputs_for(case, seed=0)
        with dflkern.use_backend("reference"):
            upstream = upstream_for(case, tensors)
            peer = call(case, tensors, upstream)
            wide = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
            exact = call(case, wide, upstream and [each.double() for each in upstream])
        try:
            outcome, values = self._run(case, tensors, upstream)
        except Exception as error:
            return Outcome([f"{type(error).__name__}: {error}", *self.emulation.faults])
        names = [f"result {i}" for i in range(len(values) - 1)] + ["gradient"]
        outcome.faults += differences(names, values, peer, exact)
        return outcome

    def _run(self, case, tensors, upstream):
        """What the launches came to, and the values that the call returned."""
        import dflkern

        device, stream = _enter(case.place)
        poison(device)
        grads = upstream and [on_device(each, device) for each in upstream]
        run = self._replayed if case.graph else self._called
        with dflkern.use_backend(case.backend):
            given, values = run(case, tensors, grads, device)
        faults = [f"{name} was changed" for name, tensor in given.items()
                  if _bytes(tensor) != _bytes(tensors[name])]  # fmt: skip
        launches = self.emulation.launches
        faults += self.emulation.faults
        if not launches and tensors["logits"].numel():
            faults.append("nothing was launched")
        for name in self.emulation.unknown:
            faults.append(
                f"this call launched a PyTorch kernel, which the stub does not run: {name}"
            )
        for launch in launches:
            if launch.device != device:
                faults.append(f"{launch.name} was launched on device {launch.device}, not {device}")
            if launch.stream != stream:
                faults.append(f"{launch.name} was not launched on the current stream")
        names = [launch.name for launch in launches]
        return Outcome(faults, names, list(self.pytorch.used)), [on_host(v) for v in values]

    def _called(self, case, tensors, grads, device):
        given = {name: on_device(tensor, device) for name, tensor in tensors.items()}
        self._clear()
        return given, call(case, given, grads)

    def _replayed(self, case, tensors, grads, device):
        """Capture the call with other values, then put the real ones in their place and replay."""
        others = inputs_for(case, seed=1)
        given = {name: on_device(others[name], device) for name in tensors}
        call(case, given, grads)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            values = call(case, given, grads)
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            memory = given[name].untyped_storage().data_ptr()
            ctypes.memmove(memory, storage.data_ptr(), storage.nbytes())
        self._clear()
        graph.replay()
        return given, values

    def _clear(self):
        self.emulation.clear()
        self.pytorch.used.clear()


def differences(names, values, peer, exact):
    """Where values are further from float64 than the reference in the same dtype, by the budget."""
    from support import budget_faults

    every = zip(names, values, peer, exact, strict=True)
    return [f"{name}: {fault}" for name, *each in every for fault in budget_faults(*each)]


def _enter(place):
    """Make a place current; the index of its device, and the stream that its work belongs on."""
    torch.cuda.set_device(0)
    torch.cuda.set_stream(torch.cuda.default_stream(0))
    if place == "default":
        return 0, 0
    device = 1 if place == "second device" else 0
    side = torch.cuda.Stream(device)
    torch.cuda.set_stream(side)
    torch.cuda.set_device(0)  # the tensors' device need not be the current one
    return device, side.cuda_stream


def _bytes(tensor):
    storage = tensor.untyped_storage()
    return ctypes.string_at(storage.data_ptr(), storage.nbytes())


def run_job(job):
    """Run a job's cases and print their outcomes."""
    if job["sources"]:
        sys.path.insert(0, job["sources"])
    torch.set_num_threads(1)
    device = Device()
    if any(case["backend"] == "cuda" for case in job["cases"]):
        device.show_ptx_of_cuda_kernels()
    outcomes = [asdict(device.outcome(Case(**case))) for case in job["cases"]]
    print(json.dumps(outcomes), flush=True)


def main():
    """Each job in a process of its own, forked from this one, which has imported PyTorch."""
    warnings.filterwarnings("ignore")
    assert "dflkern" not in sys.modules
    for job in json.loads(sys.argv[1]):
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            if status:
                return os.waitstatus_to_exitcode(status)
            continue
        run_job(job)
        os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
