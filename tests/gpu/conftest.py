"""The stub CUDA device."""

import os
from pathlib import Path

import pytest

import cuda_stub


@pytest.fixture(scope="session")
def stub_device(tmp_path_factory):
    """The folder of the stub device, for `cuda_stub.environment`."""
    if reason := cuda_stub.missing():
        pytest.skip(f"no stub device: {reason}")
    return cuda_stub.build(tmp_path_factory.mktemp("stub_device"))


@pytest.fixture(scope="session")
def on_stub(stub_device):
    """A function that gives the environment of a test's process on the stub device.

    Kernels come from the user's Triton cache where it has them, as in the other tests of PTX.
    """

    def environment(**settings):
        root = Path(__file__).parents[2]
        path = [root, root / "tests", root / "tests" / "helpers"]
        cache = os.environ.get("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
        return cuda_stub.environment(stub_device, **settings) | {
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "TRITON_CACHE_DIR": cache,
        }

    return environment
