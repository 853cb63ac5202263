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


class Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph, self.before = graph, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        written = [
            value
            for place, argument in enumerate(function._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
            for value in tensors_in(args[place] if place < len(args) else kwargs.get(argument.name))
        ]
        for value in written:
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


class Stream:
    def wait_stream(self, other):
        pass


def play_graphs_on_the_cpu(monkeypatch):
    """-> a list that gets every graph that is made."""
    graphs = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs.append(Graph()) or graphs[-1])
    monkeypatch.setattr(torch.cuda, "graph", Graph.captured)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    return graphs
