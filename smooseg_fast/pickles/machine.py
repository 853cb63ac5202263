"""A stack machine for pickle's opcodes that imports nothing and calls nothing but `calls`."""

from __future__ import annotations

import pickletools
from _compat_pickle import (
    IMPORT_MAPPING,
    NAME_MAPPING,
)  # Python 2's names of the library, which pickles below protocol 3 have
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from .calls import Budget, NumpyType, call, constant, fill_array, require_keys
from .values import Global, Inert, Refused

STEPS = 4_000_000  # opcodes of one pickle; a checkpoint of a thousand tensors with Adam's state has some 200,000
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
NEW: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}
LITERALS = {
    *(
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
    ),
    *(
        "UNICODE",
        "BINUNICODE",
        "BINUNICODE8",
        "SHORT_BINUNICODE",
        "BINBYTES",
        "BINBYTES8",
        "SHORT_BINBYTES",
        "BYTEARRAY8",
    ),
}


class Machine:
    """Runs one pickle. `load` makes of a persistent id what stands for it, or raises Refused."""

    def __init__(self, load: Callable[[Any], Any], budget: Budget):
        self._load, self._budget = load, budget
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []  # the stacks below the marks
        self._memo: dict[int, Any] = {}

    def run(self, file: BinaryIO) -> Any:
        """The value of the pickle that starts where `file` stands; it stands behind it then. Refused for anything else."""
        try:
            for step, (opcode, arg, _) in enumerate(pickletools.genops(file)):
                if step > STEPS:
                    raise Refused(
                        f"has more than {STEPS:,} steps to go through, which no weights need; get it from where it was published"
                    )
                self._step(opcode.name, arg)
            (value,) = self._stack
            if self._outer:
                raise ValueError("a mark is left")
            return value
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, EOFError, AttributeError) as error:
            reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
            raise Refused(f"cut short or damaged ({reason}); copy or download it again") from error

    def _step(self, name: str, arg: Any) -> None:
        stack = self._stack
        if name in LITERALS:
            stack.append(arg)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in NEW:
            stack.append(NEW[name]())
        elif name in ("BINPUT", "PUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if name == "MEMOIZE" else arg] = stack[-1]
        elif name in ("BINGET", "GET", "LONG_BINGET"):
            stack.append(self._memo[arg])
        elif name not in ("PROTO", "FRAME", "STOP"):
            action = ACTIONS.get(name)
            if action is None:  # EXT1, EXT2, EXT4, NEXT_BUFFER, READONLY_BUFFER
                raise Refused(
                    f"uses pickle's {name}, which no weights need; nothing was run: get the file from where it was published"
                )
            action(self, arg)

    def _marked(self) -> list[Any]:
        """What lies above the last mark, which goes."""
        above, self._stack = self._stack, self._outer.pop()
        return above

    def _mark(self, arg: Any) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _pop(self, arg: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._marked()

    def _pop_mark(self, arg: Any) -> None:
        self._marked()

    def _dup(self, arg: Any) -> None:
        self._stack.append(self._stack[-1])

    # ------------------------------------------------------------------------------------------------------------ containers

    def _tuple(self, arg: Any) -> None:
        above = self._marked()
        self._stack.append(tuple(above))

    def _short_tuple(self, count: int) -> None:
        values = tuple(self._stack.pop() for _ in range(count))
        self._stack.append(values[::-1])

    def _list(self, arg: Any) -> None:
        above = self._marked()
        self._stack.append(above)

    def _dict(self, arg: Any) -> None:
        above = self._marked()
        self._stack.append({})
        self._set(above)

    def _frozenset(self, arg: Any) -> None:
        above = self._marked()
        require_keys(above)
        self._stack.append(frozenset(above))

    def _append(self, arg: Any) -> None:
        self._extend([self._stack.pop()])

    def _appends(self, arg: Any) -> None:
        self._extend(self._marked())

    def _extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Inert):
            target = target.elements
        if not isinstance(target, list):
            raise TypeError(f"elements for a {type(target).__name__}")
        target.extend(values)

    def _additems(self, arg: Any) -> None:
        values, target = self._marked(), self._stack[-1]
        require_keys(values)
        if isinstance(target, Inert):
            target.elements.extend(values)
        elif isinstance(target, set):
            target.update(values)
        else:
            raise TypeError(f"elements for a {type(target).__name__}")

    def _setitem(self, arg: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def _setitems(self, arg: Any) -> None:
        self._set(self._marked())

    def _set(self, flat: list[Any]) -> None:
        target, pairs = self._stack[-1], list(zip(flat[::2], flat[1::2], strict=True))
        require_keys(flat[::2])
        if isinstance(target, Inert):
            target.items.extend(pairs)
        elif isinstance(target, dict):
            target.update(pairs)
        else:
            raise TypeError(f"items for a {type(target).__name__}")

    # --------------------------------------------------------------------------------------------------------------- objects

    def _global(self, arg: str) -> None:
        self._stack.append(constant(_named(arg)))

    def _stack_global(self, arg: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError("a name that is no text")
        self._stack.append(constant(Global(module, name)))

    def _reduce(self, arg: Any) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        self._make(function, args, constructs=False)

    def _inst(self, arg: str) -> None:
        args = self._marked()
        self._make(_named(arg), tuple(args), constructs=False)

    def _obj(self, arg: Any) -> None:
        kind, *args = self._marked()
        self._make(kind, tuple(args), constructs=False)

    def _newobj(self, arg: Any) -> None:
        args, kind = self._stack.pop(), self._stack.pop()
        self._make(kind, args, constructs=True)

    def _newobj_ex(self, arg: Any) -> None:
        keywords, args, kind = self._stack.pop(), self._stack.pop(), self._stack.pop()
        self._make(kind, (args, keywords) if keywords else args, constructs=True)

    def _make(self, kind: Any, args: Any, *, constructs: bool) -> None:
        if not isinstance(kind, Global) or not isinstance(args, tuple):
            raise TypeError(f"a call of a {type(kind).__name__}")
        self._stack.append(call(kind, args, self._budget, constructs=constructs))

    def _build(self, arg: Any) -> None:
        """The state of an object. That of a dict is attributes beside its items (torch's `_metadata`), which nobody needs."""
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif isinstance(target, np.ndarray):
            fill_array(target, state, self._budget)
        elif isinstance(target, NumpyType):
            if state[1] not in ("<", ">", "=", "|"):
                raise ValueError("an order of bytes that is none")
            target.order = state[1]
        elif not isinstance(target, (dict, Tensor)):
            raise TypeError(f"a state for a {type(target).__name__}")

    def _persistent_text(self, arg: str) -> None:
        self._stack.append(self._load(arg))

    def _persistent(self, arg: Any) -> None:
        self._stack.append(self._load(self._stack.pop()))


def _named(text: str) -> Global:
    module, name = text.split(" ", 1)
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return Global(module, name)


ACTIONS: dict[str, Callable[[Machine, Any], None]] = {
    "MARK": Machine._mark,
    "POP": Machine._pop,
    "POP_MARK": Machine._pop_mark,
    "DUP": Machine._dup,
    "TUPLE": Machine._tuple,
    "TUPLE1": lambda machine, arg: machine._short_tuple(1),
    "TUPLE2": lambda machine, arg: machine._short_tuple(2),
    "TUPLE3": lambda machine, arg: machine._short_tuple(3),
    "LIST": Machine._list,
    "DICT": Machine._dict,
    "FROZENSET": Machine._frozenset,
    "APPEND": Machine._append,
    "APPENDS": Machine._appends,
    "ADDITEMS": Machine._additems,
    "SETITEM": Machine._setitem,
    "SETITEMS": Machine._setitems,
    "GLOBAL": Machine._global,
    "STACK_GLOBAL": Machine._stack_global,
    "REDUCE": Machine._reduce,
    "INST": Machine._inst,
    "OBJ": Machine._obj,
    "NEWOBJ": Machine._newobj,
    "NEWOBJ_EX": Machine._newobj_ex,
    "BUILD": Machine._build,
    "PERSID": Machine._persistent_text,
    "BINPERSID": Machine._persistent,
}
