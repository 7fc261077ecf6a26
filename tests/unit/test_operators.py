"""How many operators a training step launches, and how often it waits for the device: each costs a GPU microseconds.

Counted on the CPU, where some kernels of the GPU are several operators. A change that adds some has to say so here.
"""

from collections import Counter

import pytest
from support.dispatch import Recorder
from support.training import make_workplace, train_here

from ibq.training.ar_task import ARTask
from ibq.training.tokenizer_task import TokenizerTask

# Operators of a step, and reads of a value by the host: of small models, so most are per layer and per parameter.
MOST = {"transformer": (400, 4), "tokenizer": (1030, 0)}
TASKS = {"transformer": ARTask, "tokenizer": TokenizerTask}
QUIET = ("training.max_steps=5", "training.log_every=50", "training.validate_every=null", "checkpoint.save_every=50")
GAN = ("loss.gan.start_step=0", "codebook_start.warmup_steps=0")
VIEWS = {"view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "detach", "alias"}
VIEWS |= {"_unsafe_view", "as_strided", "split", "split_with_sizes", "unbind", "view_as_real", "view_as_complex"}
WAITS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero"}  # the transformer's check codes, on the CPU alone


@pytest.mark.parametrize("stage", TASKS)
def test_operators_of_a_training_step(stage, tmp_path, monkeypatch):
    recorder, step = Recorder(), TASKS[stage].step

    def counted(self, number, *arguments):
        if number != 3:
            return step(self, number, *arguments)
        with recorder:
            return step(self, number, *arguments)

    monkeypatch.setattr(TASKS[stage], "step", counted)
    config = make_workplace(tmp_path) / f"{stage}.yaml"
    more = GAN if stage == "tokenizer" else ()
    assert train_here(stage, ["--config", str(config), f"output={tmp_path / 'run'}", *QUIET, *more]) == 0
    launched = Counter({name: count for name, count in recorder.names.items() if name not in VIEWS})
    waits = sum(launched[name] for name in WAITS)
    print(f"\n{stage}: {launched.total()} operators, {waits} waits:", *launched.most_common(), sep="\n    ")
    operators, most_waits = MOST[stage]
    assert 0.9 * operators < launched.total() <= operators, launched
    assert waits <= most_waits
