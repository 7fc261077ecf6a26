"""Counting the operators that a piece of code launches."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """Counts operators by name, of whatever runs within this context, backward passes included."""

    def __init__(self):
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names[function.overloadpacket.__name__] += 1
        return function(*arguments, **(keywords or {}))
