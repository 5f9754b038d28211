"""CUDA graphs: what the device does again and again is recorded once and replayed, so that the host launches one thing."""

from collections.abc import Callable

import torch


class Graphed:
    """A function of static tensors: on a GPU one CUDA graph, replayed; on a CPU a plain call.

    What it is called with, and what it returns, are the same tensors every time on a GPU.
    """

    def __init__(self, function: Callable, pool):
        self._function = function
        self._pool = pool
        self._graph = None
        self._result = None

    def __call__(self, *arguments):
        if self._pool is None:
            return self._function(*arguments)
        if self._graph is None:
            # Whatever is made once (workspaces of libraries, compiled code) is made now: a recording must not allocate it.
            self._function(*arguments)
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=self._pool):
                self._result = self._function(*arguments)
        self._graph.replay()
        return self._result
