"""The emulator: opcodes against scalar models, seeded faults, counts of kernels counted by hand."""

import math
import struct

import numpy as np
import pytest

from ptxemu import Buffer, PtxError, run
from ptxemu.values import fused_multiply_add

HEAD = """
.version 8.8
.target sm_80
.address_size 64
{module}
.visible .entry test({parameters})
{{
.reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<16>; .reg .b64 %d<16>; .reg .f32 %f<8>;
{body}
ret;
}}
"""
PARAMETERS = ".param .u64 a, .param .u64 b, .param .u32 n"
LANE = """
mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mad.lo.s32 %r0, %r1, 32, %r0;
ld.param.u64 %d0, [a]; ld.param.u64 %d1, [b];
mul.wide.u32 %d2, %r0, 4; add.s64 %d3, %d0, %d2; add.s64 %d4, %d1, %d2;
"""


def ptx(body, module=""):
    return HEAD.format(module=module, parameters=PARAMETERS, body=body)


def launch(body, source, count=32, grid=1, module="", shared=0, threads=32, blocks=None, **options):
    """Run a body on uint32 data; the output and the machine."""
    out = Buffer(np.zeros(count, np.uint32), defined=False, name="out")
    machine = run(
        ptx(body, module), "test", (grid, 1, 1), (threads, 1, 1),
        [Buffer(source, name="source", **options), out, count], shared, blocks, ulps=0,
    )  # fmt: skip
    return out, machine


def one_operation(operation, *columns):
    """Results of an instruction on registers %r4, %r5, … that hold the columns, one a lane."""
    loads = "".join(f"ld.global.b32 %r{4 + i}, [%d3 + {128 * i}];\n" for i in range(len(columns)))
    source = np.concatenate([np.resize(column, 32).astype(np.uint32) for column in columns])
    out, _ = launch(f"{LANE}{loads}{operation}\nst.global.b32 [%d4], %r9;", source)
    return out.array()[: len(columns[0])]


def bits(value):
    return struct.unpack("<I", struct.pack("<f", value))[0]


def number(pattern):
    return struct.unpack("<f", struct.pack("<I", int(pattern)))[0]


FLOATS = [
    0.0, -0.0, 1.0, -1.5, 3.0e38, -3.0e38, 1.0e-38, 1.2e-40, math.inf, -math.inf, math.nan,
    0.33333334, 16777217.0, -7.25, 1e-30, 2.0**-149,
]  # fmt: skip
TINY = 2.0**-126


def flushed(x):
    return math.copysign(0.0, x) if abs(x) < TINY else x


def rounded(x):
    """A float64 as float32, overflow to infinity."""
    with np.errstate(all="ignore"):
        return float(np.float32(x))


def maximum(x, y):
    return y if math.isnan(x) else x if math.isnan(y) else max(x, y)


FLOAT_MODELS = {
    "add.rn.f32 %r9, %r4, %r5;": lambda x, y: rounded(x + y),
    "sub.rn.f32 %r9, %r4, %r5;": lambda x, y: rounded(x - y),
    "mul.rn.f32 %r9, %r4, %r5;": lambda x, y: rounded(x * y),
    "mul.rn.ftz.f32 %r9, %r4, %r5;": lambda x, y: flushed(rounded(flushed(x) * flushed(y))),
    "max.f32 %r9, %r4, %r5;": maximum,
    "max.f32 %r9, %r4, %r5, 0f40000000;": lambda x, y: (
        max(maximum(x, y), 2.0) if maximum(x, y) == maximum(x, y) else 2.0
    ),
    "max.NaN.f32 %r9, %r4, %r5;": lambda x, y: x + y if x != x or y != y else max(x, y),
    "add.rn.sat.f32 %r9, %r4, %r5;": lambda x, y: (
        maximum(0.0, min(rounded(x + y), 1.0)) if x + y == x + y else 0.0
    ),
    "abs.f32 %r9, %r4;": lambda x, y: abs(x),
    "neg.f32 %r9, %r4;": lambda x, y: -x,
}


@pytest.mark.parametrize("operation", FLOAT_MODELS)
def test_float_arithmetic(operation):
    pairs = [(x, y) for x in FLOATS for y in (1.0, -0.0, math.nan, 1e-39, -math.inf)]
    pairs = [(number(bits(x)), number(bits(y))) for x, y in pairs][:32]
    got = one_operation(operation, [bits(x) for x, _ in pairs], [bits(y) for _, y in pairs])
    for (x, y), pattern in zip(pairs, got, strict=True):
        expected, actual = FLOAT_MODELS[operation](x, y), number(pattern)
        assert actual == expected or (math.isnan(actual) and math.isnan(expected)), (x, y)
        if actual == 0 and "max" not in operation:
            assert math.copysign(1, actual) == math.copysign(1, expected), (x, y)


def test_fused_multiply_add_rounds_once():
    """x² + y where x² has a digit that rounding first would lose."""
    x = np.float32(1 + 2.0**-12)
    exact = float(x) ** 2 - (1 + 2.0**-11)
    result = fused_multiply_add(x[None], x[None], np.float32([-(1 + 2.0**-11)]))
    assert result[0] == exact == 2.0**-24
    wide = np.float64([1 + 2.0**-30])
    assert fused_multiply_add(wide, wide, -(wide * wide))[0] == 2.0**-60


INTEGERS = [0, 1, 2, 31, 32, 33, 255, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678, 0xDEADBEEF]


def signed(x):
    return x - (1 << 32) if x >> 31 else x


INTEGER_MODELS = {
    "add.s32 %r9, %r4, %r5;": lambda x, y: x + y,
    "mul.lo.s32 %r9, %r4, %r5;": lambda x, y: x * y,
    "mul.hi.u32 %r9, %r4, %r5;": lambda x, y: x * y >> 32,
    "mul.hi.s32 %r9, %r4, %r5;": lambda x, y: signed(x) * signed(y) >> 32,
    "cvt.u16.u32 %h1, %r4; mul.hi.u16 %h2, %h1, 5462; cvt.u32.u16 %r9, %h2;": lambda x, y: (
        (x & 0xFFFF) * 5462 >> 16
    ),
    "mad.lo.s32 %r9, %r4, %r5, 7;": lambda x, y: x * y + 7,
    "and.b32 %r9, %r4, %r5;": lambda x, y: x & y,
    "xor.b32 %r9, %r4, %r5;": lambda x, y: x ^ y,
    "shl.b32 %r9, %r4, %r5;": lambda x, y: x << y if y < 32 else 0,
    "shr.u32 %r9, %r4, %r5;": lambda x, y: x >> min(y, 32),
    "shr.s32 %r9, %r4, %r5;": lambda x, y: signed(x) >> min(y, 31),
    "bfe.u32 %r9, %r4, 4, 9;": lambda x, y: x >> 4 & 0x1FF,
    "bfe.s32 %r9, %r4, 4, 9;": lambda x, y: (x >> 4 & 0x1FF) - (0x200 if x >> 12 & 1 else 0),
    "prmt.b32 %r9, %r4, %r5, 0x5432;": lambda x, y: x >> 16 | y << 16,
    "lop3.b32 %r9, %r4, %r5, 0, 0x3c;": lambda x, y: x ^ y,
    "shf.l.wrap.b32 %r9, %r4, %r5, 8;": lambda x, y: y << 8 | x >> 24,
    "min.s32 %r9, %r4, %r5;": lambda x, y: min(signed(x), signed(y)),
    "div.u32 %r9, %r4, %r5;": lambda x, y: x // y if y else 0xFFFFFFFF,
    "setp.lt.s32 %p1, %r4, %r5; selp.b32 %r9, 1, 2, %p1;": lambda x, y: (
        1 if signed(x) < signed(y) else 2
    ),
    "setp.lt.u32 %p1, %r4, %r5; selp.b32 %r9, 1, 2, %p1;": lambda x, y: 1 if x < y else 2,
}


@pytest.mark.parametrize("operation", INTEGER_MODELS)
def test_integer_arithmetic(operation):
    pairs = [(x, y) for i, x in enumerate(INTEGERS) for y in (INTEGERS[i], INTEGERS[-i], 5)][:32]
    got = one_operation(operation, [x for x, _ in pairs], [y for _, y in pairs])
    expected = [INTEGER_MODELS[operation](x, y) % (1 << 32) for x, y in pairs]
    assert got.tolist() == expected


def test_comparisons_with_nan():
    """Ordered ones are false, those that end in u are true."""
    for name in ("lt", "gt", "eq", "num", "ltu", "neu", "nan"):
        expected = name.endswith("u") or name == "nan"
        operation = f"setp.{name}.f32 %p1, %r4, %r5; selp.b32 %r9, 1, 0, %p1;"
        assert one_operation(operation, [bits(math.nan)], [bits(1.0)]) == expected


@pytest.mark.parametrize(
    ("operation", "value", "expected"),
    [
        ("cvt.rn.bf16.f32 %h1, %r4; cvt.u32.u16 %r9, %h1;", bits(1.00390625), 0x3F80),  # a tie
        ("cvt.rn.bf16.f32 %h1, %r4; cvt.u32.u16 %r9, %h1;", bits(1.01171875), 0x3F82),
        ("cvt.rn.f16.f32 %h1, %r4; cvt.u32.u16 %r9, %h1;", bits(65520.0), 0x7C00),
        ("cvt.rn.bf16x2.f32 %r9, %r4, 0f3F800000;", bits(2.0), 0x40003F80),
        ("cvt.rzi.s32.f32 %r9, %r4;", bits(-2.9), -2 % (1 << 32)),
        ("cvt.rzi.s32.f32 %r9, %r4;", bits(3e9), 0x7FFFFFFF),
        ("cvt.rn.f32.s32 %r9, %r4;", -3 % (1 << 32), bits(-3.0)),
        ("cvt.u16.u32 %h1, %r4; cvt.s32.s16 %r9, %h1;", 0x1FFFF, 0xFFFFFFFF),
        ("mov.b32 {%h1, %h2}, %r4; mov.b32 %r9, {%h2, %h1};", 0x11112222, 0x22221111),
    ],
)
def test_conversions(operation, value, expected):
    assert one_operation(operation, [value])[0] == expected


def test_shuffles():
    lanes = list(range(32))
    for mode, by, expected in (
        ("bfly", 5, [lane ^ 5 for lane in lanes]),
        ("up", 3, [max(lane - 3, lane if lane < 3 else 0) for lane in lanes]),
        ("down", 3, [lane + 3 if lane < 29 else lane for lane in lanes]),
        ("idx", 7, [7] * 32),
    ):
        limits = 0 if mode == "up" else 31
        operation = f"shfl.sync.{mode}.b32 %r9, %r4, {by}, {limits}, -1;"
        assert one_operation(operation, lanes).tolist() == expected, mode


@pytest.mark.parametrize(
    ("operation", "expected"),
    [("add.s32", sum(range(-16, 16))), ("min.s32", -16), ("max.s32", 15), ("or.b32", -1),
     ("and.b32", 0), ("xor.b32", 0), ("max.u32", -1)],
)  # fmt: skip
def test_reductions_across_a_warp(operation, expected):
    lanes = np.arange(-16, 16).astype(np.uint32)
    found = one_operation(f"redux.sync.{operation} %r9, %r4, -1;", lanes)
    assert found.astype(np.int32).tolist() == [expected] * 32


def test_a_reduction_without_a_lane_that_it_names_is_a_fault():
    with pytest.raises(PtxError, match="do not all take part"):
        one_operation("setp.lt.u32 %p1, %r0, 9;\n@%p1 redux.sync.add.s32 %r9, %r4, -1;", [1])


STORE = "st.global.b32 [%d4], %r4;"
EXCHANGE = """
mov.u32 %r5, buffer; mov.u32 %r6, %tid.x; shl.b32 %r7, %r6, 2; add.s32 %r7, %r7, %r5;
st.shared.b32 [%r7], %r6; {between} xor.b32 %r8, %r7, 128; ld.shared.b32 %r4, [%r8];
"""
SHARED = ".shared .align 128 .b8 buffer[256];"
FAULTS = {
    "out of bounds": (f"{LANE} ld.global.b32 %r4, [%d3 + 4]; {STORE}", {}),
    "misaligned": (f"{LANE} ld.global.b32 %r4, [%d3 + 2]; {STORE}", {}),
    "stores an undefined value": (f"{LANE} {STORE}", {}),
    "undefined address": (f"{LANE} add.s64 %d5, %d3, %d9; ld.global.b32 %r4, [%d5]; {STORE}", {}),
    "undefined predicate": (f"{LANE} ld.global.b32 %r4, [%d3]; @%p3 {STORE}", {}),
    "race": (LANE + EXCHANGE.format(between="") + STORE, {"threads": 64, "module": SHARED}),
    "divergent barrier": (
        f"{LANE} setp.lt.u32 %p1, %r0, 7; @%p1 bra SKIP; bar.sync 0; SKIP: mov.b32 %r4, 1; {STORE}",
        {},
    ),
    "mask does not name it": (
        f"{LANE} ld.global.b32 %r4, [%d3]; shfl.sync.bfly.b32 %r4, %r4, 1, 31, 1; {STORE}",
        {},
    ),
    "not emulated: tanh.approx.f32": (f"{LANE} tanh.approx.f32 %f1, %f2; {STORE}", {}),
    "shared memory out of bounds": (
        LANE + EXCHANGE.format(between="bar.sync 0;") + STORE,
        {"threads": 64, "module": SHARED.replace("256", "128")},
    ),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_seeded_fault_is_caught(message):
    body, options = FAULTS[message]
    with pytest.raises(PtxError, match=message):
        launch(body, np.arange(32, dtype=np.uint32), 64, **options)


def test_undefined_input_is_no_fault_until_it_is_stored():
    source = np.arange(32, dtype=np.uint32)
    chosen = np.arange(32) < 7
    guarded = "setp.lt.u32 %p1, %r0, 7; ld.global.b32 %r4, [%d3]; selp.b32 %r4, %r4, 9, %p1;"
    out, _ = launch(f"{LANE} {guarded} {STORE}", source, defined=chosen)
    assert out.array().tolist() == [*range(7), *[9] * 25]
    with pytest.raises(PtxError, match=r"stores an undefined value.*thread 7"):
        launch(f"{LANE} ld.global.b32 %r4, [%d3]; {STORE}", source, defined=chosen)


def test_half_of_a_pair_may_stay_undefined():
    """As compilers leave it where two operations are done as one, and one of them is not needed."""
    source = np.arange(32, dtype=np.float32)
    pair = "mov.b64 %d6, {%r4, %r9}; add.rn.f32x2 %d6, %d6, %d6;"
    body = f"{LANE} ld.global.b32 %r4, [%d3]; {pair}"
    out, _ = launch(f"{body} mov.b64 {{%r4, %r5}}, %d6; {STORE}", source)
    assert out.array().view(np.float32).tolist() == (source * 2).tolist()
    with pytest.raises(PtxError, match="stores an undefined value"):
        launch(f"{body} mov.b64 {{%r5, %r4}}, %d6; {STORE}", source)


def test_a_barrier_orders_shared_memory():
    body = LANE + EXCHANGE.format(between="bar.sync 0;") + STORE
    out, _ = launch(body, np.zeros(64, np.uint32), 64, threads=64, module=SHARED)
    assert out.array().tolist() == [lane ^ 32 for lane in range(64)]


def test_unwritten_and_written_twice():
    source = np.arange(64, dtype=np.uint32)
    out, _ = launch(f"{LANE} ld.global.b32 %r4, [%d3]; @%p0 bra END; {STORE} END:".replace(
        "@%p0 bra END;", "setp.gt.u32 %p0, %r0, 20; @%p0 bra END;"
    ), source)  # fmt: skip
    assert (out.unwritten, out.written_twice) == (11, 0)
    out, _ = launch(f"{LANE} mov.b32 %r4, 1; st.global.b32 [%d1], %r4;", source)
    assert (out.unwritten, out.written_twice) == (31, 31)
    out, _ = launch(f"{LANE} mov.b32 %r4, 1; {STORE} {STORE}", source)
    assert out.written_twice == 32


LOOP = f"""{LANE}
and.b32 %r4, %r0, 3; mov.b32 %r5, 0;
AGAIN: add.s32 %r5, %r5, 10; setp.eq.s32 %p1, %r4, 0; @%p1 bra DONE;
sub.s32 %r4, %r4, 1; bra AGAIN;
DONE: st.global.b32 [%d4], %r5;"""


def test_threads_that_part_and_meet_again():
    out, machine = launch(LOOP, np.zeros(32, np.uint32))
    assert out.array().tolist() == [10 * (1 + lane % 4) for lane in range(32)]
    # 6 of LANE without parameters, 2, then 3 in each of 4 rounds, 2 between them, store and ret
    assert machine.counts().warp_instructions == 6 + 2 + 4 * 3 + 3 * 2 + 2


def test_a_shuffle_waits_for_lanes_that_went_another_way():
    body = f"""{LANE}
setp.lt.u32 %p1, %r0, 8; mov.b32 %r4, 1; @%p1 bra FAR;
NEAR: shfl.sync.bfly.b32 %r5, %r4, 16, 31, -1;
st.global.b32 [%d4], %r5; bra END;
FAR: mov.b32 %r4, 2; bra NEAR;
END:"""
    out, _ = launch(body, np.zeros(32, np.uint32))
    assert out.array().tolist() == [2 if 16 <= lane < 24 else 1 for lane in range(32)]


@pytest.mark.parametrize(
    ("stride", "sectors", "tags", "cycles"), [(1, 4, 1, 1), (8, 32, 2, 8), (32, 32, 8, 32)]
)
def test_counts_of_a_strided_load(stride, sectors, tags, cycles):
    """A warp's 32 words, at a stride: sectors of 32 bytes, groups of 4 lines, banks."""
    body = f"{LANE} mul.wide.u32 %d5, %r0, {4 * stride}; add.s64 %d5, %d5, %d0; "
    body += f"ld.global.b32 %r4, [%d5]; {STORE}"
    _, machine = launch(body, np.zeros(32 * stride, np.uint32))
    counts = machine.counts()
    assert counts.sectors == sectors + 4
    assert counts.least_sectors == 4 + 4
    assert counts.tags == tags + 1
    assert counts.bank_cycles == cycles + 1
    assert (counts.bytes_read, counts.bytes_written) == (32 * sectors, 128)
    assert (counts.store_sectors, counts.loaded_sectors) == (4, sectors)


def test_blocks_and_virtual_places():
    """The last of 2³⁰ blocks, with only its part of memory held."""
    ahead = 32 * ((1 << 30) - 1)
    wide = LANE.replace("mad.lo.s32 %r0, %r1, 32, %r0;", "mul.wide.u32 %d2, %r1, 128;").replace(
        "mul.wide.u32 %d2, %r0, 4;", "mul.wide.u32 %d5, %r0, 4; add.s64 %d2, %d2, %d5;"
    )
    source = Buffer(np.arange(32, dtype=np.uint32), at=ahead)
    out = Buffer(np.zeros(32, np.uint32), defined=False, at=ahead)
    code = ptx(f"{wide} ld.global.b32 %r4, [%d3]; {STORE}")
    run(code, "test", (1 << 30, 1, 1), (32, 1, 1), [source, out], blocks=[(1 << 30) - 1])
    assert out.array().tolist() == list(range(32))
    with pytest.raises(PtxError, match="out of bounds"):
        run(code, "test", (1 << 30, 1, 1), (32, 1, 1), [source, out], blocks=[0])


def test_approximations_are_off_by_a_little():
    """Always by the same, never at powers of two."""
    values = np.float32([0.0, 1.0, 0.3, -2.7, 11.1]).view(np.uint32)
    source = Buffer(np.resize(values, 32))
    results = []
    for ulps in (0, 2, 2):
        out = Buffer(np.zeros(32, np.float32), defined=False)
        body = f"{LANE} ld.global.b32 %r4, [%d3]; ex2.approx.ftz.f32 %r4, %r4; {STORE}"
        run(ptx(body), "test", (1, 1, 1), (32, 1, 1), [source, out], ulps=ulps)
        results.append(out.array()[:5])
    exact, first, second = results
    assert np.array_equal(first, second)
    assert first[:2].tolist() == [1.0, 2.0]
    assert np.abs(first - exact).max() > 0
    assert np.all(np.abs(first - exact) <= 2 * np.spacing(exact))
