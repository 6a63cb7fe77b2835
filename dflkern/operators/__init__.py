"""Which code runs: the table of operators, their registration, the fast path, the backend."""

from . import registration as registration
