"""The stub CUDA device itself: what it does, counts and refuses."""

import ctypes
import json
import struct
import subprocess
import sys

import pytest

import cuda_stub

SUCCESS, INVALID_VALUE, INVALID_IMAGE, NO_BINARY, INVALID_HANDLE, NOT_FOUND = (
    0,
    1,
    200,
    209,
    400,
    500,
)
CAPTURE_IMPLICIT, INVALID_DEVICE = 906, 101
PTX = b".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry nothing() { ret; }\0"


@pytest.fixture
def stub(stub_device):
    """The library, loaded into this process without standing in front of anything."""
    return ctypes.CDLL(str(stub_device / cuda_stub.LIBRARY))


def handle():
    return ctypes.c_void_p()


def cubin(arch, abi=8):
    """An image with the header of a cubin, and nothing in it."""
    flags = arch << 8 if abi == 8 else arch
    identity = b"\x7fELF\x02\x01\x01\x33" + bytes([abi]) + bytes(7)
    return identity + struct.pack("<HHIQQQIHHHHHH", 2, 190, 1, 0, 0, 0, flags, 64, 0, 0, 0, 0, 0)


def loaded(stub, image=PTX, name=b"nothing"):
    """A function of a module."""
    module, function = handle(), handle()
    assert stub.cuModuleLoadData(ctypes.byref(module), image) == SUCCESS
    assert stub.cuModuleGetFunction(ctypes.byref(function), module, name) == SUCCESS
    return function


def launch(stub, function, grid=(1, 1, 1), block=(32, 1, 1), stream=None):
    return stub.cuLaunchKernel(function, *grid, *block, 0, stream, None, None)


def count(stub, name):
    return ctypes.c_long.in_dll(stub, f"stub_{name}").value


def test_launches_are_counted(stub):
    function, before = loaded(stub), count(stub, "driver_launches")
    assert launch(stub, function) == SUCCESS
    assert launch(stub, function) == SUCCESS
    assert count(stub, "driver_launches") == before + 2


@pytest.mark.parametrize(
    "wrong", [{"grid": (0, 1, 1)}, {"grid": (1, 65536, 1)}, {"block": (1025, 1, 1)}], ids=str
)
def test_impossible_launch_is_refused_and_not_counted(stub, wrong):
    function, before = loaded(stub), count(stub, "driver_launches")
    assert launch(stub, function, **wrong) == INVALID_VALUE
    assert count(stub, "driver_launches") == before


@pytest.mark.parametrize(
    ("image", "settings", "result"),
    [
        (cubin(90), {}, SUCCESS),
        (cubin(90, abi=7), {"STUB_DRIVER": "12040"}, SUCCESS),
        (cubin(90), {"STUB_DRIVER": "12040"}, INVALID_IMAGE),
        (cubin(80), {}, NO_BINARY),
        (cubin(80), {"STUB_CC": "86"}, SUCCESS),
        (b"a file that was cut off\0", {}, INVALID_IMAGE),
    ],
    ids=["right", "older CUDA", "newer than the driver", "other architecture", "same family",
         "no cubin"],
)  # fmt: skip
def test_cubin_is_accepted_as_a_driver_would(stub, monkeypatch, image, settings, result):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert stub.cuModuleLoadData(ctypes.byref(handle()), image) == result


def test_kernel_that_a_cubin_does_not_have_is_not_found(stub):
    module = handle()
    assert stub.cuModuleLoadData(ctypes.byref(module), cubin(90)) == SUCCESS
    assert stub.cuModuleGetFunction(ctypes.byref(handle()), module, b"nothing") == NOT_FOUND


def test_devices_have_their_own_memory_streams_and_kernels(stub, monkeypatch):
    monkeypatch.setenv("STUB_GPUS", "2")
    memory, streams, functions = [handle(), handle()], [handle(), handle()], []
    for device in range(2):
        assert stub.cudaSetDevice(device) == SUCCESS
        assert stub.cudaMalloc(ctypes.byref(memory[device]), ctypes.c_size_t(100)) == SUCCESS
        assert stub.cudaStreamCreate(ctypes.byref(streams[device])) == SUCCESS
        functions.append(loaded(stub))
    assert stub.cudaSetDevice(2) == INVALID_DEVICE
    assert [stub.stub_device_of_address(each) for each in memory] == [0, 1]
    assert streams[0].value != streams[1].value
    assert launch(stub, functions[1], stream=streams[1]) == SUCCESS
    assert launch(stub, functions[0], stream=streams[1]) == INVALID_HANDLE
    assert launch(stub, functions[1], stream=streams[0]) == INVALID_HANDLE
    for each in memory:
        stub.cudaFree(each)
    assert [stub.stub_device_of_address(each) for each in memory] == [-1, -1]
    stub.cudaSetDevice(0)


def test_contexts_of_the_driver_are_the_devices_of_the_runtime(stub, monkeypatch):
    monkeypatch.setenv("STUB_GPUS", "2")
    number, context, device = ctypes.c_int(), handle(), ctypes.c_int()
    stub.cuDeviceGetCount(ctypes.byref(number))
    assert number.value == 2
    stub.cuDevicePrimaryCtxRetain(ctypes.byref(context), 1)
    stub.cuCtxPushCurrent_v2(context)
    stub.cudaGetDevice(ctypes.byref(device))
    assert device.value == 1
    stub.cuCtxPopCurrent_v2(ctypes.byref(context))
    stub.cudaGetDevice(ctypes.byref(device))
    assert device.value == 0


def test_captured_work_is_done_when_the_graph_runs(stub):
    stream, graph, memory = handle(), handle(), ctypes.create_string_buffer(b"before")
    stub.cudaStreamCreate(ctypes.byref(stream))
    function = loaded(stub)
    assert stub.cudaStreamBeginCapture(stream, 0) == SUCCESS
    assert launch(stub, function, stream=stream) == SUCCESS
    stub.cudaMemcpyAsync(memory, b"after!", ctypes.c_size_t(6), 3, stream)
    assert launch(stub, function, stream=None) == CAPTURE_IMPLICIT
    assert stub.cudaStreamSynchronize(stream) != SUCCESS
    stub.cudaGetLastError()
    assert stub.cudaStreamEndCapture(stream, ctypes.byref(graph)) == SUCCESS
    nodes = ctypes.c_size_t()
    stub.cudaGraphGetNodes(graph, None, ctypes.byref(nodes))
    assert (nodes.value, memory.value) == (2, b"before")
    before = count(stub, "runtime_launches")
    assert stub.cudaGraphLaunch(graph, stream) == SUCCESS
    assert (count(stub, "runtime_launches") - before, memory.value) == (1, b"after!")
    assert launch(stub, function, stream=None) == SUCCESS


PROGRAM = """
import json, os, torch
from cuda_stub import counted, counters
from cuda_stub.emulated import Emulation

def spent(call):
    before = counters()
    call()
    return {name: number for name, number in counted(before).items() if number}

found = {"devices": torch.cuda.device_count()}
x = torch.empty(5, device="cuda:1")
found["add"] = spent(lambda: x.add_(1))
found["copy"] = spent(lambda: x.copy_(torch.arange(5.0)))
found["values"] = x.cpu().tolist()
found["stat"] = spent(lambda: os.path.exists("/nowhere"))
found["wait"] = spent(torch.cuda.synchronize)
emulation = Emulation().start()
x.sin()
found["unknown"] = emulation.unknown
found["faults"] = emulation.faults
side = torch.cuda.Stream(1)
with torch.cuda.stream(side):
    x.sin()
found["streams"] = [launch.stream for launch in emulation.launches] == [0, side.cuda_stream]
found["device"] = [launch.device for launch in emulation.launches]
graph = torch.cuda.CUDAGraph()
with torch.cuda.device(1), torch.cuda.graph(graph):
    x.sin()
found["captured"] = len(emulation.launches)
graph.replay()
found["replayed"] = len(emulation.launches)
print(json.dumps(found))
"""


def test_pytorch_runs_on_it(on_stub):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        env=on_stub(GPUS=2), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["devices"] == 2
    assert found["add"] == {"runtime_launches": 1}
    assert found["copy"]["copies"] == 1
    assert found["values"] == [0, 1, 2, 3, 4]
    assert found["stat"] == {"file_calls": 1}
    assert found["wait"] == {"waits": 1}
    assert "sin" in found["unknown"][0]
    assert found["faults"] == []
    assert found["streams"]
    assert found["device"] == [1, 1]
    assert (found["captured"], found["replayed"]) == (2, 3)


NVRTC = """
import ctypes, json, torch
from cuda_stub.emulated import Emulation
from cuda_stub.torch_on_cpu import on_host

compiler, driver = ctypes.CDLL("libnvrtc.so.13"), ctypes.CDLL("libcuda.so.1")
source = b'extern "C" __global__ void twice(float* x, int n) {' \
         b'  int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) x[i] = 2.0f * i; }'
program, option = ctypes.c_void_p(), (ctypes.c_char_p * 1)(b"--gpu-architecture=sm_90")
compiler.nvrtcCreateProgram(ctypes.byref(program), source, b"twice.cu", 0, None, None)
assert compiler.nvrtcCompileProgram(program, 1, option) == 0
found = {}
for kind in ("PTX", "CUBIN"):
    size = ctypes.c_size_t()
    getattr(compiler, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
    found[kind] = ctypes.create_string_buffer(size.value)
    getattr(compiler, f"nvrtcGet{kind}")(program, found[kind])
emulation = Emulation().start()
emulation.know(found["CUBIN"].raw, found["PTX"].value.decode())
x = torch.empty(70, device="cuda")
module, function = ctypes.c_void_p(), ctypes.c_void_p()
assert driver.cuModuleLoadData(ctypes.byref(module), found["CUBIN"]) == 0
assert driver.cuModuleGetFunction(ctypes.byref(function), module, b"twice") == 0
values = ctypes.c_void_p(x.data_ptr()), ctypes.c_int(len(x))
parameters = (ctypes.c_void_p * 2)(*map(ctypes.addressof, values))
assert driver.cuLaunchKernel(function, 2, 1, 1, 64, 1, 1, 0, None, parameters, None) == 0
print(json.dumps([emulation.faults, emulation.unknown, on_host(x).tolist()]))
"""


def test_kernel_compiled_by_nvrtc_runs_in_the_emulator(on_stub):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", NVRTC],
        env=on_stub(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], [], [2 * i for i in range(70)]]


def test_a_launch_costs_what_it_is_told_to(on_stub):
    program = (
        "import ctypes, time, cuda_stub\n"
        "stub = ctypes.CDLL(cuda_stub.LIBRARY)\n"
        "start = time.perf_counter()\n"
        "for _ in range(10): stub.cudaMemsetAsync(None, 0, 0, None)\n"
        "print(time.perf_counter() - start)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=on_stub(LAUNCH_NS=5_000_000), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(done.stdout) >= 0.05
