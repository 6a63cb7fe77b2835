"""The threads of a launch, their registers, and the loop that executes instructions."""

import itertools

import numpy as np

from . import counting, opcodes
from .memory import AccessError, Buffer, GlobalMemory
from .parse import Immediate, Kernel, Not, PtxError, Register, Special, Symbol
from .shared import SharedMemory
from .values import UNSIGNED, Type, either, from_bits, to_bits

LANES = 1 << 16  # threads executed side by side
PREDICATE = Type("p", 1)
EXIT = -1


def run(ptx, entry, grid, block, arguments, shared=0, blocks=None, ulps=2):
    """Run an entry of PTX; the machine, for its counts.

    Args:
        ptx: text.
        entry: the kernel's name.
        grid, block: three numbers each.
        arguments: a Buffer or a number for each parameter; parameters beyond them are 0.
        shared: bytes of dynamic shared memory.
        blocks: which blocks of the grid to run, by number with x fastest; all by default.
        ulps: how far approximate instructions are off, see `opcodes.floats`.
    """
    machine = Machine(Kernel(ptx, entry), ulps)
    machine.launch(grid, block, arguments, shared, blocks)
    return machine


class Machine:
    """A kernel and what it has done so far."""

    def __init__(self, kernel, ulps=2):
        opcodes.bind(kernel)
        self.kernel = kernel
        self.ulps = ulps
        self.memory = GlobalMemory()
        self.totals = counting.Totals()

    def launch(self, grid, block, arguments, shared=0, blocks=None):
        """Run the blocks to their end."""
        self.grid, self.block = grid, block
        self.parameters = self._parameters(arguments)
        self.symbols, self.shared_size = self._layout(shared)
        threads = int(np.prod(block))
        blocks = np.arange(int(np.prod(grid, dtype=np.int64))) if blocks is None else blocks
        blocks = np.asarray(blocks, np.int64)
        together = max(1, LANES // threads)
        self.totals.threads += threads * blocks.size
        self.totals.warps += blocks.size * -(-threads // 32)
        with np.errstate(all="ignore"):
            for first in range(0, blocks.size, together):
                self._start(blocks[first : first + together], threads)
                self._run()
                self.totals.end_of_blocks()

    def counts(self):
        """What the launches cost, see `counting.Counts`."""
        return counting.total(self.kernel, self.memory, self.totals)

    def _parameters(self, arguments):
        parameters = self.kernel.parameters
        data = bytearray(parameters[-1].offset + parameters[-1].size + 8)
        given = itertools.chain(arguments, itertools.repeat(0))
        for parameter, value in zip(parameters, given):  # noqa: B905
            if isinstance(value, Buffer):
                self.memory.place(value)
                value = value.pointer
            kind = "f" if isinstance(value, float) else "i" if value < 0 else "u"
            number = np.array(value, f"<{kind}{parameter.size}")
            data[parameter.offset : parameter.offset + parameter.size] = number.tobytes()
        return np.frombuffer(bytes(data), np.uint8)

    def _layout(self, dynamic):
        """Where each symbol lies: parameters among the parameters, variables in shared memory."""
        symbols = {parameter.name: parameter.offset for parameter in self.kernel.parameters}
        end = 0
        for variable in sorted(self.kernel.variables, key=lambda variable: variable.size == 0):
            start = -(-end // variable.alignment) * variable.alignment
            symbols[variable.name] = start
            end = start + variable.size
        return symbols, end + dynamic

    def _start(self, blocks, threads):
        """Set up the registers and shared memory of some blocks."""
        count, size = len(blocks), threads * len(blocks)
        warps_per_block = -(-threads // 32)
        thread = np.tile(np.arange(threads), count)
        self.size, self.here = size, np.repeat(np.arange(count), threads)
        self.number = blocks[self.here]
        self.thread = self.number * threads + thread
        self.warp, self.lane = self.here * warps_per_block + thread // 32, thread % 32
        self.warps = count * warps_per_block
        self.of_lane = np.full(self.warps * 32, -1, np.int64)
        self.of_lane[self.warp * 32 + self.lane] = np.arange(size)
        self.special = {"laneid": self.lane}
        for name, place, extent in (("tid", thread, self.block), ("ctaid", self.number, self.grid)):
            for axis, stride in zip("xyz", (1, extent[0], extent[0] * extent[1]), strict=True):
                self.special[f"{name}.{axis}"] = place // stride % extent["xyz".index(axis)]
        for name, extent in (("ntid", self.block), ("nctaid", self.grid)):
            for axis, length in zip("xyz", extent, strict=True):
                self.special[f"{name}.{axis}"] = np.full(size, length)
        self.shared = SharedMemory(count, self.shared_size)
        self.registers, self.undefined, self.parts = {}, {}, {}
        self.live = np.ones(size, bool)

    def _run(self):
        """Execute until no thread is live, those that are furthest behind first (see `_next`).

        `at` is the place of all live threads while they agree, and None while `places` tells them
        apart.
        """
        code, at = self.kernel.code, 0
        places = np.zeros(self.size, np.int64)
        while self.live.any():
            if at is None:
                here, agreed = self._next(places)
                at = here if agreed else None
            here = here if at is None else at
            self.active = self.live & (places == here) if at is None else self.live
            instruction = code[here]
            executing = self._guarded(instruction)
            instruction.counts.warps += self._warps(self.active)
            target = None
            if executing.any():
                mask = None if executing.all() else executing
                try:
                    target = instruction.execute(self, instruction, mask)
                except AccessError as error:
                    lane = np.nonzero(executing)[0][error.where]
                    self.fail(instruction, str(error), lane)
            if at is not None and (target is None or np.array_equal(executing, self.active)):
                at = here + 1 if target is None else target
                if target == EXIT:
                    return
                continue
            places[self.active] = here + 1
            if target == EXIT:
                self.live = self.live & ~executing
                at = here + 1 if at is not None else None
            elif target is not None:
                places[executing] = target
                at = None

    def _next(self, places):
        """The place to execute next, and whether all live threads are there.

        An instruction that joins the lanes of a warp waits for those that are elsewhere.
        """
        found = np.unique(places[self.live])
        for here in found:
            if not self.kernel.code[here].joins:
                return int(here), found.size == 1
            arrived = self.warp[self.live & (places == here)]
            if not np.isin(arrived, self.warp[self.live & (places != here)]).any():
                return int(here), found.size == 1
        return int(found[0]), found.size == 1

    def _guarded(self, instruction):
        guard = instruction.guard
        if guard is None:
            return self.active
        undefined = self.undefined_of(guard)
        if undefined is not None and (undefined & self.active).any():
            self.fail(instruction, "undefined predicate", int(np.argmax(undefined & self.active)))
        return self.active & self.read(guard, PREDICATE)

    def _warps(self, mask):
        return self.warps if mask.all() else np.unique(self.warp[mask]).size

    def fail(self, instruction, message, lane):
        """Raise with the place of a thread."""
        raise PtxError(
            f"{instruction.text}: {message} [line {instruction.line}, block {self.number[lane]}, "
            f"thread {self.thread[lane] % int(np.prod(self.block))}]"
        )

    def read(self, operand, type):
        """An operand as numbers of a type: an array of all threads, or one number for all."""
        match operand:
            case Not(predicate):
                return ~self.read(predicate, type)
            case Immediate(bits):
                value = np.array(bits % (1 << max(type.bits, 8)), UNSIGNED[max(type.bits, 8)])
            case Special(name):
                if name not in self.special:
                    raise PtxError(f"the special register %{name} is not emulated")
                value = self.special[name].astype(UNSIGNED[type.bits])
            case Symbol(name):
                if name not in self.symbols:
                    raise PtxError(f"unknown symbol {name}")
                value = np.array(self.symbols[name], UNSIGNED[type.bits])
            case Register(name):
                value = self._register(name)
            case _:
                raise PtxError(f"{operand} is no value")
        if type.kind == "p":
            return value.astype(bool)
        if value.dtype != UNSIGNED[type.bits]:
            value = value.astype(UNSIGNED[type.bits])
        return from_bits(value, type)

    def _register(self, name):
        if name not in self.registers:
            bits = self.kernel.registers[name]
            self.registers[name] = np.zeros(self.size, bool if bits == 1 else UNSIGNED[bits])
            self.undefined[name] = np.ones(self.size, bool)
        return self.registers[name]

    def undefined_of(self, *operands):
        """In which threads any of the operands is undefined, None if in none."""
        masks = []
        for operand in operands:
            operand = operand.predicate if isinstance(operand, Not) else operand
            if isinstance(operand, Register):
                self._register(operand.name)
                masks.append(self.undefined[operand.name])
        return either(masks)

    def undefined_parts(self, operand, count):
        """`undefined_of` each of so many parts of an operand."""
        found = self.parts.get(operand.name, ()) if isinstance(operand, Register) else ()
        return found if len(found) == count else (self.undefined_of(operand),) * count

    def write_parts(self, operand, value, type, mask, parts):
        """`write` what is put together of parts, each of which may be undefined."""
        before = self.undefined_parts(operand, len(parts))
        self.write(operand, value, type, mask, either(parts))
        if mask is not None:
            parts = tuple(
                np.where(mask, *(np.False_ if p is None else p for p in pair))
                for pair in zip(parts, before, strict=True)
            )
        self.parts[operand.name] = parts

    def write(self, operand, value, type, mask, undefined=None):
        """Set a register in the threads of mask (None: in all) to numbers of a type."""
        if operand == Symbol("_"):
            return
        self.parts.pop(operand.name, None)
        bits = self.kernel.registers[operand.name]
        if bits == 1:
            value = np.asarray(value, bool)
        else:
            if type.is_signed and bits > type.bits:
                value, type = np.asarray(value), Type("s", bits)
            value = to_bits(value, type).astype(UNSIGNED[bits], copy=False)
        if mask is None:
            self.registers[operand.name] = np.broadcast_to(value, self.size)
        else:
            before = self._register(operand.name)
            self.registers[operand.name] = np.where(mask, value, before)
            old = self.undefined[operand.name]
            if old is not None or undefined is not None:
                no = np.False_
                undefined = np.where(
                    mask, no if undefined is None else undefined, no if old is None else old
                )
        if undefined is not None:
            undefined = np.broadcast_to(undefined, self.size) if undefined.any() else None
        self.undefined[operand.name] = undefined
