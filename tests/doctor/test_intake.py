"""How `examine` reads the channels of logits, and what it says of values it cannot use."""

import numpy as np
import pytest
import torch

from dflkern import doctor


def head_output(*shape, seed=0):
    """Smooth logits, as heads have, of a shape."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).cumsum(-1) / 2


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((2, 64, 200), 1), ((2, 64, 200), -2), ((64, 200), 0), ((2, 64, 10, 20), 1),
     ((2, 200, 64), -1), ((2, 32, 200), 1)],
)  # fmt: skip
def test_channels_with_two_readings_need_num_bins(shape, dim):
    logits, size = head_output(*shape), shape[dim]
    with pytest.raises(ValueError, match=rf"num_bins={size // 4} or num_bins={size}[.]"):
        doctor.examine(logits=logits, dim=dim)
    assert doctor.examine(logits=logits, dim=dim, num_bins=size // 4).num_bins == size // 4
    assert doctor.examine(logits=logits, dim=dim, num_bins=size).num_bins == size
    for num_bins in (size // 4, size):
        codes = {f.code for f in doctor.examine(logits=logits, dim=dim, num_bins=num_bins)}
        assert "extra-bin" not in codes


@pytest.mark.parametrize(
    ("shape", "dim", "bins"),
    [((200, 64), -1, 64), ((200, 64), 1, 64), ((50, 4, 64), -1, 64), ((2, 4, 64, 50), 2, 64),
     ((2, 50, 4, 64), -1, 64), ((2, 17, 50), 1, 17), ((2, 50, 33), -1, 33), ((16,), -1, 16),
     ((2, 50, 16), -1, 16)],
)  # fmt: skip
def test_channels_with_one_reading_need_nothing(shape, dim, bins):
    report = doctor.examine(logits=head_output(*shape), dim=dim)
    assert report.num_bins == bins
    assert "extra-bin" not in {finding.code for finding in report}


def test_targets_with_four_sides_tell_how_the_channels_are_read():
    targets = 9 * torch.rand(50, 4)
    report = doctor.examine(logits=torch.randn(50, 64), targets=targets)
    assert report.num_bins == 16
    assert doctor.examine(logits=torch.randn(50, 4, 64), targets=targets).num_bins == 64


@pytest.mark.parametrize("value", [16, torch.tensor(16), np.int64(16)])
def test_whole_numbers_of_any_type(value):
    assert doctor.examine(targets=torch.rand(30, 4), num_bins=value).num_bins == 16


@pytest.mark.parametrize(
    ("value", "error"),
    [(True, TypeError), (16.0, TypeError), (float("nan"), TypeError), (float("inf"), TypeError),
     ("16", TypeError), (None, ValueError), (10**9, ValueError), (10**5000, ValueError),
     (-16, ValueError), (257, ValueError), (1, ValueError)],
    ids=lambda value: f"{min(value, 10**10):g}" if isinstance(value, int) else str(value)[:9],
)  # fmt: skip
def test_what_is_no_number_of_bins(value, error):
    with pytest.raises(error, match=r"^examine: .*num_bins.*[.]$"):
        doctor.examine(targets=torch.rand(30, 4), num_bins=value)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint16, torch.bool]
)
def test_other_dtypes_are_read_by_value(dtype):
    values = (torch.rand(30, 4) * 9).to(dtype)
    report = doctor.examine(targets=values, num_bins=16)
    assert report.levels[0].largest == float(values.float().max())


@pytest.mark.parametrize(
    ("kind", "make", "way"),
    [
        ("meta", lambda: torch.rand(30, 4, device="meta"), "which has values"),
        ("sparse", lambda: torch.rand(30, 4).to_sparse(), r"to_dense\(\)"),
        ("complex", lambda: torch.rand(30, 4, dtype=torch.complex64), "[.]real"),
        ("quantized", lambda: torch.quantize_per_tensor(torch.rand(30, 4), 0.1, 0, torch.quint8),
         r"dequantize\(\)"),
        ("nested", lambda: torch.nested.nested_tensor([torch.rand(3, 4)]), r"unbind\(\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["targets", "logits", "losses", "stride", "weight", "project"])
@pytest.mark.filterwarnings("ignore")  # PyTorch's, of nested and quantized tensors
def test_tensors_without_plain_values(kind, make, way, name):
    given = {"targets": torch.rand(30, 4), "num_bins": 16, name: make()}
    with pytest.raises(TypeError, match=rf"^examine: {name} is a {kind} tensor; .*{way}"):
        doctor.examine(**given)


def test_infinite_strides_are_refused():
    with pytest.raises(ValueError, match="above 0 and finite"):
        doctor.examine(targets=torch.rand(30, 4), num_bins=16, stride=float("inf"))
