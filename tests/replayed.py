"""CUDA graphs played on the CPU, so that a captured loop is tested where there is no card.

As on a card, a capture runs nothing (its changes are put back at its end), and a replay repeats the captured
operations on the captured memory, with Python's numbers as they were. The host reaches a replay only by writing into
that memory.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors_in(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def storage(tensor):
    return tensor.untyped_storage()._cdata


def written_by(function, args, kwargs):
    """The arguments that an operation writes into."""
    return [
        value
        for place, argument in enumerate(function._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
        for value in tensors_in(args[place] if place < len(args) else kwargs.get(argument.name))
    ]


def reach(tensor):
    """The numbers of a tensor's first byte and of that after its last."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (length * tensor.itemsize if tensor.numel() else 0)


class Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph, self.before = graph, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for value in written_by(function, args, kwargs):
            self.before.setdefault(id(value), (value, value.clone()))
        out = function(*args, **kwargs)
        taken = {storage(value) for value in tensors_in([args, kwargs])}
        fresh = [value if storage(value) not in taken else None for value in tensors_in(out)]
        self.graph.operations.append((function, args, kwargs, fresh))
        return out


class Graph:
    def __init__(self):
        self.operations, self.replays = [], 0

    @contextlib.contextmanager
    def captured(self):
        recorder = Recorder(self)
        with recorder:
            yield
        with torch.no_grad():
            for value, before in reversed(recorder.before.values()):
                value.copy_(before)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, args, kwargs, fresh in self.operations:
            for held, value in zip(fresh, tensors_in(function(*args, **kwargs))):
                if held is not None:
                    held.copy_(value)


class Actor:
    """A stream, or the host, with what it knows to have happened: for every actor, how many of its accesses."""

    def __init__(self, device=None):
        self.known = {self: 0}

    def learn(self, known):
        for actor, count in known.items():
            self.known[actor] = max(count, self.known.get(actor, 0))


class Stream(Actor):
    def wait_stream(self, other):
        self.learn(other.known)

    def wait_event(self, event):
        self.learn(event.known)


class Event:
    def __init__(self):
        self.known = {}

    def record(self):
        self.known = dict(Card.present.current.known)

    def synchronize(self):
        Card.present.host.learn(self.known)


class Card(TorchDispatchMode):
    """Streams as on a card: RuntimeError where two of them, or one and the host, use memory in no certain order.

    The operations run at once and in the host's order. Memory is followed from its first use on, and pinned memory
    that is written is written by the host.
    """

    present = None

    def __init__(self):
        super().__init__()
        self.host, self.current, self.pinned, self.accesses, self.kept = Actor(), Stream(), set(), {}, []

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def by_the_host(self):
        return self.stream(self.host)

    def pin(self, tensor):
        tensor = tensor.clone()
        self.pinned.add(storage(tensor))
        self.accesses.pop(storage(tensor), None)  # the copy was the host's
        return tensor

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        written = {storage(value) for value in written_by(function, args, kwargs)}
        if not written and any(value.alias_info is not None for value in function._schema.returns):
            return out  # a view
        used = tensors_in([args, kwargs, out])
        written |= {storage(value) for value in tensors_in(out)}
        self.kept.append(used)  # so that no other memory gets its name
        actor = self.host if written & self.pinned else self.current
        if actor is not self.host:
            actor.learn(self.host.known)  # the host asks for it now
        actor.known[actor] += 1
        if function is torch.ops.aten.index_select.default and args[1] == 0:  # reads nothing between its rows
            used[0] = args[0][args[2].min() : args[2].max() + 1]
        for value in used:
            (first, end), writes = reach(value), storage(value) in written
            accesses = self.accesses.setdefault(storage(value), [])
            for other, count, wrote, (start, stop) in accesses:
                if (wrote or writes) and first < stop and start < end and actor.known.get(other, 0) < count:
                    raise RuntimeError(f"{function} races: its memory is still in use")
            accesses.append((actor, actor.known[actor], writes, (first, end)))
        return out


def play_graphs_on_the_cpu(monkeypatch):
    """-> a list that gets every graph that is made."""
    graphs, card = [], Card()
    monkeypatch.setattr(Card, "present", card)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs.append(Graph()) or graphs[-1])
    monkeypatch.setattr(torch.cuda, "graph", Graph.captured)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: card.current)
    monkeypatch.setattr(torch.cuda, "stream", card.stream)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: card.pin(tensor))
    return graphs
