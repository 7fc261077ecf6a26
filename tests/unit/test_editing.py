"""Editing: what is kept, what is drawn, in which order and with which noise, against a forced pass."""

import pytest
import torch
from support.models import SMALL, TOKENIZER, small_transformer
from support.training import CODES
from torch import Tensor

from ibq.api import generate
from ibq.config import parse_config
from ibq.editing import Edit
from ibq.models.heads import BitsHeadConfig, FactorisedHeadConfig, MaskedBitsHeadConfig
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import Transformer
from ibq.noise import uniforms
from ibq.pixels import codes_of, decode_in_blocks
from ibq.sampler import SamplerConfig
from ibq.sampling import pick, sample_codes, sample_rows

CLASSES, SEEDS, GRID = [1, 2, 3, 4], [5, 6, 7, 8], (3, 4)
SHAPE = {"grids": (GRID, (4, 2)), "order": "random"}
MASKS = {
    "nothing": torch.zeros(GRID, dtype=torch.bool),
    "all": torch.ones(GRID, dtype=torch.bool),
    "a hole": torch.tensor([[1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1]]).bool(),
    "a box": torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).bool(),
    "the end": torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1]]).bool(),
    "the beginning": torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool(),
}


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    return small_transformer(**SHAPE)


def given(images: int = 4, grid=GRID) -> Tensor:
    return torch.randint(SMALL["vocab_size"], (images, *grid), generator=torch.Generator().manual_seed(1))


def guided_logits(model: Transformer, codes: Tensor, order: Tensor, scale: float) -> Tensor:
    """Of codes [N, h, w] one after the other in an order [T], with the whole sequence at once."""
    orders = order.expand(len(codes), -1)
    with torch.no_grad():
        cond = model.logits(codes, torch.tensor(CLASSES), orders)
        uncond = model.logits(codes, torch.full((len(codes),), model.null_class), orders)
    return uncond + scale * (cond - uncond)


@pytest.mark.parametrize(("rows", "scale"), [(1, 2.0), (3, 1.0)])
@pytest.mark.parametrize("mask", MASKS)
def test_what_is_drawn_is_what_a_forced_pass_predicts(transformer, mask, rows, scale):
    """Greedy, and with the noise of each code's place in the picture; what is kept stays bit by bit."""
    keep, codes = MASKS[mask], given()
    kept = [i for i in range(12) if keep.flatten()[i]]
    order = torch.tensor(kept + [i for i in range(12) if i not in kept])
    for temperature in (0.0, 1.3):
        config = SamplerConfig(rows_per_block=rows, guidance_scale=scale, temperature=temperature)
        found = sample_codes(transformer, CLASSES, SEEDS, config, edit=Edit(codes=codes, keep=keep))
        assert torch.equal(found[:, keep], codes[:, keep]) and found.shape == codes.shape
        logits = guided_logits(transformer, found, order, scale)
        expected = logits.argmax(-1)
        if temperature:
            noise = uniforms(SEEDS, 12, "cpu")[:, order]
            expected = torch.cat([pick(logits[:, i] / temperature, noise[:, i : i + 1]) for i in range(12)], dim=1)
        drawn = found.flatten(1)[:, order]
        assert torch.equal(drawn[:, len(kept) :], expected[:, len(kept) :])
        changes = (expected[:, : len(kept)] != drawn[:, : len(kept)]).float().mean()
        assert not kept or changes > 0.5, "what is kept is not what would have been drawn"


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 1.0, "top_k": 9}, {"guidance_schedule": "linear"}])
@pytest.mark.parametrize("order", ["raster", "random"])
def test_to_keep_nothing_is_to_sample_and_to_keep_all_is_to_copy(order, settings):
    model = small_transformer(**(SHAPE | {"order": order}))
    config = SamplerConfig(rows_per_block=3, **settings)
    plain = sample_codes(model, CLASSES, SEEDS, config)
    for name, expected in (("nothing", plain), ("all", given())):
        edit = Edit(codes=given(), keep=MASKS[name])
        assert torch.equal(sample_codes(model, CLASSES, SEEDS, config, edit=edit), expected)
    assert not torch.equal(plain, given())


@pytest.mark.parametrize("head", [FactorisedHeadConfig(), BitsHeadConfig(), MaskedBitsHeadConfig(width=16, layers=1)])
def test_editing_with_every_head(head):
    """Whose codes take several random numbers each, which stay with the place as well."""
    model = small_transformer(**SHAPE, vocab_size=64, head=head)
    config, codes = SamplerConfig(rows_per_block=3), given() % 64
    plain = sample_codes(model, CLASSES, SEEDS, config)
    for name, keep in MASKS.items():
        found = sample_codes(model, CLASSES, SEEDS, config, edit=Edit(codes=codes, keep=keep))
        assert torch.equal(found[:, keep], codes[:, keep])
        again = sample_codes(model, CLASSES, SEEDS, config, edit=Edit(codes=found, keep=keep))
        assert torch.equal(found, again) and torch.equal(found, plain) == (name == "nothing")


def test_one_image_is_kept_for_all_or_another_for_each(transformer):
    config, keep, codes = SamplerConfig(rows_per_block=3), MASKS["a hole"], given()
    each = sample_codes(transformer, CLASSES, SEEDS, config, edit=Edit(codes=codes, keep=keep))
    for image in range(4):
        one = Edit(codes=codes[image], keep=keep)
        alone = sample_codes(transformer, CLASSES[image : image + 1], SEEDS[image : image + 1], config, edit=one)
        assert torch.equal(alone[0], each[image])
        assert torch.equal(sample_codes(transformer, CLASSES, SEEDS, config, edit=one)[image], each[image])


def test_the_grid_is_that_of_the_codes(transformer):
    codes = given(1, (4, 2))[0]
    keep = torch.arange(8).view(4, 2) % 3 == 0
    found = sample_codes(transformer, [1], [2], SamplerConfig(), edit=Edit(codes=codes, keep=keep))
    assert torch.equal(found[0, keep], codes[keep]) and (found[0] != codes).any()


@pytest.mark.parametrize("mask", ["nothing", "all", "the beginning"])
def test_a_raster_model_draws_what_comes_after(mask):
    model, codes, keep = small_transformer(grids=(GRID,)), given(), MASKS[mask]
    config = SamplerConfig(rows_per_block=3, guidance_scale=2.0, temperature=0)
    found = sample_codes(model, CLASSES, SEEDS, config, edit=Edit(codes=codes, keep=keep))
    assert torch.equal(found[:, keep], codes[:, keep])
    with torch.no_grad():
        cond, uncond = (model.logits(found, torch.tensor(some)) for some in (CLASSES, [model.null_class] * 4))
    assert torch.equal((uncond + 2.0 * (cond - uncond)).argmax(-1).view(4, *GRID)[:, ~keep], found[:, ~keep])


def test_watched_what_is_not_drawn_yet_is_as_it_was(transformer):
    edit, config = Edit(codes=given(3), keep=MASKS["a box"]), SamplerConfig(rows_per_block=4)
    expected = sample_codes(transformer, [1, 2, 3], [5, 6, 7], config, edit=edit)
    seen = list(sample_rows(transformer, [1, 2, 3], [5, 6, 7], config, edit))
    assert torch.equal(seen[-1], expected) and not seen[0].is_inference()
    for number, codes in enumerate(seen, start=1):
        drawn = edit.order[4 : 4 * number]
        assert torch.equal(codes.flatten(1)[:, drawn], expected.flatten(1)[:, drawn])
        later = edit.order[max(4, 4 * number) :]
        assert torch.equal(codes.flatten(1)[:, later], edit.codes.flatten(1)[:, later])


@pytest.mark.parametrize(
    ("codes", "keep", "message"),
    [
        (given().float(), MASKS["a hole"], r"codes: \[4, 3, 4\] of torch.float32; give int64 codes"),
        (given()[0, 0], MASKS["a hole"], r"codes: \[4\] of torch.int64; give int64 codes \[h, w\] or \[N, h, w\]"),
        (given(), MASKS["a hole"].T, r"keep: \[4, 3\] of torch.bool; give a bool mask of the 3 x 4 codes"),
        (given(), MASKS["a hole"].int(), r"keep: \[3, 4\] of torch.int32; give a bool mask"),
        (given(3), MASKS["a hole"], "codes: of 3 images, for 4 to be drawn; give one each"),
        (given() + 1, MASKS["a hole"], "codes: 1 to 50 go beyond the model's 0 to 49; give its own"),
    ],
)
def test_impossible_edits(transformer, codes, keep, message):
    with pytest.raises(ValueError, match=message) as caught:
        sample_codes(transformer, CLASSES, SEEDS, SamplerConfig(), edit=Edit(codes=codes, keep=keep))
    assert "\n" not in str(caught.value)


def test_edits_that_the_model_or_the_settings_do_not_allow(transformer):
    edit = Edit(codes=given(), keep=MASKS["a hole"])
    with pytest.raises(ValueError, match=r"grid: 4 x 2 codes are to be drawn, but those to keep are 3 x 4"):
        sample_codes(transformer, CLASSES, SEEDS, SamplerConfig(grid=(4, 2)), edit=edit)
    with pytest.raises(ValueError, match=r"^keep: a model of raster order .* train one with order: random$"):
        sample_codes(small_transformer(grids=(GRID,)), CLASSES, SEEDS, SamplerConfig(), edit=edit)


# --- With pixels ---


def test_generate_keeps_codes_or_those_of_images():
    torch.manual_seed(0)
    tokenizer = Tokenizer(parse_config(TokenizerConfig, TOKENIZER)).eval()
    model = small_transformer(vocab_size=CODES, grids=(GRID,), order="random")
    images = torch.randint(256, (4, 3, 12, 16)).byte()
    codes, keep = codes_of(tokenizer, images), MASKS["a hole"]
    assert torch.equal(codes_of(tokenizer, images[1:2]), codes[1:2])
    found = generate(tokenizer, model, CLASSES, seed=5, keep=keep, images=images)
    config = SamplerConfig(rows_per_block=16)
    expected = sample_codes(model, CLASSES, SEEDS, config, edit=Edit(codes=codes, keep=keep))
    assert torch.equal(found, decode_in_blocks(tokenizer, expected))
    assert torch.equal(generate(tokenizer, model, CLASSES, seed=5, keep=keep, codes=codes), found)
    one = [
        generate(tokenizer, model, CLASSES, keep=keep, **some) for some in ({"images": images[0]}, {"codes": codes[0]})
    ]
    assert torch.equal(*one) and one[0].shape == found.shape
    for wrong in ({"keep": keep}, {"codes": codes}, {"keep": keep, "codes": codes, "images": images}):
        with pytest.raises(ValueError, match="keep: goes with either `codes` or `images`"):
            generate(tokenizer, model, CLASSES, **wrong)
    for wrong in (images / 255, images[0, 0]):
        with pytest.raises(ValueError, match=r"images: \[.*\] of torch.*; give uint8 pixels"):
            generate(tokenizer, model, CLASSES, keep=keep, images=wrong)
    assert torch.equal(generate(tokenizer, model, CLASSES, seed=5, keep=keep, codes=codes, grid=[*GRID]), found)
