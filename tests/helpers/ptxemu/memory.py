"""Global memory: buffers at virtual addresses, with what was defined, written and touched."""

import numpy as np

from .parse import PtxError

FIRST_ADDRESS = 1 << 44
SECTOR = 32


class Buffer:
    """A tensor's memory on the device.

    Args:
        data: an array, copied.
        defined: False for an output, or a mask in the shape of data: what a kernel may depend on.
        skip: bytes between a 256-byte boundary and the first element.
        at: elements that lie in front of data and are not held: the pointer that a kernel is given
            points at the first of them. For addresses that no real memory could fill.
        name: for messages.
    """

    def __init__(self, data, defined=True, skip=0, at=0, name="buffer"):
        self.dtype, self.shape, self.name = data.dtype, data.shape, name
        payload = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
        self.ahead = at * data.dtype.itemsize
        self.first = skip + self.ahead % SECTOR  # keeps the alignment of the virtual place
        self.end = self.first + payload.size
        size = (self.end // SECTOR + 1) * SECTOR
        self.bytes = np.zeros(size, np.uint8)
        self.bytes[self.first : self.end] = payload
        self.defined = np.zeros(size, bool)
        mask = np.broadcast_to(defined, data.shape).reshape(-1)
        self.defined[self.first : self.end] = np.repeat(mask, data.dtype.itemsize)
        self.writer = np.full(size, -1, np.int64)
        self.written_twice = 0
        self.sectors_read = np.zeros(size // SECTOR, bool)
        self.sectors_written = np.zeros(size // SECTOR, bool)
        self.base = 0

    @property
    def pointer(self):
        """The address a kernel is given."""
        return self.base + self.first - self.ahead

    @property
    def unwritten(self):
        """Elements that are not defined."""
        held = self.defined[self.first : self.end].reshape(-1, self.dtype.itemsize)
        return int((~held.all(1)).sum())

    def array(self):
        """The contents."""
        return self.bytes[self.first : self.end].copy().view(self.dtype).reshape(self.shape)


class GlobalMemory:
    """All buffers of a launch."""

    def __init__(self):
        self.buffers = []
        self.free = FIRST_ADDRESS

    def place(self, buffer):
        """Give a buffer its address, far from all others."""
        if buffer not in self.buffers:
            reach = buffer.ahead - buffer.ahead % SECTOR
            buffer.base = self.free + reach
            self.free = -(-(buffer.base + buffer.bytes.size + (1 << 20)) // 256) * 256
            self.buffers.append(buffer)

    def find(self, addresses, size, verb):
        """For each buffer that is accessed: the buffer, which of the accesses, their offsets.

        Raises:
            PtxError: with the index of the access, for one that is misaligned or in no buffer.
        """
        misaligned = addresses % np.uint64(size) != 0
        if misaligned.any():
            where = int(np.argmax(misaligned))
            raise AccessError(f"misaligned {verb} of {size} bytes", where)
        left = np.ones(addresses.size, bool)
        found = []
        for buffer in self.buffers:
            low, high = buffer.base + buffer.first, buffer.base + buffer.end - size
            inside = left & (addresses >= np.uint64(low)) & (addresses <= np.uint64(max(high, 0)))
            if inside.any():
                offsets = (addresses[inside] - np.uint64(buffer.base)).astype(np.int64)
                found.append((buffer, inside, offsets))
                left &= ~inside
        if left.any():
            where = int(np.argmax(left))
            raise AccessError(
                f"{verb} of {size} bytes out of bounds, {self._place(int(addresses[where]))}", where
            )
        return found

    def _place(self, address):
        def distance(buffer):
            start = buffer.base + buffer.first
            return max(start - address, address - (start + buffer.end - buffer.first), 0)

        if not self.buffers:
            return f"at {address:#x}, where no memory is allocated"
        near = min(self.buffers, key=distance)
        return (
            f"at byte {address - near.base - near.first} of {near.name}, which has "
            f"{near.end - near.first}"
        )

    def load(self, addresses, size):
        """The bytes at each address, and which of them are defined."""
        data = np.zeros((addresses.size, size), np.uint8)
        defined = np.zeros((addresses.size, size), bool)
        for buffer, inside, offsets in self.find(addresses, size, "load"):
            index = offsets[:, None] + np.arange(size)
            data[inside], defined[inside] = buffer.bytes[index], buffer.defined[index]
            buffer.sectors_read[offsets // SECTOR] = True
        return data, defined

    def store(self, addresses, data, threads):
        """Write a row of data to each address, in the name of a thread each."""
        size = data.shape[1]
        for buffer, inside, offsets in self.find(addresses, size, "store"):
            index = offsets[:, None] + np.arange(size)
            before = buffer.writer[index] >= 0
            buffer.writer[index] = threads[inside][:, None]
            lost = buffer.writer[index] != threads[inside][:, None]
            buffer.written_twice += int((before | lost).any(1).sum())
            buffer.bytes[index], buffer.defined[index] = data[inside], True
            buffer.sectors_written[offsets // SECTOR] = True


class AccessError(PtxError):
    """A faulty access; `where` is its index among those made together."""

    def __init__(self, message, where):
        super().__init__(message)
        self.where = where
