"""Compiled files on disk, of any kind: found, verified and loaded, else built once.

Standard library only. `Recipe` describes a file, `store` finds and builds it, `Loader` holds what
one process knows about it.
"""

from .files import Found
from .loader import Loader
from .reporting import BuildError, FolderError, TransientError
from .store import Recipe

__all__ = ["BuildError", "FolderError", "Found", "Loader", "Recipe", "TransientError"]
