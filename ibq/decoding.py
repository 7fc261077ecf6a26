"""A transformer made ready for drawing codes: its weights in one precision, laid out for a number of rows."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibq.models.heads import Chooser
from ibq.models.transformer import Condition, Grid, KVCache, Transformer, TransformerConfig
from ibq.models.transformer_blocks import Head
from ibq.ops.backend import missing_for_compile
from ibq.sampler import Precision, SamplerConfig, check_precision

WIDEST = 8192  # channels that a program of Triton's has in one row
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
CPU_ROWS, MOST_ROWS = 16, 256  # images drawn together by default; beyond the second an image hardly gets cheaper
MEMORY_SHARE = 0.5  # of a GPU, for what a block's images take: the rest is for weights, pixels and other processes


def settle(config: SamplerConfig, model: TransformerConfig | None, device: torch.device) -> SamplerConfig:
    """The settings with what "auto" means for a model on a device, and the grid of codes.

    The CPU has fp32 and 16 rows; a GPU bf16 and up to 256 rows, the largest power of two whose images take half of its
    memory. It does not depend on what else is there at the moment: the same command gives the same images again. The
    model may be None where the rows are a number, and the grid stays open then.
    Errors: ValueError for filters where codes are drawn bit by bit, and for a grid beyond the positions that a model
    of random order has embeddings for.
    """
    if model is not None:
        if config.filtered and max(model.digits) == 2:
            name = "top_k" if config.top_k else "top_p"
            raise ValueError(f"{name}: this transformer draws bits (head: {model.head.kind}); use temperature instead")
        config = replace(config, grid=tuple(config.grid or model.code_grids[0]))
        if model.order == "random" and any(map(int.__gt__, config.grid, model.positions)):
            shown, known = (" x ".join(map(str, grid)) for grid in (config.grid, model.positions))
            raise ValueError(f"grid: {shown} codes are beyond the {known} that a model of random order knows; use less")
    on_gpu = device.type == "cuda"
    if config.precision == "auto":
        config = replace(config, precision="bf16" if on_gpu else "fp32")
    if config.rows_per_block == "auto":
        rows = CPU_ROWS
        if on_gpu:
            memory = MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory
            rows = min(MOST_ROWS, 1 << max(0, int(memory / bytes_a_row(config, model)).bit_length() - 1))
        config = replace(config, rows_per_block=rows)
    return config


def bytes_a_row(config: SamplerConfig, model: TransformerConfig) -> int:
    """What an image takes while it is drawn: its keys and values, and what a draw makes of its logits.

    An image of the model's largest grid, so that all its grids are drawn with the same rows.
    """
    tokens = max(model.num_tokens, math.prod(config.grid or (1,)))
    sequences, width = 2 if config.guided else 1, DTYPES[config.precision].itemsize
    cache = 2 * model.depth * model.num_kv_heads * tokens * model.head_dim * width
    sorting, values = 24 if config.top_p < 1 else 0, max(model.digits)
    return sequences * (cache + 4 * values) + (24 + sorting) * values


class Decoder:
    """Decodes `rows` sequences at a time; the transformer that it is made from stays as it is, and may be let go.

    `precision`: fp32; or bf16 weights, cache and activations, with norms and rotations in float32. `fused`: Triton's
    kernels run between the products and take positions from the device, so that a step can be captured as a graph.
    Errors: ValueError for a precision that does not exist.
    """

    def __init__(self, transformer: Transformer, precision: Precision, rows: int):
        check_precision(precision)
        self.precision, self.rows, self.config = precision, rows, transformer.config
        self.dtype, self.device = DTYPES[precision], transformer.class_emb.weight.device
        self.null_class = transformer.null_class
        self._transformer = _prepared(transformer, self.dtype, rows)
        self.fused = can_fuse(self.config, self.device)
        self.drawing = None  # the block of `ibq/sampling.py` that draws with it

    def condition(self, classes: Tensor) -> Condition:
        """Everything that decoding needs of classes [rows]."""
        return self._transformer.condition(classes)

    def new_cache(self, grid: Grid | None = None) -> KVCache:
        """An empty cache for a grid of codes (default: the model's first)."""
        return self._transformer.new_cache(self.rows, self.dtype, self.device, grid=grid)

    def target_rows(self, grid: Grid, order: Tensor | None = None) -> Tensor | None:
        """What is added to the inputs of the steps, one row [C] each; see `Transformer.target_rows`."""
        return self._transformer.target_rows(grid, order)

    def rotations(self, grid: Grid, order: Tensor | None = None) -> Tensor:
        """How the queries and keys of the steps turn, one row [head_dim / 2] each; see `Transformer.rotations`."""
        return self._transformer.rotations(grid, order)

    def embed(self, codes: Tensor, targets: Tensor | None, position: int | Tensor, out: Tensor) -> None:
        """Put into `out` [n, rows, C] n times what the step after `position` takes, for its codes [rows].

        `targets`: of `target_rows`.
        """
        tok_emb = self._transformer.tok_emb
        if targets is None:
            out.copy_(tok_emb(codes))
        elif isinstance(position, Tensor) and isinstance(tok_emb, nn.Embedding):
            from ibq.ops import triton_decode_step  # only where Triton is installed

            triton_decode_step.embed(codes, tok_emb.weight, targets, position, out)
        else:
            target = targets[position + 1]  # [C], or [1, C] by a position on the device
            torch.add(tok_emb(codes), target.expand_as(out), out=out)

    def step(self, x: Tensor, condition: Condition, cache: KVCache, position: int | Tensor) -> Tensor:
        """Logits [rows, V], in the decoder's precision, of the code at `position`; see `Transformer.decode`."""
        return self._transformer.decode(x, condition, cache, position)

    def draw(self, decoded: Tensor, condition: Condition, chooser: Chooser) -> Tensor:
        """The codes that follow from the result of `step`; see `Transformer.draw`."""
        return self._transformer.draw(decoded, condition, chooser)

    def weight_bytes(self) -> int:
        """Bytes of the weights that every step reads: those of the blocks without their modulations, and the head."""
        weights = [layer.weight for layer in self._transformer.modules() if isinstance(layer, PackedLinear)]
        weights += self._transformer.head.parameters()  # of one that is not packed
        return sum(weight.numel() * weight.element_size() for weight in weights)


def can_fuse(config: TransformerConfig, device: torch.device) -> bool:
    """Whether Triton's kernels take a model of this kind there."""
    powers_of_two = config.head_dim & (config.head_dim - 1) == 0
    return device.type == "cuda" and powers_of_two and config.model_width <= WIDEST and not missing_for_compile("cuda")


def _prepared(transformer: Transformer, dtype: torch.dtype, rows: int) -> Transformer:
    """A transformer that shares what does not change, with packed linear layers where every step needs them."""
    with torch.device("meta"):
        copied = Transformer(transformer.config)
    copied.load_state_dict(
        {name: value.detach().to(dtype) for name, value in transformer.state_dict().items()}, assign=True
    )
    copied.eval().requires_grad_(False)
    for block in copied.units():
        gate, up = block.feed_forward.w1.weight, block.feed_forward.w3.weight
        block.feed_forward.w13 = PackedLinear(torch.cat([gate, up]), None, rows)
        del block.feed_forward.w1, block.feed_forward.w3
        for owner, name in (*((block.attention, name) for name in ("wqkv", "wo")), (block.feed_forward, "w2")):
            owner.register_module(name, PackedLinear(getattr(owner, name).weight, None, rows))
    heads = [(copied, "head")] if isinstance(copied.head, Head) else []
    if transformer.config.head.kind == "factorised":
        heads = [(copied.head.parts, str(number)) for number in range(len(copied.head.parts))]
    for owner, name in heads:
        owner.register_module(name, PackedLinear(getattr(owner, name).weight, None, rows))
    return copied


# --- Products of few rows with fixed weights ---
#
# They are bound by reading the weight. On the CPU the plain product of so few rows reads it several times slower than
# memory allows; oneDNN, given the number of rows, lays it out once as it reads it best.


class PackedLinear(nn.Module):
    """y = x W^T + b for x [rows, ..., inputs] in the precision of the weight [outputs, inputs]; for use only."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int):
        super().__init__()
        self.packed = can_pack(weight)
        weight = weight.detach()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows) if self.packed else weight
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        if x.dtype != self.weight.dtype:
            x = x.to(self.weight.dtype)
        if not self.packed:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can take a weight of this kind."""
    if not weight.is_cpu or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32
