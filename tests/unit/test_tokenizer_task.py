"""Parts of the tokenizer's training step."""

from types import SimpleNamespace

import pytest
import torch

from ibq.training.tokenizer_task import TokenizerTask


@pytest.mark.parametrize("micro_batches", [1, 2, 8])
def test_lecam_remembers_as_long_however_many_micro_batches_a_step_has(micro_batches):
    """A hundred steps after logits of 1 have become 0, as one update a step leaves it."""
    task = SimpleNamespace(reduce=None, lecam={"real": torch.tensor(1.0), "fake": torch.tensor(1.0)})
    for _ in range(100 * micro_batches):
        TokenizerTask._update_lecam(task, torch.zeros(4), torch.zeros(4), 1 / micro_batches)
    assert float(task.lecam["real"]) == pytest.approx(0.999**100, rel=1e-4)
    assert task.lecam["real"] == task.lecam["fake"]
