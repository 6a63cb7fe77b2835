"""What is read from machine code, on code written for the purpose."""

import pytest

from dflkern.gpu.offline.facts import round_trips

LOAD, SECOND = "LDG.E R2, desc[UR4][R8.64]", "LDG.E R3, desc[UR4][R10.64]"
WIDE = "LDG.E.64 R8, desc[UR4][R6.64]"
LOOP = [".L_x_0:", "LDG.E R4, desc[UR4][R8.64]", "FADD R5, R5, R4", "@P0 BRA `(.L_x_0)"]
CODE = {
    "two loads at once": ([LOAD, SECOND, "FADD R2, R2, R3"], 1, ()),
    "one load after the other": ([LOAD, "FADD R5, R2, R2", SECOND, "FADD R2, R5, R3"], 2, ()),
    "an address that is loaded": ([WIDE, LOAD, "FADD R2, R2, R2"], 2, ()),
    "the second half of a wide load": ([WIDE, "FADD R2, R9, R9"], 1, ()),
    "a load that nothing waits for": ([LOAD, "FADD R5, R6, R7"], 0, ()),
    "a register reused": ([LOAD, "LDG.E R2, desc[UR4][R10.64]"], 1, ()),
    "uniform registers are others": ([LOAD, "UMOV UR2, 0x1"], 0, ()),
    "a way around": ([LOAD, "@P0 BRA `(.L_x_1)", "FADD R5, R2, R2", ".L_x_1:", SECOND,
                      "FADD R5, R2, R3"], 2, ()),
    "a loop": ([LOAD, "FADD R5, R2, R2", *LOOP], 2, (1,)),
    "a loop at the end": ([*LOOP, "EXIT", ".L_x_2:", "BRA `(.L_x_2)", "NOP"], 1, (1,)),
    "loads for the next pass": ([LOAD, ".L_x_0:", "FADD R5, R5, R2", LOAD, "@P0 BRA `(.L_x_0)"],
                                1, (1,)),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", CODE)
def test_round_trips(name):
    """Waits for global memory: on the longest way, and for each further pass through a loop."""
    lines, once, each_pass = CODE[name]
    text = [".text.kernel:"]
    text += [x if x.endswith(":") else f"        /*{i:04x}*/   {x} ;" for i, x in enumerate(lines)]
    assert round_trips("\n".join(text), "kernel") == (once, each_pass)
