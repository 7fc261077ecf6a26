"""Sampling with a KV cache and guidance against a textbook sampler on equal weights, and against the machine's limits.

A step's limit is its roofline: what reading the weights and the filled part of the cache takes at the measured
bandwidth, or what its products take at the measured rate, whichever is longer.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ibq.models.transformer_blocks as blocks
from ibq import sampling
from ibq.config import UserError, load_section
from ibq.decoding import Decoder, PackedLinear
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.ops.backend import image_format
from ibq.pixels import pixels_of
from ibq.progress import progress_bar
from ibq.sampler import PRECISIONS, SamplerConfig
from ibq.sampling import decoder_for, sample_blocks, sample_codes
from ibq.training.metrics import Stopwatch
from ibq.training.run import set_up_torch
from tools.lib.bench.options import add_device
from tools.lib.bench.process import product_rate, seconds_of

GUIDANCE = 2.0
PROBE_BYTES = 512 * 2**20  # of what is read to measure the bandwidth: far more than any cache
PRODUCT = {"cpu": (512, 1024, 4096), "cuda": (8192, 4096, 8192)}  # which a device does at its best rate
BLOCKS = 3  # of images, that are drawn with pixels and without
# Parts of a step: what Python calls in each, for the CPU, and what its kernels' names hold, on CUDA.
METHODS = {
    "products": (PackedLinear, "forward"),
    "attention": (blocks.Attention, "_attend"),
    "norms": (blocks.RMSNorm, "after"),
    "gates": (blocks.FeedForward, "_gated"),
    "draw": (sampling, "draw"),
}
KERNELS = {
    "attention": ("attend_kernel",),
    "norms": ("residual_norm_kernel",),
    "gates": ("swiglu_kernel",),
    "draw": ("draw_sums_kernel", "draw_kernel"),
    "products": ("gemm", "gemv", "cutlass", "nvjet", "xmma", "splitk", "cublas"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this measurement."""
    add = parser.add_argument
    add("--config", default="yaml/b.yaml", help="config of a transformer run (default: %(default)s)")
    add("--rows", type=_numbers, default="4", metavar="N,N", help="images drawn together (default: %(default)s)")
    add("--rounds", type=int, default=2, help="of all forms in turn; the best of each counts (default: 2)")
    add("--tokens", type=int, help="codes of an image that the textbook form draws (default: all)")
    add("--pixels", metavar="CONFIG", help="decode images as well, by a tokenizer of such a run")
    add_device(parser)


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


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
        rope = self.model._rope(x, self.model.config.code_grids[0])[position : position + 1]
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
    if not config.is_plain:
        raise UserError("--config: the textbook's sampler has the plain head and adaptive norms alone; give another")
    tokens = config.num_tokens if arguments.tokens is None else arguments.tokens
    if not 1 <= tokens <= config.num_tokens or min(arguments.rows) < 1 or arguments.rounds < 1:
        raise UserError(f"--tokens: 1 to {config.num_tokens}; --rows and --rounds: at least 1")
    transformer = _random_transformer(config, device)
    tokenizer = None if arguments.pixels is None else _random_tokenizer(arguments.pixels, config, device)
    machine = {"bytes_per_second": read_bandwidth(device)}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        machine[precision] = product_rate(dtype, [PRODUCT[device.type]], device.type)
    with progress_bar("sample", arguments.rounds * len(arguments.rows) * (2 + len(PRECISIONS)), "run") as progress:
        found = {
            str(rows): _measure_rows(transformer, tokenizer, rows, tokens, arguments.rounds, machine, progress.update)
            for rows in arguments.rows
        }
    return {
        "config": arguments.config,
        "parameters": sum(parameter.numel() for parameter in transformer.parameters()),
        "guidance_scale": GUIDANCE,
        "tokens": config.num_tokens,
        "machine": machine,
        "rows": found,
        "kl_from_fp32_nats": {"bf16": divergence(transformer, "bf16", min(arguments.rows))},
        "threads": torch.get_num_threads(),
    }


def _measure_rows(
    transformer: Transformer, tokenizer: Tokenizer | None, rows: int, tokens: int, rounds: int, machine, advance
) -> dict[str, Any]:
    """What is found for so many images at a time."""
    config, device = transformer.config, transformer.head.weight.device
    decoders = {p: decoder_for(transformer, _sampler(rows, p)) for p in PRECISIONS}
    forms = _forms(transformer, decoders, rows, tokens)
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for run in forms.values() if device.type == "cuda" else ():
        run()  # compiles kernels, captures graphs
    for _ in range(rounds):
        for name, run in forms.items():
            seconds[name].append(seconds_of(run, device))
            advance()
    drawn = {name: tokens if name.startswith("textbook") else config.num_tokens for name in forms}
    step = {name: min(found) / drawn[name] for name, found in seconds.items()}
    limits = {p: _limits(config, decoders[p], machine) for p in PRECISIONS}
    found = {
        "ms_a_step": {name: 1000 * value for name, value in step.items()},
        "tokens_per_second": {name: rows / value for name, value in step.items()},
        "images_per_second": {name: rows / value / config.num_tokens for name, value in step.items()},
        "ratio": {
            "speedup_fp32": step["textbook fp32"] / step["fp32"],
            "speedup": step["textbook fp32"] / step["bf16"],
            "speedup_bf16_over_autocast": step["textbook autocast"] / step["bf16"],
        },
        "limits_ms": {p: {name: 1000 * value for name, value in limits[p].items()} for p in PRECISIONS},
        "share_of_roofline": {p: max(limits[p].values()) / step[p] for p in PRECISIONS},
        "parts_ms": {p: _parts(forms[p], device, config.num_tokens) for p in PRECISIONS},
    }
    if tokenizer is not None:
        found["with_pixels"] = _measure_pixels(decoders["bf16"], tokenizer, rows)
    return found


def _limits(config: TransformerConfig, decoder: Decoder, machine: dict[str, float]) -> dict[str, float]:
    """Seconds that a step takes at least, by what limits it."""
    size, sequences = decoder.dtype.itemsize, decoder.rows
    before = (config.num_tokens - 1) / 2  # positions in the cache, on average
    position = 2 * config.depth * config.num_kv_heads * config.head_dim  # numbers in the cache
    weights = decoder.weight_bytes()
    attention = 4 * config.depth * config.model_width * before
    return {
        "memory": (weights + sequences * before * position * size) / machine["bytes_per_second"],
        "products": sequences * (2 * weights / size + attention) / machine[decoder.precision],
    }


def _parts(run: Callable[[], Any], device: torch.device, steps: int) -> dict[str, float]:
    """Milliseconds of a step by part; on CUDA of its kernels, `rest` being what none of the names fits."""
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize(device)
        found = dict.fromkeys([*KERNELS, "rest"], 0.0)
        for event in profile.key_averages():
            name = event.key.lower()
            part = next((part for part, words in KERNELS.items() if any(word in name for word in words)), "rest")
            found[part] += event.self_device_time_total / 1e6
    else:
        clock = Stopwatch(device)
        with _clocked(clock):
            whole = seconds_of(run)
        found = {name.removeprefix("seconds/"): seconds for name, seconds in clock.means(1).items()}
        found["rest"] = whole - sum(found.values())
    return {name: 1000 * seconds / steps for name, seconds in found.items()}


@contextmanager
def _clocked(clock: Stopwatch) -> Iterator[None]:
    """The methods of a step's parts, measured while this lasts."""
    plain = {name: getattr(*place) for name, place in METHODS.items()}

    def measured(name: str) -> Callable:
        @wraps(plain[name])
        def call(*arguments, **keywords):
            with clock.part(name):
                return plain[name](*arguments, **keywords)

        return call

    for name, place in METHODS.items():
        setattr(*place, measured(name))
    try:
        yield
    finally:
        for name, place in METHODS.items():
            setattr(*place, plain[name])


def _sampler(rows: int, precision: str) -> SamplerConfig:
    return SamplerConfig(guidance_scale=GUIDANCE, rows_per_block=rows, precision=precision)


def _measure_pixels(decoder: Decoder, tokenizer: Tokenizer, rows: int) -> dict[str, float]:
    """Images a second of some blocks: codes alone, and with their pixels decoded beside."""
    device, count = decoder.device, BLOCKS * rows
    classes = [number % decoder.config.num_classes for number in range(count)]
    draw = partial(sample_blocks, decoder, classes, range(count), _sampler(rows, decoder.precision))
    runs = {
        "codes": lambda: [codes.shape for codes in draw()],
        "pixels": lambda: [images.shape for images in pixels_of(draw(), tokenizer, "bf16")],
    }
    found = {}
    for name, run in runs.items():
        if device.type == "cuda":
            run()
        found[f"{name}_images_per_second"] = count / seconds_of(run, device)
    return found | {"ratio": found["pixels_images_per_second"] / found["codes_images_per_second"]}


def _random_tokenizer(file: str, config: TransformerConfig, device: torch.device) -> Tokenizer:
    model = load_section(TokenizerConfig, file, "model", [f"quantizer.num_codes={config.vocab_size}"])
    torch.manual_seed(0)
    return Tokenizer(model).to(device, memory_format=image_format(device)).eval().requires_grad_(False)


def _random_transformer(config: TransformerConfig, device: torch.device) -> Transformer:
    torch.manual_seed(0)
    transformer = Transformer(config).to(device).eval().requires_grad_(False)
    # Trained heads are not zero, and gates not small: the distributions are to differ with precision.
    torch.nn.init.normal_(transformer.head.weight, std=0.05)
    for block in transformer.blocks:
        if hasattr(block, "ada_lin"):
            torch.nn.init.normal_(block.ada_lin[1].weight, std=0.02)
    return transformer


def _forms(
    transformer: Transformer, decoders: dict[str, Decoder], images: int, tokens: int
) -> dict[str, Callable[[], Any]]:
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
    for precision, decoder in decoders.items():
        sampler = _sampler(images, precision)
        forms[precision] = partial(sample_codes, decoder, classes, range(len(classes)), sampler)
    return forms


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second at which a product with a vector reads a matrix that fits no cache: the best of eight."""
    matrix = torch.ones(PROBE_BYTES // 4096, 1024, device=device)
    vector = torch.ones(1024, device=device)
    calls = 20 if device.type == "cuda" else 1  # for the launch and the wait not to count
    seconds = min(seconds_of(lambda: [torch.mv(matrix, vector) for _ in range(calls)], device) for _ in range(8))
    return calls * PROBE_BYTES / seconds


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
    targets, x, rows = decoder.target_rows(cache.grid), condition.embedding.clone(), []
    if targets is not None:
        x += targets[0]
    places = torch.arange(codes.shape[1], device=decoder.device)
    for place, own in zip(places.split(1) if decoder.fused else places.tolist(), codes.unbind(1), strict=True):
        rows.append(decoder.step(x, condition, cache, place).float())
        decoder.embed(own, targets, place, x[None])
    return torch.stack(rows, dim=1).log_softmax(-1)


def table(figures: dict[str, Any]) -> str:
    """The figures for the terminal."""
    lines = [f"{figures['parameters']:,} parameters, guidance on, {figures['tokens']} codes an image"]
    for rows, found in figures["rows"].items():
        lines.append(f"{rows} images at a time:")
        for name, step in found["ms_a_step"].items():
            more = f"{found['ms_a_step']['textbook fp32'] / step:6.2f} x the textbook form"
            if name in PRECISIONS:
                limit = max(found["limits_ms"][name], key=found["limits_ms"][name].get)
                more += f", {found['share_of_roofline'][name]:4.0%} of the roofline ({limit})"
            if name in figures["kl_from_fp32_nats"]:
                more += f", KL from fp32 {figures['kl_from_fp32_nats'][name]:.2e} nats a code"
            lines.append(f"  {name:<18} {step:9.3f} ms a step {found['images_per_second'][name]:9.3f} images/s {more}")
        for precision, parts in found["parts_ms"].items():
            text = ", ".join(f"{name} {value:.3f}" for name, value in parts.items())
            lines.append(f"  parts of {precision}, ms a step: {text}")
        if "with_pixels" in found:
            pixels = found["with_pixels"]
            lines.append(
                f"  with pixels {pixels['pixels_images_per_second']:.3f} images/s, "
                f"{pixels['ratio']:.2f} of those of codes alone"
            )
    machine = figures["machine"]
    rates = ", ".join(f"{p} products {machine[p] / 1e12:.2f} TFLOP/s" for p in PRECISIONS)
    lines.append(f"memory is read at {machine['bytes_per_second'] / 1e9:.1f} GB/s by a product with a vector; {rates}")
    return "\n".join(lines)
