"""Parameters, FLOPs and saved bytes of what embeds and predicts a code (`ibq/models/heads.py`), from the config alone.

Of the plain head V C parameters in the table and as many in the head; of the others, with K parts of sizes V_k, C
channels and T tokens, as it is written below. The inner transformer's blocks are counted by `inner_config`.
"""

from dataclasses import dataclass, replace

from ibq.models.heads import MaskedBitsHeadConfig, PlainHeadConfig
from ibq.models.transformer import TransformerConfig
from ibq.models.transformer_blocks import hidden_width


@dataclass(frozen=True, kw_only=True)
class HeadFlops:
    """FLOPs of one image's head and embedding, without the inner transformer."""

    forward: int
    inputs: int = 0  # of them, products whose input has no gradient: their backward pass costs as much, not twice
    recomputed: int = 0  # in the backward pass


def inner_config(config: TransformerConfig) -> TransformerConfig | None:
    """The inner transformer as one of its own, over all images' tokens: T rows of K; None where there is none."""
    if config.head.kind != "factorised":
        return None
    return replace(
        config,
        grids=((config.num_tokens, len(config.digits)),),
        depth=config.head.layers,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        width=config.model_width,
        adaln=False,
        shared_adaln=False,
        checkpoint_every=1,
        checkpoint_selective=False,
        head=PlainHeadConfig(),
    )


def table_parameters(config: TransformerConfig) -> int:
    """Of the embedding of codes."""
    width, digits = config.model_width, config.digits
    if config.head.kind in ("plain", "factorised"):
        return sum(digits) * width
    return (len(digits) + 1) * width


def head_parameters(config: TransformerConfig) -> int:
    """Of the head, without an inner transformer."""
    width, digits = config.model_width, config.digits
    if config.head.kind in ("plain", "factorised"):
        return sum(digits) * width
    bits = len(digits)
    if not isinstance(config.head, MaskedBitsHeadConfig):
        return bits * width + bits
    own, layers = config.head.width or width, config.head.layers
    layer = own + 3 * own * width + 3 * own + 3 * own * hidden_width(own)
    return 2 * bits * own + own + layers * layer + own + own * bits + bits


def largest_matrices(config: TransformerConfig) -> list[int]:
    """Elements of the largest matrices of the table and the head."""
    width, digits = config.model_width, config.digits
    sizes = [max(digits) * width]
    if config.head.kind == "bits":
        sizes = [len(digits) * width]
    if isinstance(config.head, MaskedBitsHeadConfig):
        own = config.head.width or width
        sizes = [len(digits) * max(width, 2 * own), 3 * own * width, own * hidden_width(own)]
    return sizes


def head_flops(config: TransformerConfig) -> HeadFlops:
    """FLOPs of one image.

    Plain and factorised: 2 T C sum(V_k), and as much again for the logits of the backward pass. Bits: the embedding's
    2 (T - 1) D C, the head's 2 T C D. Masked bits, with W channels and L layers: 2 T (2 D W + L (3 C W + 3 W F) + W D)
    """
    tokens, width, digits = config.num_tokens, config.model_width, config.digits
    if config.head.kind in ("plain", "factorised"):
        logits = 2 * tokens * width * sum(digits)
        return HeadFlops(forward=logits, recomputed=logits)
    bits = len(digits)
    table = 2 * (tokens - 1) * bits * width
    if not isinstance(config.head, MaskedBitsHeadConfig):
        return HeadFlops(forward=table + 2 * tokens * width * bits, inputs=table)
    own = config.head.width or width
    inputs = 2 * tokens * 2 * bits * own
    layers = 2 * tokens * config.head.layers * (3 * width * own + 3 * own * hidden_width(own))
    return HeadFlops(forward=table + inputs + layers + 2 * tokens * own * bits, inputs=table + inputs)


def head_bytes(config: TransformerConfig, compute: int, root: int) -> dict[str, int]:
    """Bytes that the backward pass of one image needs: name -> bytes, without the final norm and the inner blocks.

    `compute`: of an element of a product's input, `root`: of the stream before the head.
    """
    tokens, width, parts = config.num_tokens, config.model_width, len(config.digits)
    if config.head.kind in ("plain", "factorised"):
        return {"head input": root * tokens * parts * width, "log-sum-exp of logits": 2 * 4 * tokens * parts}
    signs = compute * (tokens - 1) * parts
    found = {"signs of the embedding": signs, "bits' log odds and signs": 2 * 4 * tokens * parts}
    if not isinstance(config.head, MaskedBitsHeadConfig):
        return found | {"head input": compute * tokens * width}
    own = config.head.width or width
    hidden = hidden_width(own)
    # A layer's norm in float32 and its rounding, modulation, gated product with its factors, and output.
    layer = tokens * (4 * 2 * own + 4 + compute * own + 2 * compute * 3 * own + 4 * compute * hidden + compute * own)
    return found | {
        "masked bits": compute * tokens * 2 * parts,
        "head input and its activation": config.head.layers * (root + compute) * tokens * width,
        "layers of the head": config.head.layers * layer,
        "last norm": tokens * own * (4 + 4 + compute),
    }
