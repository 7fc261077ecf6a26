"""A block of images while its codes are drawn: everything a step reads and writes stays in its place.

So a step is the same at every position. On CUDA it is captured once as a graph and replayed for every code: the host
launches one thing a step and waits for nothing.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ibq.config_yaml import one_line
from ibq.decoding import Decoder
from ibq.models.transformer import Condition
from ibq.noise import uniforms
from ibq.progress import say
from ibq.sampler import SamplerConfig, check_filter


class Drawing:
    """The codes [rows, T] of one block after the other, all drawn with the same settings."""

    def __init__(self, decoder: Decoder, config: SamplerConfig, graph: "type[StepGraph] | None" = None):
        self._kind_of_graph = graph or StepGraph
        self.decoder, self.config, self.rows = decoder, config, config.rows_per_block
        device, tokens = decoder.device, decoder.config.num_tokens
        self.codes = torch.zeros(self.rows, tokens, dtype=torch.int64, device=device)
        self._numbers = torch.zeros(self.rows, tokens, dtype=torch.float64, device=device)
        self._scales = torch.tensor(config.scales(tokens), device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._cache = decoder.new_cache()
        self._condition: Condition | None = None
        self._x: Tensor | None = None  # what the next step takes, [config.rows, C]
        self._graph: StepGraph | None = None
        self._wants_graph = decoder.fused

    def begin(self, classes: Sequence[int], seeds: Sequence[int]) -> None:
        """Start a block of up to `rows` images; rows that are left over draw images of no class."""
        padding, null = self.rows - len(classes), self.decoder.null_class
        rows = [int(label) for label in classes] + [null] * padding + [null] * (self.config.rows - self.rows)
        self._put(self.decoder.condition(torch.tensor(rows, device=self.decoder.device)))
        self._numbers.copy_(uniforms([*seeds, *[0] * padding], self.codes.shape[1], self.decoder.device))
        self._to_start()
        if self._wants_graph:
            self._wants_graph = False
            self._capture()
            self._to_start()

    def advance(self, position: int) -> None:
        """Draw the codes at `position`, which is one more at every call, and put them into `codes`."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._step(self._position if self.decoder.fused else position)

    def _put(self, condition: Condition) -> None:
        if self._condition is None:
            self._condition, self._x = condition, torch.empty_like(condition.embedding)
            return
        for kept, new in zip(self._condition.tensors(), condition.tensors(), strict=True):
            kept.copy_(new)

    def _to_start(self) -> None:
        self._position.zero_()
        self._x.copy_(self._condition.embedding)

    def _step(self, position: int | Tensor) -> None:
        logits = self.decoder.step(self._x, self._condition, self._cache, position)
        if self.config.guided:
            cond, uncond = logits.chunk(2)
            logits = uncond + self._scales.index_select(0, self._position) * (cond - uncond)
        drawn = draw(logits, self._numbers.index_select(1, self._position), self.config)
        self.codes.index_copy_(1, self._position, drawn)
        embedded = self.decoder.embed(drawn[:, 0])
        self._x.view(-1, *embedded.shape).copy_(embedded)  # with and without class
        self._position += 1

    def _capture(self) -> None:
        try:
            self._graph = self._kind_of_graph(lambda: self._step(self._position), self.decoder.device)
        except RuntimeError as error:
            say(f"note: no CUDA graph ({one_line(error)}): steps are launched one operator after the other")


class StepGraph:
    """A step as a CUDA graph, after one on a stream of its own that compiles kernels and finds their workspaces."""

    def __init__(self, step: Callable[[], None], device: torch.device):
        with torch.cuda.device(device):
            stream, own = torch.cuda.current_stream(), torch.cuda.Stream()
            own.wait_stream(stream)
            with torch.cuda.stream(own):
                step()
            stream.wait_stream(own)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                step()

    def replay(self) -> None:
        """Launch it."""
        self._graph.replay()


def draw(logits: Tensor, numbers: Tensor, config: SamplerConfig) -> Tensor:
    """One code [R, 1] per row of logits [R, V], with the row's random number of [R, 1]."""
    if config.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return pick(filter_logits(logits / config.temperature, config.top_k, config.top_p), numbers)


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits [..., V] with -inf where top-k, then top-p (nucleus, arXiv 1904.09751) filtering removes a code.

    Top-k keeps all that are at least the k-th largest (ties stay). Top-p keeps the likeliest codes up to and
    including the one with which they exceed the probability p, so at least one; of equal logits the lower
    code comes first.
    Errors: ValueError for a negative top_k or a top_p outside [0, 1].
    """
    check_filter(top_k, top_p)
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, dims=-1)
        before[..., 0] = 0.0  # the likeliest code always stays
        removed = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before > top_p)
        logits = logits.masked_fill(removed, -torch.inf)
    return logits


def pick(logits: Tensor, numbers: Tensor) -> Tensor:
    """Codes [R, n] from softmax(logits [R, V]), each where the cumulative probability passes its number of [R, n].

    numbers are float64 in (0, 1), and so are the sums: those of 262,144 float32 would lose the small probabilities.
    A code whose logit is -inf is never drawn; of NaN the last code is, as there is no other that can be embedded.
    """
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True)
    return drawn.clamp_max_(logits.shape[-1] - 1)
