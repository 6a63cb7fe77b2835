"""Shared memory of the thread blocks that run together, with its races."""

import numpy as np

from .memory import AccessError

NOBODY, SEVERAL = -1, -2


class SharedMemory:
    """A row of bytes per block.

    A race is an access to what another warp has written, or a write to what another warp has read,
    since the block's last barrier.
    """

    def __init__(self, blocks, size):
        self.bytes = np.zeros((blocks, size), np.uint8)
        self.defined = np.zeros((blocks, size), bool)
        self.phase = np.zeros(blocks, np.int32)  # barriers passed
        self.writer = np.full((blocks, size), NOBODY, np.int32)
        self.written_in = np.full((blocks, size), -1, np.int32)
        self.reader = np.full((blocks, size), NOBODY, np.int32)
        self.read_in = np.full((blocks, size), -1, np.int32)

    def load(self, blocks, warps, offsets, size):
        """The bytes at each offset of a block, and which of them are defined."""
        index, phase, warps = self._index(blocks, warps, offsets, size)
        self._check((self.written_in[index] == phase) & (self.writer[index] != warps), "reads")
        others = (self.read_in[index] == phase) & (self.reader[index] != warps)
        self.reader[index] = np.where(others, SEVERAL, warps)
        self.read_in[index] = phase
        return self.bytes[index], self.defined[index]

    def store(self, blocks, warps, offsets, data, defined):
        """Write a row of data to each offset of a block."""
        index, phase, warps = self._index(blocks, warps, offsets, data.shape[1])
        written = (self.written_in[index] == phase) & (self.writer[index] != warps)
        read = (self.read_in[index] == phase) & (self.reader[index] != warps)
        self._check(written | read, "writes")
        self.bytes[index], self.defined[index] = data, defined
        self.writer[index], self.written_in[index] = warps, phase

    def _index(self, blocks, warps, offsets, size):
        limit = self.bytes.shape[1]
        outside = (offsets < 0) | (offsets + size > limit)
        if outside.any():
            where = int(np.argmax(outside))
            raise AccessError(
                f"shared memory out of bounds: bytes {offsets[where]} to {offsets[where] + size} "
                f"of {limit}",
                where,
            )
        if (offsets % size).any():
            raise AccessError(
                f"misaligned access of {size} bytes to shared memory",
                int(np.argmax(offsets % size != 0)),
            )
        index = blocks[:, None], offsets[:, None] + np.arange(size)
        return index, self.phase[blocks][:, None], warps[:, None].astype(np.int32)

    def _check(self, race, verb):
        if race.any():
            raise AccessError(
                f"race: {verb} shared memory that another warp used since the last barrier",
                int(np.argmax(race.any(1))),
            )
