"""Sampling codes from the transformer: cached decoding, classifier-free guidance, top-k and top-p.

A block of images is drawn with everything that a step reads and writes in its place. So a step is the same at every
position: on CUDA it is captured once as a graph and replayed for every code, and the host waits for nothing.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ibq.config_yaml import one_line
from ibq.decoding import Decoder, settle
from ibq.editing import Edit
from ibq.models.transformer import Condition, Transformer
from ibq.noise import send, uniforms
from ibq.ops.backend import own_stream
from ibq.progress import say
from ibq.sampler import LARGEST_SEED, SamplerConfig, check_filter


def decoder_for(transformer: Transformer, config: SamplerConfig) -> Decoder:
    """What draws with these settings, for several calls of `sample_codes`."""
    config = settle(config, transformer.config, transformer.class_emb.weight.device)
    return Decoder(transformer, config.precision, config.rows)


def settled_for(transformer: Transformer | Decoder, config: SamplerConfig) -> SamplerConfig:
    """The settings with what "auto" means for a transformer where it is, or for a decoder that has been made.

    Errors: ValueError for settings that a decoder was not made for.
    """
    if isinstance(transformer, Transformer):
        return settle(config, transformer.config, transformer.class_emb.weight.device)
    own = {"rows_per_block": transformer.rows // (2 if config.guided else 1), "precision": transformer.precision}
    config = replace(config, **{name: value for name, value in own.items() if getattr(config, name) == "auto"})
    config = settle(config, transformer.config, transformer.device)
    if (config.rows, config.precision) != (transformer.rows, transformer.precision):
        raise ValueError(
            f"rows_per_block: these settings take {config.rows} sequences in {config.precision}, but the decoder was "
            f"made for {transformer.rows} in {transformer.precision}; make one for them by decoder_for"
        )
    return config


@torch.inference_mode()
def sample_codes(
    transformer: Transformer | Decoder,
    classes: Sequence[int],
    seeds: Sequence[int],
    config: SamplerConfig,
    progress: Callable[[int, int], None] | None = None,
    edit: Edit | None = None,
) -> Tensor:
    """Draw one image's codes per class and seed, [N, h, w] int64 on the CPU; with an `edit` only those not kept.

    An image depends on weights, class, seed and `config` only (on one device), never on the images it is drawn with:
    blocks have a fixed number of rows, and an image's random numbers are a function of its seed. Runs on the device of
    the weights. A transformer is made ready first, which takes a while for a large one: `decoder_for` does it once for
    many calls. `progress` is called with (images done, images) after every block.
    Errors: ValueError for classes or seeds out of range, or not one seed per class, and those of `Edit.fitted`.
    """
    blocks, done = [], 0
    for codes in sample_blocks(transformer, classes, seeds, config, edit):
        blocks.append(codes.cpu())
        done += len(codes)
        if progress is not None:
            progress(done, len(classes))
    codes = torch.cat(blocks)
    with torch.inference_mode(False):
        return codes.clone()  # an ordinary tensor


@torch.inference_mode()
def sample_blocks(
    transformer: Transformer | Decoder,
    classes: Sequence[int],
    seeds: Sequence[int],
    config: SamplerConfig,
    edit: Edit | None = None,
) -> Iterator[Tensor]:
    """The same codes, block after block: [n, h, w] int64 on the device, which may still be drawing them.

    Nothing waits for the device, so that what is done with one block can be prepared while it is drawn.
    Errors, when the first block is asked for: those of `sample_codes`.
    """
    config = _settled_request(transformer, classes, seeds, config, edit)
    decoder = transformer if isinstance(transformer, Decoder) else decoder_for(transformer, config)
    if not len(classes):
        yield torch.empty(0, *config.grid, dtype=torch.int64, device=decoder.device)
    for start in range(0, len(classes), config.rows_per_block):
        part = slice(start, start + config.rows_per_block)
        own = None if edit is None else edit.of(part)
        for codes in _sample_steps(decoder, classes[part], seeds[part], config, own):  # noqa: B007
            pass
        codes = codes[: len(classes[part])]  # copied: the next block is drawn in its place
        yield codes.unflatten(1, config.grid).clone() if edit is None else edit.in_raster(codes)


@torch.inference_mode()
def sample_rows(
    transformer: Transformer | Decoder,
    classes: Sequence[int],
    seeds: Sequence[int],
    config: SamplerConfig,
    edit: Edit | None = None,
) -> Iterator[Tensor]:
    """Draw one block of images and watch them grow: [n, r, w] int64 on the CPU after each row r = 1 ... h of codes.

    The last of them is what `sample_codes` gives for the same request. With an `edit` each is [n, h, w], after so many
    codes as a row has: what is not drawn yet is as it was.
    Errors, when the first row is asked for: those of `sample_codes`, and ValueError for more images than
    `rows_per_block`.
    """
    config = _settled_request(transformer, classes, seeds, config, edit)
    if not 0 < len(classes) <= config.rows_per_block:
        raise ValueError(f"classes: {len(classes)} images are not one block; give 1 to {config.rows_per_block}")
    decoder = transformer if isinstance(transformer, Decoder) else decoder_for(transformer, config)
    width = config.grid[1]
    for count, codes in enumerate(_sample_steps(decoder, classes, seeds, config, edit), start=1):
        if count % width == 0:
            codes = codes[: len(classes)].cpu()
            with torch.inference_mode(False):  # for an ordinary tensor
                grown = codes[:, :count].unflatten(1, (-1, width)) if edit is None else edit.in_raster(codes)
                grown = grown.clone()
            yield grown


def _sample_steps(
    decoder: Decoder, classes: Sequence[int], seeds: Sequence[int], config: SamplerConfig, edit: Edit | None
) -> Iterator[Tensor]:
    """The codes [rows_per_block, T] in the order they are drawn in, the same tensor after each of the T draws.

    Those to come are undefined, or as they were before an edit.
    """
    drawing, decoder.drawing = decoder.drawing, None  # whoever asks before the last code is drawn gets another
    if drawing is None or drawing.config != config:
        drawing = None  # its memory is for the next one
        drawing = Drawing(decoder, config)
    try:
        drawing.begin(decoder, classes, seeds, edit)
        for position in range(drawing.codes.shape[1]):
            drawing.advance(decoder, position)
            yield drawing.codes
    finally:
        decoder.drawing = drawing


def _settled_request(
    transformer: Transformer | Decoder,
    classes: Sequence[int],
    seeds: Sequence[int],
    config: SamplerConfig,
    edit: Edit | None,
) -> SamplerConfig:
    """What the settings mean for the request; ValueError for an impossible one."""
    if len(classes) != len(seeds):
        raise ValueError(f"seeds: {len(seeds)} for {len(classes)} classes; give one seed per image")
    for label in classes:
        if not 0 <= label <= transformer.null_class:
            raise ValueError(
                f"classes: {label} is out of range; use 0 to {transformer.null_class - 1}, "
                f"or {transformer.null_class} for no class"
            )
    for seed in seeds:
        if not 0 <= seed <= LARGEST_SEED:
            raise ValueError(f"seeds: {seed} is out of range; use 0 to {LARGEST_SEED}")
    if edit is not None:
        config = edit.fitted(config, transformer.config, len(classes))
    return settled_for(transformer, config)


# --- A block ---


class Drawing:
    """The codes [rows, T] of one block after the other, all drawn with the same settings by the same decoder.

    Of one grid, too, and so is its graph. It belongs to the decoder, and so does not hold it: both are let go at once.
    A block may be in an order of its own: what a step takes by its position is put into its place before the first.
    """

    def __init__(self, decoder: Decoder, config: SamplerConfig, graph: "type[StepGraph] | None" = None):
        self._kind_of_graph = graph or StepGraph
        self.config, self.rows = config, config.rows_per_block
        device, tokens = decoder.device, math.prod(config.grid)
        self.codes = torch.zeros(self.rows, tokens, dtype=torch.int64, device=device)
        self._draws = len(decoder.config.digits)  # of one code
        self._numbers = torch.zeros(self._draws, self.rows, tokens, dtype=torch.float64, device=device)
        self._scales = torch.tensor(config.scales(tokens), device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._cache = decoder.new_cache(config.grid)
        self._targets = decoder.target_rows(config.grid)
        if self._targets is not None:
            self._cache = replace(self._cache, rope=decoder.rotations(config.grid))
        self._given: Tensor | None = None  # the codes [rows, T] of an edit in its order, the first `_kept` to stay
        self._kept = 0
        self._condition: Condition | None = None
        self._x: Tensor | None = None  # what the next step takes, [config.rows, C]
        self._graph: StepGraph | None = None
        self._wants_graph = self._fused = decoder.fused

    def begin(self, decoder: Decoder, classes: Sequence[int], seeds: Sequence[int], edit: Edit | None = None) -> None:
        """Start a block of up to `rows` images; rows that are left over draw images of no class."""
        padding, null = self.rows - len(classes), decoder.null_class
        rows = [int(label) for label in classes] + [null] * padding + [null] * (self.config.rows - self.rows)
        self._put(decoder.condition(send(rows, decoder.device)))
        numbers = uniforms([*seeds, *[0] * padding], self.codes.shape[1] * self._draws, decoder.device)
        self._numbers.copy_(numbers.unflatten(1, (-1, self._draws)).permute(2, 0, 1))
        self._arrange(decoder, edit)
        self._to_start()
        if self._wants_graph:
            self._wants_graph = False
            self._capture(decoder)
            self._to_start()

    def advance(self, decoder: Decoder, position: int) -> None:
        """Draw the codes at `position`, which is one more at every call, and put them into `codes`."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._step(decoder, self._position if decoder.fused else position)
        if position < self._kept:  # beside the graph, which serves every block
            given = self._given[:, position]
            self.codes[:, position] = given
            decoder.embed(given, self._targets, position, self._x.view(-1, self.rows, self._x.shape[1]))

    def _arrange(self, decoder: Decoder, edit: Edit | None) -> None:
        """Put what steps take by their position into the block's order; an image's noise stays with the place."""
        self._kept, self._given, order = 0, None, None
        if edit is not None:
            order = send(edit.order, decoder.device)
            self._kept, self._given = edit.kept, send(edit.in_order(self.rows), decoder.device)
            self._numbers.copy_(self._numbers[..., order])
        if self._targets is not None:
            self._targets.copy_(decoder.target_rows(self.config.grid, order))
            self._cache.rope.copy_(decoder.rotations(self.config.grid, order))

    def _put(self, condition: Condition) -> None:
        if self._condition is None:
            self._condition, self._x = condition, torch.empty_like(condition.embedding)
            return
        for kept, new in zip(self._condition.tensors(), condition.tensors(), strict=True):
            kept.copy_(new)

    def _to_start(self) -> None:
        self._position.zero_()
        if self._given is not None:
            self.codes.copy_(self._given)
        self._x.copy_(self._condition.embedding)
        if self._targets is not None:
            self._x += self._targets[0]

    def _step(self, decoder: Decoder, position: int | Tensor) -> None:
        self._fused = decoder.fused
        decoded = decoder.step(self._x, self._condition, self._cache, position)
        drawn = decoder.draw(decoded, self._condition, self)
        self.codes.index_copy_(1, self._position, drawn[:, None])
        both = self._x.view(-1, self.rows, self._x.shape[1])  # with and without class
        decoder.embed(drawn, self._targets, position, both)
        self._position += 1

    def code(self, logits: Tensor, number: int) -> Tensor:
        """Codes [rows] at the position, or a part of theirs, from the logits [config.rows, V] of a step."""
        config, scales, numbers = self.config, self._scales if self.config.guided else None, self._numbers[number]
        if self._fused and config.temperature > 0 and not config.filtered:
            from ibq.ops import triton_draw  # only where Triton is installed

            return triton_draw.draw(logits, scales, numbers, self._position, config.temperature)
        return draw(self._guided(logits), numbers.index_select(1, self._position), config)[:, 0]

    def bits(self, log_odds: Tensor, first: int) -> Tensor:
        """Bits [rows, m] of the codes at the position, by log odds [config.rows, m] that are independent."""
        numbers = self._numbers[first : first + log_odds.shape[1]].index_select(2, self._position)[..., 0].t()
        return draw_bits(self._guided(log_odds), numbers, self.config)

    def _guided(self, logits: Tensor) -> Tensor:
        """In float32, with class and without joined by the guidance of the position."""
        logits = logits.float()
        if not self.config.guided:
            return logits
        cond, uncond = logits.chunk(2)
        return uncond + self._scales.index_select(0, self._position) * (cond - uncond)

    def _capture(self, decoder: Decoder) -> None:
        try:
            self._graph = self._kind_of_graph(lambda: self._step(decoder, self._position), decoder.device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of the driver, the compiler, or an operator that cannot be captured
            decoder.fused = False
            say(f"note: no CUDA graph ({one_line(error)}): steps are launched one operator after the other")


class StepGraph:
    """A step as a CUDA graph, after one that compiles kernels and finds their workspaces."""

    def __init__(self, step: Callable[[], None], device: torch.device):
        with torch.cuda.device(device):
            stream, own = torch.cuda.current_stream(), own_stream("capture", device)
            self._graph = torch.cuda.CUDAGraph()
            try:
                own.wait_stream(stream)
                with torch.cuda.stream(own):
                    step()
                stream.wait_stream(own)
                # Of this device's stream, and with what other threads do meanwhile left out of it.
                with torch.cuda.graph(self._graph, stream=own, capture_error_mode="thread_local"):
                    step()
            finally:
                torch.cuda.set_stream(stream)  # which a capture that fails does not give back

    def replay(self) -> None:
        """Launch it."""
        self._graph.replay()


# --- A draw ---


def draw(logits: Tensor, numbers: Tensor, config: SamplerConfig) -> Tensor:
    """One code [R, 1] per row of logits [R, V], with the row's random number of [R, 1]."""
    if config.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return pick(filter_logits(logits / config.temperature, config.top_k, config.top_p), numbers)


def draw_bits(log_odds: Tensor, numbers: Tensor, config: SamplerConfig) -> Tensor:
    """Bits [R, m] by log odds [R, m], 1 where a random number of [R, m] passes the probability of 0."""
    if config.temperature == 0:
        return (log_odds > 0).long()
    return (numbers >= torch.sigmoid(-log_odds.double() / config.temperature)).long()


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
        before = _running_sum(ordered.softmax(-1), torch.float32).roll(1, dims=-1)
        before[..., 0] = 0.0  # the likeliest code always stays
        removed = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before > top_p)
        logits = logits.masked_fill(removed, -torch.inf)
    return logits


def pick(logits: Tensor, numbers: Tensor) -> Tensor:
    """Codes [R, n] from softmax(logits [R, V]), each where the cumulative probability passes its number of [R, n].

    numbers are float64 in (0, 1), and so are the sums: those of 262,144 float32 would lose the small probabilities.
    A code whose logit is -inf is never drawn; of NaN the last code is, as there is no other that can be embedded.
    """
    cumulative = _running_sum(logits.softmax(-1), torch.float64)
    drawn = torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True)
    return drawn.clamp_max_(logits.shape[-1] - 1)


def _running_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Of each row of [R, V]; CUDA adds up a single row, but not several, in an order that changes from call to call."""
    rows = x.expand(2, -1) if x.is_cuda and len(x) == 1 else x
    return rows.cumsum(-1, dtype=dtype)[: len(x)]
