"""A training step of the transformer: tokens/s, share of the machine's matrix-product rate, memory, time by part.

Against a plain form of the published structure with equal weights: autocast over fp32 weights, rotations of queries and
keys and the statistics of norms by fp32 copies, a table of logits, and AdamW one operation after the other.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibq.config import UserError, load_section
from ibq.engine.base import OptimizerConfig
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.scaling.transformer import transformer_flops
from ibq.training.metrics import Stopwatch
from ibq.training.run import set_up_torch
from tools.lib.bench import step as bench_step
from tools.lib.bench.trainer import Trainer, blueprint_of, random_batch

LOSS = "loss, of the forward pass"  # head and cross-entropy
OPTIMIZER = OptimizerConfig(kind="adamw", learning_rate=1e-4, betas=(0.9, 0.96), weight_decay=0.05, clip_norm=1.0)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this bench."""
    bench_step.add_options(parser, config="yaml/b.yaml", batch=4, steps=4, compiled="true")


def measure(arguments: argparse.Namespace) -> dict:
    """Each form in a process of its own, then the machine's own rates."""
    config = load_section(TransformerConfig, arguments.config, "model")  # errors before the wait
    if not config.is_plain:
        raise UserError("--config: the plain form has the plain head and adaptive norms alone; see the bench heads")
    figures = bench_step.measure_forms(arguments, measure_form, measure_rates)
    flops = arguments.batch * transformer_flops(config).textbook
    for form in bench_step.FORMS:
        own = figures[form]
        own["tokens_per_second"] = arguments.batch * config.num_tokens / own["seconds"]
        own["mfu"] = flops / own["seconds"] / figures["rates"]["bf16"]
    figures["ratio"]["mfu"] = figures["ours"]["mfu"]
    return figures | {"flops_per_step": flops}


def table(figures: dict) -> str:
    """The figures for people."""
    rows = {"tokens/s": "tokens_per_second", "seconds a step": "seconds", "peak GiB": "peak_gib", "MFU": "mfu"}
    return f"{bench_step.table(figures, rows)}; {figures['flops_per_step'] / 1e12:.2f} TFLOP a step"


# --- In a process of its own ---


def measure_rates(*, config: str, batch: int, device: str) -> dict[str, float]:
    """The machine's own limits, for products at the shapes of the model's layers."""
    set_up_torch(training=True)
    model = load_section(TransformerConfig, config, "model")
    tokens, width = batch * model.num_tokens, model.model_width
    shapes = [(tokens, width, outputs * width) for outputs in (3, 1, 4)] + [(tokens, 3 * width, width)]
    return bench_step.machine_rates(shapes, shapes, device)


def measure_form(*, form: str, config: str, batch: int, steps: int, compile: str, device: str) -> dict:
    """A form's figures."""
    bench_step.set_up(form)
    model = load_section(TransformerConfig, config, "model")
    if form == "plain":
        trainer = PlainStep(model, torch.device(device))
    else:
        trainer = Trainer(bench_step.engine_config(config, compile), model, torch.device(device), OPTIMIZER)
        bench_step.time_module(trainer.module.head, trainer.stopwatch, LOSS)
    codes, classes = random_batch(model, batch, seed=0)

    def step() -> float:
        with trainer.stopwatch.part("data"):
            own = codes.to(device), classes.to(device)
        return float(trainer.step(*own))

    weights = 4 * sum(parameter.numel() for parameter in trainer.module.parameters())
    figures = bench_step.time_steps(
        step,
        trainer.stopwatch,
        3 * weights,  # and both moments
        steps,
        device,
    )
    figures["parts"].pop("tokenizer", None)  # codes need none
    return figures


class PlainStep:
    """The published structure, which stays as it is: the baseline."""

    def __init__(self, model: TransformerConfig, device: torch.device):
        self.module: Transformer = blueprint_of(model).whole().to(device).train()
        self.stopwatch, self.device = Stopwatch(device), device
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(),
            lr=OPTIMIZER.learning_rate,
            betas=OPTIMIZER.betas,
            weight_decay=OPTIMIZER.weight_decay,
            foreach=False,
            fused=False,
        )

    def step(self, codes: Tensor, classes: Tensor) -> Tensor:
        """Train on a batch; its loss."""
        part = self.stopwatch.part
        with part("forward"), torch.autocast(self.device.type, torch.bfloat16):
            hidden = self._hidden(codes, classes)
            with part(LOSS):
                logits = F.linear(hidden, self.module.head.weight)
                loss = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())
        with part("backward"):
            loss.backward()
        with part("optimizer"):
            nn.utils.clip_grad_norm_(self.module.parameters(), OPTIMIZER.clip_norm, foreach=False)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _hidden(self, codes: Tensor, classes: Tensor) -> Tensor:
        model, config = self.module, self.module.config
        dropped = torch.rand(len(classes), device=classes.device) < config.class_dropout
        embedding = model.class_emb(torch.where(dropped, model.null_class, classes))
        x = torch.cat([embedding[:, None], model.tok_emb(codes[:, :-1])], dim=1)
        x = F.dropout(x, config.token_dropout)
        rope = torch.view_as_real(model._rope(x, config.code_grids[0])[: config.num_tokens])
        for block in model.blocks:
            x = self._block(block, x, embedding, rope)
        scale, shift = model.head_nm.ada_lin(embedding).unflatten(-1, (2, -1))[:, :, None].unbind(1)
        return _norm(x, model.head_nm.rmsnorm.weight) * (1 + scale) + shift

    def _block(self, block: nn.Module, x: Tensor, embedding: Tensor, rope: Tensor) -> Tensor:
        config, attention, feed = self.module.config, block.attention, block.feed_forward
        modulation = block.ada_lin(embedding).unflatten(-1, (6, -1))[:, :, None].unbind(1)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation
        h = _norm(x, block.attention_norm.weight) * (1 + scale1) + shift1
        qkv = attention.wqkv(h).unflatten(-1, (-1, attention.head_dim))
        q, k, v = qkv.split([attention.heads, attention.kv_heads, attention.kv_heads], dim=2)
        q, k, v = (part.transpose(1, 2) for part in (_rotate(q, rope), _rotate(k, rope), v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=attention.heads != attention.kv_heads)
        out = F.dropout(attention.wo(out.transpose(1, 2).flatten(2)), config.residual_dropout)
        x = x + gamma1 * out
        h = _norm(x, block.ffn_norm.weight) * (1 + scale2) + shift2
        return x + gamma2 * F.dropout(feed.w2(F.silu(feed.w1(h)) * feed.w3(h)), config.ffn_dropout)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    high = x.float()
    return (high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(x) * weight


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotations by real and imaginary parts in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    real, imaginary = rope[:, None].unbind(-1)
    first, second = pairs.unbind(-1)
    turned = torch.stack([first * real - second * imaginary, second * real + first * imaginary], dim=-1)
    return turned.flatten(-2).type_as(x)
