"""Stage 2: one step of the class-conditional autoregressive transformer."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ibq import dist
from ibq.data.transforms import to_unit_range
from ibq.engine.base import Engine, GroupHyper
from ibq.models.code_order import draw_orders
from ibq.models.tokenizer import Tokenizer
from ibq.models.transformer import Transformer
from ibq.training.checkpoint import save_pretrained
from ibq.training.metrics import Stopwatch
from ibq.training.task import Batch, StepOutcome, Validation


class ARTask:
    """Trains a transformer on codes, or on images through a frozen tokenizer.

    `random_share`: the probability with which an image is in random order at a step; None is raster order.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        hyper: Callable[[int], dict[str, GroupHyper]],
        random_share: Callable[[int], float] | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        self.engines = {"transformer": engine}
        self.engine, self.hyper, self.random_share, self.tokenizer = engine, hyper, random_share, tokenizer
        self.transformer: Transformer = engine.module
        self._images = self._tokens = 0  # of this rank since they were last asked for

    @torch.no_grad()
    def _codes(self, inputs: Tensor) -> Tensor:
        """Codes [B, h, w] of a batch of codes [B, h, w] or of uint8 images [B, 3, H, W]."""
        if self.tokenizer is None:
            return inputs
        with self.engine.autocast():
            return self.tokenizer.encode(to_unit_range(inputs))

    def step(self, step: int, batches: list[Batch], stopwatch: Stopwatch) -> StepOutcome:
        """Train on the micro-batches (codes or images, labels) of one step."""
        hyper = self.hyper(step)
        share = None if self.random_share is None else self.random_share(step)
        total = torch.zeros((), device=batches[0][0].device)
        for inputs, classes in batches:
            with stopwatch.part("tokenizer"):
                codes = self._codes(inputs)
            with self.engine.micro_batch():
                with stopwatch.part("forward"):
                    order = () if share is None else (draw_orders(codes, share),)
                    loss = self.engine(codes, classes, *order).mean()
                with stopwatch.part("backward"):
                    self.engine.backward(loss)
            total += loss.detach() / len(batches)
            self._images, self._tokens = self._images + len(codes), self._tokens + codes.numel()
        with stopwatch.part("optimizer"):
            result = self.engine.step(hyper)
        metrics = {
            "loss/total": total,
            "gradient_norm/transformer": result.gradient_norm,
            "learning_rate": torch.tensor(hyper["decay"].learning_rate),
            "weight_decay": torch.tensor(hyper["decay"].weight_decay),
        }
        if share is not None:
            metrics["random_share"] = torch.tensor(share)
        return StepOutcome(metrics=metrics, skipped=result.skipped)

    def interval_metrics(self, step: int) -> dict[str, float]:
        """Tokens per image, for the rates: every rank has had the same grids."""
        images, tokens, self._images, self._tokens = self._images, self._tokens, 0, 0
        return {"tokens_per_image": tokens / images} if images else {}

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> Validation:
        """Mean NLL in nats a token over the whole validation set with averaged weights; the score is its negative.

        Of several grids also each one's own, `nll_ROWSxCOLUMNS`.
        """
        self.transformer.eval()
        grids, device = self.transformer.config.code_grids, next(self.transformer.parameters()).device
        sums = torch.zeros(len(grids), 2, dtype=torch.float64, device=device)
        idle = torch.zeros(1, *grids[0], dtype=torch.int64, device=device)
        with self.engine.averaged():
            for batch in dist.with_all_ranks(batches):
                if batch is None:
                    self.engine(idle, idle[:, 0, 0])
                    continue
                codes = self._codes(batch[0])
                nll = self.engine(codes, batch[1])  # [B, T]
                own = sums[grids.index(tuple(codes.shape[1:]))]
                own += torch.stack([nll.double().sum(), sums.new_tensor(nll.numel())])
        self.transformer.train()
        rows = dist.sum_over_data(sums)
        total, count = rows.sum(0).tolist()
        nll = total / max(count, 1)
        metrics = {"nll": nll, "tokens": count}
        if len(grids) > 1:
            for (height, width), (own_total, own_count) in zip(grids, rows.tolist(), strict=True):
                metrics[f"nll_{height}x{width}"] = own_total / max(own_count, 1)
        return Validation(metrics=metrics, score=-nll)

    def rank_tensors(self) -> dict[str, Tensor]:
        """Nothing is kept per rank."""
        return {}

    def load_rank_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing is kept per rank."""

    def save_pretrained(self, folder: Path, info: Mapping) -> None:
        """Write the averaged weights for `ibq.load_transformer`."""
        save_pretrained(folder, self.engine, info)
