"""PyTorch's pickled files without running anything from them: `read` gives tensors, plain containers and inert data.

A pickle is a program for a stack machine. Its opcodes are stepped through by a machine of our own that imports nothing and calls nothing
but a short list of our functions (`calls`): tensors, numpy's numbers and plain containers come out whole, an object of any other class
comes out as `Inert`, which only remembers what it was made of, and a call of any other function is refused and named.

values -> calls -> machine -> archives; nothing outside uses more than what is named here.
"""

from .archives import is_pickle, read
from .values import Global, Inert, plain

__all__ = ["Global", "Inert", "is_pickle", "plain", "read"]
