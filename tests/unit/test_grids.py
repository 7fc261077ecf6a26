"""Grids of codes that are no squares: positions, cached decoding, sampling, several of one model, bad ones."""

import json
import math

import numpy as np
import pytest
import torch
from support.models import VARIANTS, decoder_inputs, small_transformer
from torch._dynamo.testing import CompileCounter

from ibq.config import ConfigError, parse_config
from ibq.data.codes import META_FILE, CodeDataset, CodesMeta, write_codes
from ibq.data.transforms import random_square, square, view
from ibq.decoding import Decoder, settle
from ibq.models.transformer import TransformerConfig
from ibq.models.transformer_blocks import rotary_table
from ibq.sampler import SamplerConfig
from ibq.sampling import decoder_for, sample_codes, sample_rows
from ibq.training.ar_config import ARRunConfig

GRID, SQUARE = (3, 5), (4, 4)
SIZES = {"width": 64, "vocab_size": 50, "grids": (SQUARE, GRID)}
FP32 = SamplerConfig(rows_per_block=2, precision="fp32")


def request(transformer, rows=2, grid=GRID):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(transformer.config.vocab_size, (rows, *grid), generator=generator), torch.arange(rows)


# --- Positions ---


def test_a_position_is_its_row_and_its_column():
    table = rotary_table((3, 5), 16, 100.0)
    assert table.shape == (16, 8) and not table[0].any(), "that of the class"
    speeds = 100.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    for row in range(3):
        for column in range(5):
            angles = torch.cat([row * speeds, column * speeds])
            turned = table[1 + row * 5 + column]
            assert torch.allclose(turned, torch.polar(torch.ones_like(angles), angles), atol=1e-12)


def test_a_larger_grid_has_the_positions_of_a_smaller_one():
    small, large = (rotary_table(grid, 16, 1e4)[1:].unflatten(0, grid) for grid in ((3, 5), (7, 6)))
    assert torch.equal(large[:3, :5], small)
    assert not torch.equal(small.flatten(0, 1), rotary_table((5, 3), 16, 1e4)[1:])


def test_weights_do_not_depend_on_the_grid():
    own = small_transformer().state_dict()
    for grids in (((3, 5),), ((8, 8), (2, 32))):
        small_transformer(grids=grids).load_state_dict(own, strict=True)


@torch.no_grad()
def test_codes_of_any_grid_are_taken():
    """A model of squares; flat codes are those of its own grid."""
    transformer = small_transformer()
    codes, classes = request(transformer, grid=SQUARE)
    assert torch.equal(transformer(codes, classes), transformer(codes.flatten(1), classes))
    wide, tall = (transformer(codes.view(2, *grid), classes) for grid in ((2, 8), (8, 2)))
    assert wide.shape == tall.shape == (2, 16) and not torch.allclose(wide, tall, atol=1e-3)
    other = small_transformer(grids=((2, 8), SQUARE))
    assert torch.equal(other(codes.view(2, 2, 8), classes), wide)
    with pytest.raises(ValueError, match=r"codes: shape \(2, 16\), .*2 x 8 or 4 x 4 codes"):
        other(codes.flatten(1), classes)


# --- Decoding ---


@torch.no_grad()
@pytest.mark.parametrize("variant", ["plain", "shared_grouped", "random"])
def test_cached_decoding_is_the_forward_pass(variant):
    transformer = small_transformer(**SIZES, **VARIANTS[variant])
    codes, classes = request(transformer)
    decoder = Decoder(transformer, "fp32", len(codes))
    condition, cache = decoder.condition(classes), decoder.new_cache(GRID)
    inputs = decoder_inputs(decoder, condition, codes.flatten(1), GRID)
    found = torch.stack([decoder.step(x, condition, cache, i) for i, x in enumerate(inputs)], dim=1)
    exact = transformer.logits(codes, classes)
    assert found.shape == (2, 15, 50) and (found - exact).abs().max() < 2e-5 * exact.abs().max()


@torch.no_grad()
def test_greedy_codes_are_those_of_the_forward_pass():
    transformer = small_transformer(**SIZES)
    settings = SamplerConfig(temperature=0, guidance_scale=1.0, rows_per_block=2, precision="fp32", grid=GRID)
    drawn = sample_codes(transformer, [0, 2], [0, 0], settings)
    codes = torch.zeros(2, *GRID, dtype=torch.int64)
    for position in range(math.prod(GRID)):
        logits = transformer.logits(codes, torch.tensor([0, 2]))
        codes.view(2, -1)[:, position] = logits[:, position].argmax(-1)
    assert torch.equal(drawn, codes)


def test_a_decoder_draws_one_grid_after_the_other():
    """Its block is of one grid: what is drawn after another is what a new one draws."""
    transformer = small_transformer(**SIZES)
    decoder, asked = decoder_for(transformer, FP32), [GRID, SQUARE, (2, 3), GRID]
    for grid in asked:
        settings = SamplerConfig(rows_per_block=2, precision="fp32", grid=grid)
        drawn = sample_codes(decoder, [1, 2, 3], [5, 6, 7], settings)
        assert drawn.shape == (3, *grid) and decoder.drawing.config.grid == grid
        assert torch.equal(drawn, sample_codes(transformer, [1, 2, 3], [5, 6, 7], settings))
        *parts, last = sample_rows(decoder, [1, 2], [5, 6], settings)
        assert [part.shape[1:] for part in parts] == [(row, grid[1]) for row in range(1, grid[0])]
        assert torch.equal(last, drawn[:2])


def test_the_first_grid_is_drawn_unless_another_is_asked_for():
    plain, several = small_transformer(vocab_size=50, width=64), small_transformer(**SIZES)
    own = sample_codes(plain, [1], [5], FP32)
    assert torch.equal(own, sample_codes(several, [1], [5], FP32)) and own.shape == (1, *SQUARE)
    square_asked = SamplerConfig(rows_per_block=2, precision="fp32", grid=SQUARE)
    assert torch.equal(own, sample_codes(plain, [1], [5], square_asked))


def test_all_grids_of_a_model_are_drawn_with_the_same_rows(monkeypatch):
    """Those that half of a GPU holds of the largest."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Memory)
    config = TransformerConfig(grids=((16, 16), (24, 24), (32, 32)), depth=16)
    rows = [settle(SamplerConfig(grid=grid), config, torch.device("cuda")) for grid in (None, *config.grids)]
    assert len({found.rows_per_block for found in rows}) == 1 and rows[0].grid == (16, 16)
    larger = settle(SamplerConfig(grid=(64, 64)), config, torch.device("cuda"))
    assert larger.rows_per_block < rows[0].rows_per_block


class Memory:
    total_memory = 16 * 2**30


# --- Compiled ---


def test_blocks_are_compiled_once_a_grid():
    transformer = small_transformer(**SIZES, depth=1).train()
    counter = CompileCounter()
    for unit in transformer.units():
        unit.compile(dynamic=False, backend=counter)
    made = []
    for grid in (SQUARE, GRID, SQUARE, (2, 3), GRID, SQUARE, (2, 3)):
        transformer(*request(transformer, grid=grid)).mean().backward()
        made.append(counter.frame_count)
    torch._dynamo.reset()
    assert made[0] > 0 and made == [made[0] * times for times in (1, 2, 2, 3, 3, 3, 3)]


@pytest.mark.parametrize("more", [{"checkpoint_selective": True}, {}])
def test_recomputed_gradients_of_two_grids_are_the_plain_ones(more):
    gradients = []
    for settings in ({}, {"gradient_checkpointing": True, **more}):
        transformer = small_transformer(**SIZES, **settings).train()
        torch.manual_seed(1)
        for grid in (GRID, SQUARE):
            transformer(*request(transformer, grid=grid)).mean().backward()
        gradients.append({name: parameter.grad for name, parameter in transformer.named_parameters()})
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])


# --- Pictures and folders ---


def test_a_view_has_the_shape_that_is_asked_for():
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    pixels = np.asarray(picture)
    assert np.array_equal(square(picture, (40, 60)), pixels), "as it is"
    assert np.array_equal(square(picture, (40, 20)), pixels[:, 20:40]), "its middle"
    assert np.array_equal(square(picture, (20, 60)), pixels[10:30])
    corner = view(picture, (40, 30), zoom=1.0, x=1.0, y=0.0, flip=True)
    assert np.array_equal(corner, pixels[:, 30:][:, ::-1])
    assert square(picture, (13, 31)).shape == (13, 31, 3)
    assert np.array_equal(square(picture, (32, 32)), square(picture, 32))
    from ibq.data.transforms import AugmentConfig

    drawn = random_square(picture, (20, 30), AugmentConfig(max_zoom=1.5), np.random.default_rng(1))
    assert drawn.shape == (20, 30, 3)


def test_a_folder_tells_its_grid_and_older_ones_are_read(tmp_path):
    meta = CodesMeta(num_codes=8, grid=(2, 3), classes=["a"], tokenizer="hash")
    codes = np.arange(12).reshape(2, 6) % 8
    write_codes(tmp_path, codes, np.zeros(2, int), meta)
    assert CodeDataset(tmp_path).batch([1])[0].tolist() == [codes[1].reshape(2, 3).tolist()]
    written = json.loads((tmp_path / META_FILE).read_text())
    assert written["grid"] == [2, 3] and "tokens_per_side" not in written
    write_codes(tmp_path, codes[:, :4], np.zeros(2, int), CodesMeta(**{**vars(meta), "grid": (2, 2)}))
    written = json.loads((tmp_path / META_FILE).read_text())
    del written["grid"]
    (tmp_path / META_FILE).write_text(json.dumps({**written, "tokens_per_side": 2}))
    assert CodeDataset(tmp_path).meta.grid == (2, 2)


# --- Bad ones ---


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([], "model.grids: is empty"),
        ([[4, 0]], "model.grids: 4 x 0 codes are none"),
        ([[4, 4], [4, 4]], "model.grids: one is there twice"),
        ([[4, 4, 4]], r"model.grids\[0\]: expected 2 values"),
        ([4, 4], r"model.grids\[0\]: expected .*write \[a, b, c\]"),
    ],
)
def test_bad_grids_of_a_model(grids, message):
    training = {"max_steps": 1, "batch_size": 8, "micro_batch": 8}
    run = {"data": {"train": "a", "validation": "b", "kind": "codes"}, "training": training}
    with pytest.raises(ConfigError, match=message):
        parse_config(ARRunConfig, {**run, "model": {"grids": grids}}, "a.yaml")


@pytest.mark.parametrize("grid", [(0, 3), (2, -1), (4,), (1, 2, 3)])
def test_bad_grids_of_a_sample(grid):
    with pytest.raises(ValueError, match=r"^grid: .*use two numbers of at least 1"):
        SamplerConfig(grid=grid)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": "a"}, "data.validation: required and missing"),
        ({"train": "a", "validation": "b", "sources": [{"train": "c", "validation": "d"}]}, "data.train: give either"),
        ({"validation": "b", "sources": [{"train": "c", "validation": "d"}]}, "data.validation: .*null"),
        ({"sources": [{"train": "c"}]}, r"data.sources\[0\].validation: required"),
        ({"sources": [{"train": "c", "validation": "d", "weight": 0}]}, r"data.sources\[0\].weight: must be positive"),
    ],
)
def test_bad_sources_of_codes(data, message):
    training = {"max_steps": 1, "batch_size": 8, "micro_batch": 8}
    with pytest.raises(ConfigError, match=message):
        parse_config(ARRunConfig, {"data": {"kind": "codes", **data}, "training": training}, "a.yaml")


@pytest.mark.parametrize("grids, ranks, fits", [(((4, 4), (3, 4)), 4, True), (((4, 4), (3, 5)), 2, False)])
def test_sequence_parallel_ranks_divide_every_grid(grids, ranks, fits):
    from ibq.config import UserError

    model = {"grids": [list(grid) for grid in grids], "depth": 2, "heads": 4, "width": 64}
    engine = {"kind": "fsdp", "tensor_parallel": ranks, "sequence_parallel": True}
    training = {"max_steps": 1, "batch_size": 8, "micro_batch": 8}
    data = {"kind": "codes", "train": "a", "validation": "b"}
    config = parse_config(ARRunConfig, {"data": data, "training": training, "model": model, "engine": engine}, "a.yaml")
    if fits:
        assert config.sharing_ranks() == ranks
    else:
        with pytest.raises(UserError, match=r"engine.tensor_parallel: 2 does not divide the 1 tokens"):
            config.sharing_ranks()
