"""Sampling with a KV cache and guidance against a textbook sampler on equal weights, and against memory bandwidth."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ibq.models.transformer_blocks as blocks
from ibq.config import UserError, load_section
from ibq.decoding import Decoder
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.progress import progress_bar
from ibq.sampler import PRECISIONS, SamplerConfig
from ibq.sampling import decoder_for, sample_codes
from ibq.training.run import set_up_torch
from tools.lib.bench.options import add_device
from tools.lib.bench.process import seconds_of

GUIDANCE = 2.0
PROBE_BYTES = 512 * 2**20  # of what is read to measure the bandwidth: far more than any cache


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this measurement."""
    add = parser.add_argument
    add("--config", default="yaml/b.yaml", help="config of a transformer run (default: %(default)s)")
    add("--images", type=int, default=4, help="drawn together, each with and without its class (default: 4)")
    add("--rounds", type=int, default=2, help="of all forms in turn; the best of each counts (default: 2)")
    add("--tokens", type=int, help="codes of an image that the textbook form draws (default: all)")
    add_device(parser)


class TextbookSampler:
    """The published structure, which stays as it is: the baseline.

    Every step computes all modulations from the class embedding again, turns queries and keys in float32, writes them
    to a float32 cache of the whole length and attends to all of it behind a mask; autocast gives products in bf16.
    """

    def __init__(self, transformer: Transformer):
        self.model, self.config = transformer, transformer.config

    @torch.no_grad()
    def sample(self, classes: Tensor, scale: float, tokens: int, generator: torch.Generator) -> Tensor:
        """Codes [N, tokens] of classes [N]."""
        model, cfg = self.model, self.config
        both = torch.cat([classes, torch.full_like(classes, model.null_class)])
        embedding = model.class_emb(both)
        shape = (cfg.depth, len(both), cfg.num_kv_heads, cfg.num_tokens, cfg.head_dim)
        keys, values = (torch.zeros(shape, device=classes.device) for _ in range(2))
        mask = torch.tril(torch.ones(cfg.num_tokens, cfg.num_tokens, dtype=torch.bool, device=classes.device))
        codes = torch.empty(len(classes), tokens, dtype=torch.int64, device=classes.device)
        x = embedding[:, None]
        for position in range(tokens):
            logits = self._step(x, embedding, keys, values, mask[position : position + 1], position).float()
            cond, uncond = logits.chunk(2)
            probabilities = (uncond + scale * (cond - uncond)).softmax(-1)
            codes[:, position] = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            x = model.tok_emb(codes[:, position].repeat(2))[:, None]
        return codes

    def _step(self, x: Tensor, embedding: Tensor, keys: Tensor, values: Tensor, mask: Tensor, position: int) -> Tensor:
        rope = self.model._rope(x)[position : position + 1]
        for number, block in enumerate(self.model.blocks):
            parts = block.modulation(self.model._block_condition(embedding))[:, :, None].unbind(1)
            gamma1, gamma2, scale1, scale2, shift1, shift2 = parts
            attention = block.attention
            qkv = attention.wqkv(block.attention_norm(x, scale1, shift1)).unflatten(-1, (-1, attention.head_dim))
            q, k, v = qkv.split([attention.heads, attention.kv_heads, attention.kv_heads], dim=2)
            q, k = blocks.rotate(q.float(), rope), blocks.rotate(k.float(), rope)
            keys[number][:, :, position] = k[:, 0]
            values[number][:, :, position] = v[:, 0].float()
            q = q.transpose(1, 2)
            out = F.scaled_dot_product_attention(q, keys[number], values[number], attn_mask=mask, enable_gqa=True)
            x = x + gamma1 * attention.wo(out.transpose(1, 2).flatten(2))
            x = x + gamma2 * block.feed_forward(block.ffn_norm(x, scale2, shift2))
        head = self.model.head_nm
        return self.model.head(head(x, head.modulation(embedding))[:, 0])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures, as they are written to JSON."""
    set_up_torch(training=False)
    device = torch.device(arguments.device)
    config = load_section(TransformerConfig, arguments.config, "model")
    tokens = config.num_tokens if arguments.tokens is None else arguments.tokens
    if not 1 <= tokens <= config.num_tokens or arguments.images < 1 or arguments.rounds < 1:
        raise UserError(f"--tokens: 1 to {config.num_tokens}; --images and --rounds: at least 1")
    transformer = _random_transformer(config, device)
    forms = _forms(transformer, arguments.images, tokens)
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    with progress_bar("sample", arguments.rounds * len(forms), "run") as progress:
        for _ in range(arguments.rounds):
            for name, run in forms.items():
                seconds[name].append(seconds_of(run, device))
                progress.update()
    return _figures(arguments, transformer, tokens, {name: min(found) for name, found in seconds.items()})


def _random_transformer(config: TransformerConfig, device: torch.device) -> Transformer:
    torch.manual_seed(0)
    transformer = Transformer(config).to(device).eval().requires_grad_(False)
    # Trained heads are not zero, and gates not small: the distributions are to differ with precision.
    torch.nn.init.normal_(transformer.head.weight, std=0.05)
    for block in transformer.blocks:
        if hasattr(block, "ada_lin"):
            torch.nn.init.normal_(block.ada_lin[1].weight, std=0.02)
    return transformer


def _forms(transformer: Transformer, images: int, tokens: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    device, textbook = transformer.head.weight.device, TextbookSampler(transformer)
    classes = [i % transformer.config.num_classes for i in range(images)]
    labels = torch.tensor(classes, device=device)

    def plain() -> None:
        textbook.sample(labels, GUIDANCE, tokens, torch.Generator(device).manual_seed(0))

    def autocast() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            plain()

    forms: dict[str, Callable[[], Any]] = {"textbook fp32": plain, "textbook autocast": autocast}
    for precision in PRECISIONS:
        sampler = SamplerConfig(guidance_scale=GUIDANCE, rows_per_block=images, precision=precision)
        decoder = decoder_for(transformer, sampler)
        forms[precision] = partial(sample_codes, decoder, classes, range(len(classes)), sampler)
    return forms


def _figures(arguments, transformer: Transformer, tokens: int, seconds: dict[str, float]) -> dict[str, Any]:
    config, images = transformer.config, arguments.images
    drawn = {name: images * (tokens if name.startswith("textbook") else config.num_tokens) for name in seconds}
    rate = {name: drawn[name] / found for name, found in seconds.items()}
    bandwidth = read_bandwidth(transformer.head.weight.device)
    bytes_per_step = {p: Decoder(transformer, p, images).weight_bytes() for p in PRECISIONS}
    share = {p: bytes_per_step[p] * config.num_tokens / seconds[p] / bandwidth for p in PRECISIONS}
    plain = rate["textbook fp32"]
    return {
        "config": arguments.config,
        "parameters": sum(parameter.numel() for parameter in transformer.parameters()),
        "images": images,
        "guidance_scale": GUIDANCE,
        "tokens_per_second": rate,
        "ratio": {
            "speedup_fp32": rate["fp32"] / plain,
            "speedup": rate["bf16"] / plain,
            "speedup_bf16_over_autocast": rate["bf16"] / rate["textbook autocast"],
        },
        "weight_bytes_per_step": bytes_per_step,
        "bandwidth_gb_per_second": bandwidth / 1e9,
        "share_of_bandwidth": share,
        "kl_from_fp32_nats": {"bf16": divergence(transformer, "bf16", images)},
        "threads": torch.get_num_threads(),
    }


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second at which a product with a vector reads a matrix that fits no cache: the best of eight."""
    matrix = torch.ones(PROBE_BYTES // 4096, 1024, device=device)
    vector = torch.ones(1024, device=device)
    return PROBE_BYTES / min(seconds_of(lambda: torch.mv(matrix, vector), device) for _ in range(8))


@torch.no_grad()
def divergence(transformer: Transformer, precision: str, images: int, steps: int = 32) -> float:
    """Mean Kullback-Leibler divergence KL(fp32 || precision) of the next code, in nats, over forced random codes."""
    device = transformer.head.weight.device
    codes = torch.randint(transformer.config.vocab_size, (images, steps), generator=torch.Generator().manual_seed(1))
    codes, labels = codes.to(device), torch.arange(images, device=device) % transformer.config.num_classes
    steps = min(steps, transformer.config.num_tokens)
    found = {
        p: _log_probabilities(Decoder(transformer, p, images), labels, codes[:, :steps]) for p in ("fp32", precision)
    }
    exact, other = found["fp32"].double(), found[precision].double()
    return float((exact.exp() * (exact - other)).sum(-1).mean())


def _log_probabilities(decoder: Decoder, labels: Tensor, codes: Tensor) -> Tensor:
    condition, cache = decoder.condition(labels), decoder.new_cache()
    inputs = [condition.embedding, *map(decoder.embed, codes.unbind(1)[:-1])]
    rows = [decoder.step(x, condition, cache, position) for position, x in enumerate(inputs)]
    return torch.stack(rows, dim=1).log_softmax(-1)


def table(figures: dict[str, Any]) -> str:
    """The figures for the terminal."""
    rate, share = figures["tokens_per_second"], figures["share_of_bandwidth"]
    lines = [f"{figures['parameters']:,} parameters, {figures['images']} images at a time, guidance on"]
    for name, tokens in rate.items():
        more = f"{tokens / rate['textbook fp32']:5.2f} x the textbook form"
        if name in share:
            gigabytes = figures["weight_bytes_per_step"][name] / 1e9
            more += f", {share[name]:4.0%} of reading {gigabytes:.2f} GB of weights a step"
        if name in figures["kl_from_fp32_nats"]:
            more += f", KL from fp32 {figures['kl_from_fp32_nats'][name]:.2e} nats a code"
        lines.append(f"  {name:<18} {tokens:8.1f} tokens/s  {more}")
    lines.append(f"memory is read at {figures['bandwidth_gb_per_second']:.1f} GB/s by a product with a vector")
    return "\n".join(lines)
