"""The choice of `training.micro_batch: auto`, and how it is refused."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from support import ROOT
from support.training import make_workplace

from ibq.config import ConfigError, UserError, load_config
from ibq.engine.configs import FsdpEngineConfig, LocalEngineConfig, ZeroEngineConfig
from ibq.scaling.hardware import GIB, GPUS
from ibq.scaling.plan import Machine, bytes_needed, layout_of, micro_batch_within
from ibq.scaling.survey import recomputations
from ibq.training import micro_batch
from ibq.training.ar_config import ARRunConfig
from ibq.training.micro_batch import Room, number_before, resolve_micro_batch, stage_of, training_of
from ibq.training.tokenizer_config import TokenizerRunConfig
from launchers.lib.run_config import check_run
from launchers.lib.sweep.rules import ScalingConfig, scaling_runs

KINDS = {"tokenizer": TokenizerRunConfig, "transformer": ARRunConfig}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("micro_batch"))


def config_of(place, stage, *overrides):
    return load_config(KINDS[stage], place / f"{stage}.yaml", ["training.micro_batch=auto", *overrides])


def resolved(config, fresh=False):
    return resolve_micro_batch(config, CPU, fresh=fresh, tokenizer=None)


@pytest.mark.parametrize("file", ["tokenizer_262144", "b"])
@pytest.mark.parametrize("engine", [LocalEngineConfig(), FsdpEngineConfig(), ZeroEngineConfig(stage=2)], ids=str)
def test_the_choice_divides_fits_and_grows_with_memory(file, engine):
    config = load_config(KINDS["transformer" if file == "b" else "tokenizer"], ROOT / f"yaml/{file}.yaml")
    if file != "b" and isinstance(engine, ZeroEngineConfig):
        return
    stage, training = stage_of(config), training_of(config, 1)
    layout = layout_of(engine, stage, Machine(gpu=GPUS["h100"], gpus=4))
    share, chosen = config.training.batch_size // 4, []
    for gib in (2, 8, 14, 20, 26, 38, 50, 62, 76):
        rows = micro_batch_within(stage, layout, training, gib * GIB)
        chosen.append(rows)
        assert rows == 0 or (share % rows == 0 and bytes_needed(stage, layout, training, rows) <= gib * GIB)
        larger = [size for size in range(rows + 1, share + 1) if share % size == 0][:1]
        assert all(bytes_needed(stage, layout, training, size) > gib * GIB for size in larger)
    assert all(small <= large for small, large in itertools.pairwise(chosen))
    assert chosen[0] == 0 and len(set(chosen)) >= 4, "memories were tried between which the choice changes"


def test_the_largest_bucket_counts(place, monkeypatch):
    size = ("model.resolution=16", "model.attention_resolutions=[8]")
    square = config_of(place, "tokenizer", *size)
    wide = config_of(place, "tokenizer", *size, "data.buckets=[[16,16],[32,128]]")
    same = stage_of(config_of(place, "tokenizer", "model.resolution=64", "model.attention_resolutions=[32]"))
    assert micro_batch.at_largest_bucket(stage_of(wide), wide) == same
    layout, training = layout_of(wide.engine, same, Machine(gpu=GPUS["h100"], gpus=1)), training_of(wide, 1, "cpu")
    room = Room(held=math.inf, used=bytes_needed(same, layout, training, 2), on="")
    monkeypatch.setattr(Room, "of", lambda *_: room)
    assert (resolved(square), resolved(wide)) == (8, 2)


def test_a_frozen_tokenizer_takes_memory_too():
    config = load_config(ARRunConfig, ROOT / "yaml/b.yaml")
    tokenizer = load_config(TokenizerRunConfig, ROOT / "yaml/tokenizer_16384.yaml").model
    plain, with_images = stage_of(config), stage_of(config, tokenizer)
    layout, training = layout_of(config.engine, plain, Machine(gpu=GPUS["h100"], gpus=1)), training_of(config, 1)
    added = [
        bytes_needed(with_images, layout, training, rows) - bytes_needed(plain, layout, training, rows)
        for rows in (1, 2, 3)
    ]
    assert added[1] - added[0] == pytest.approx(added[2] - added[1]), "its maps grow with the images"
    assert added[1] - added[0] == pytest.approx(3 * 4 * 128 * 256**2), "three float32 maps of 128 channels"
    assert added[0] > 4 * 100e6, "over 100 million weights"


@pytest.mark.parametrize("stage", KINDS)
def test_a_small_run_takes_its_whole_batch_and_says_so(place, stage, tmp_path, capsys):
    config = config_of(place, stage, f"output={tmp_path}/run")
    assert resolved(config) == 8
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "training.micro_batch: auto takes 8, 1 a step and rank: " in said, said
    assert resolved(config_of(place, stage, "training.micro_batch=2")) == 2
    assert capsys.readouterr().err == "" and not (tmp_path / "run").exists()


def test_a_run_that_goes_on_takes_what_it_had(place, tmp_path, capsys):
    config = config_of(place, "tokenizer", f"output={tmp_path}")
    (tmp_path / "config.yaml").write_text("training: {max_steps: 4, micro_batch: 2}\n")
    assert number_before(str(tmp_path)) == 0 and resolved(config) == 8, "there is nothing to go on from"
    (tmp_path / "checkpoints/step-00000002").mkdir(parents=True)
    capsys.readouterr()
    assert resolved(config) == 2 and "auto takes 2 as before, 4 a step" in capsys.readouterr().err
    assert resolved(config, fresh=True) == 8
    capsys.readouterr()
    (tmp_path / "config.yaml").write_text("training: {max_steps: 4, micro_batch: 3}\n")
    assert resolved(config) == 8 and "instead of 3 before" in capsys.readouterr().err
    for text in ("training: {max_steps: 4, micro_batch: auto}\n", "training: {max_steps: [\n", ""):
        (tmp_path / "config.yaml").write_text(text)
        assert number_before(str(tmp_path)) == 0
    (tmp_path / "config.yaml").unlink()
    assert resolved(config) == 8


def test_what_it_had_is_kept_only_where_the_device_holds_it(place, tmp_path, monkeypatch):
    config = config_of(place, "transformer", f"output={tmp_path}")
    (tmp_path / "checkpoints/step-00000002").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("training: {max_steps: 4, micro_batch: 4}\n")
    stage, training = stage_of(config), training_of(config, 1, "cpu")
    layout = layout_of(config.engine, stage, Machine(gpu=GPUS["h100"], gpus=1))
    sizes = {rows: bytes_needed(stage, layout, training, rows) for rows in (1, 2, 4, 8)}
    assert sorted(sizes.values()) == list(sizes.values())
    for free, expected in ((3 * sizes[8], 4), (1.01 * sizes[4], 4), (0.99 * sizes[4], 0), (2.01 * sizes[2], 4)):
        monkeypatch.setattr(micro_batch, "available_bytes", lambda free=free: free)
        if expected:
            assert resolved(config) == expected
        else:  # half of it holds no image at all
            with pytest.raises(UserError, match=r"^training\.micro_batch: one image at a time needs "):
                resolved(config)


def test_what_fits_nowhere_is_refused(place):
    with pytest.raises(UserError, match=r"one image at a time needs [\d.]+ of the .*tools/plan\.py") as caught:
        resolved(config_of(place, "transformer", "model.width=65536", "model.depth=20"))
    assert "\n" not in str(caught.value)


def test_recomputation_is_proposed_where_it_helps():
    config = load_config(TokenizerRunConfig, ROOT / "yaml/tokenizer_16384.yaml")
    stage, training = stage_of(config), training_of(config, 1)
    layout = layout_of(config.engine, stage, Machine(gpu=GPUS["h100"], gpus=1))
    none, selective, full = (bytes_needed(one, layout, training, 1) for one in recomputations(stage))
    assert none > selective > full
    for limit, setting in ((selective, " model.checkpoint_selective=true ("), (full, "gradient_checkpointing=true (")):
        room = Room(held=limit, used=limit, on="of this GPU")
        assert setting in micro_batch._too_large(stage, layout, training, room)
    two = replace(room, used=bytes_needed(stage, layout, training, 1))
    assert "gradient_checkpointing=true would allow " in micro_batch._larger(stage, layout, training, two, 1)
    assert micro_batch._larger(stage, layout, training, two, 2) == ""


def test_a_network_without_a_plan_is_refused(place):
    with pytest.raises(UserError, match=r"^training\.micro_batch: auto: network: .* cannot be planned.*give a number"):
        resolved(config_of(place, "tokenizer", "model.network=open_magvit2"))


def test_a_batch_that_ranks_cannot_share_is_refused_before_the_start(place):
    config = config_of(place, "transformer")
    check_run(config, ranks=4)
    with pytest.raises(UserError, match=r"^training\.batch_size: 3 ranks cannot share the global batch 8"):
        check_run(config, ranks=3)


@pytest.mark.parametrize("text", ["automatic", "0", "1.5", "null"])
def test_other_words_are_no_micro_batch(place, text):
    with pytest.raises(ConfigError, match=r"training\.micro_batch: ") as caught:
        config_of(place, "transformer", f"training.micro_batch={text}")
    assert "\n" not in str(caught.value)
    if text != "0":
        assert "int or auto" in str(caught.value)


def test_runs_of_a_scaling_sweep_keep_auto(place):
    model = config_of(place, "transformer").model
    runs = scaling_runs(ScalingConfig(depths=(2,), tokens=(1e4, 1e5)), model, "auto")
    assert [run.overrides[4] for run in runs] == ["training.micro_batch=auto"] * 2
