"""Codes that a decoder is trained on alone: perturbed and generated ones against their formulas, and a step on them."""

import math

import pytest
import torch
from support import ROOT
from support.models import SMALL, TOKENIZER, small_transformer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ibq.config import ConfigError, UserError, load_config, parse_config
from ibq.engine.base import EngineSettings, OptimizerConfig
from ibq.engine.blueprint import Blueprint
from ibq.engine.local import LocalEngine
from ibq.models.discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.ops.codebook import nearest_codes
from ibq.scaling.layouts import Layout, Training
from ibq.scaling.networks import TokenizerLosses
from ibq.scaling.plan import DecoderStage, TokenizerStage, bytes_needed
from ibq.training.metrics import Stopwatch
from ibq.training.post_training import (
    GeneratedCodesConfig,
    Generation,
    Perturbation,
    PerturbedCodesConfig,
    frozen_groups,
    perturb,
    same_numbers,
)
from ibq.training.tokenizer_config import GanConfig, TokenizerLossConfig, TokenizerRunConfig
from ibq.training.tokenizer_task import TokenizerTask
from launchers.lib.sweep.grid import SweepConfig, runs_of
from tools import sample

CPU = torch.device("cpu")
GRID, ROWS = (3, 2), 4


def request(grid=GRID, rows=ROWS, seed=0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SMALL["vocab_size"], (rows, *grid), generator=generator), torch.arange(rows)


# --- Perturbed ---


def test_nearest_codes_are_those_of_the_table_of_distances():
    vectors = torch.randn(600, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # some tiles
    expected = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist").argsort(dim=1)[:, :7]
    found = nearest_codes(vectors, 7)
    assert torch.equal(found.long(), expected) and torch.equal(found[:, 0].long(), torch.arange(600))
    assert nearest_codes(vectors[:3], 7).shape == (3, 3)


def test_a_share_of_the_codes_of_some_images_becomes_one_of_the_nearest_each_as_likely():
    """Within five standard deviations of the binomial distribution."""
    torch.manual_seed(0)
    vectors, rows, tokens, images, share, count = torch.randn(40, 3), 3000, 16, 0.3, 0.6, 4
    codes, nearest = torch.randint(40, (rows, 4, 4)), nearest_codes(vectors, count)
    changed = perturb(codes, nearest, images=images, share=share)
    places = (changed[..., None] == nearest[codes]).long()
    assert places.sum(-1).eq(1).all()  # each is one of its nearest
    touched = (changed != codes).flatten(1)
    # Of a perturbed image a code changes with probability share (1 - 1 / count), as one of the nearest is itself.
    rate = share * (1 - 1 / count)
    some = images * (1 - (1 - rate) ** tokens)
    assert abs(touched.any(1).float().mean() - some) < 5 * math.sqrt(some * (1 - some) / rows)
    within = touched[touched.any(1)].float().mean() * (1 - (1 - rate) ** tokens)
    assert within == pytest.approx(rate, abs=5 * math.sqrt(rate / (images * rows * tokens)))
    often = places[changed != codes].float().mean(0)
    assert often[0] == 0 and often[1:].sub(1 / 3).abs().max() < 5 * math.sqrt(2 / 9 / int(touched.sum()))


def test_rate_and_strength_are_annealed_as_published():
    """Ratio 1 before the start, then linearly to one half at the end: of alpha, and of delta rounded down."""
    config = PerturbedCodesConfig(images=1.0, share=0.8, neighbours=10, start=0.25, end=0.75)
    seen = []

    def noted(codes, nearest, *, images, share):
        seen.append((nearest.shape[1], images, share))
        return codes

    change = Perturbation(config, lambda: torch.randn(20, 3), progress=lambda step: step / 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ibq.training.post_training.perturb", noted)
        for step in range(9):
            change(*request(), step)
    ratios = [1, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.5, 0.5]
    assert [count for count, *_ in seen] == [math.floor(10 * ratio) for ratio in ratios]
    assert [share for *_, share in seen] == pytest.approx([0.8 * ratio for ratio in ratios])
    assert {images for _, images, _ in seen} == {1.0}


# --- Generated ---


def textbook(transformer, config: GeneratedCodesConfig, codes: Tensor, classes: Tensor) -> Tensor:
    """One code after the other, by whole passes without a cache, guidance and inverse of the distribution in loops."""
    kept = torch.rand(codes.shape) < config.keep
    numbers = torch.rand(codes.shape, dtype=torch.float64)
    tokens, mixed = codes[0].numel(), codes.clone().flatten(1)
    for row, label in enumerate(classes.tolist()):
        for i in range(tokens):
            if kept.flatten(1)[row, i]:
                continue
            prefix = codes[row] if config.prefix == "image" else mixed[row].view(GRID)
            with_class, without = (
                transformer.logits(prefix[None], torch.tensor([c]))[0, i] for c in (label, transformer.null_class)
            )
            t = i / (tokens - 1)
            s = 1 + (config.guidance_scale - 1) * (1 - math.cos(math.pi * t**config.guidance_power)) / 2
            p = ((without + s * (with_class - without)) / config.temperature).softmax(0)
            total, code = float(p[0]), 0
            while total <= float(numbers.flatten(1)[row, i]):
                code += 1
                total += float(p[code])
            mixed[row, i] = code
    return mixed.view_as(codes)


@pytest.mark.parametrize("prefix", ["image", "drawn"])
@torch.no_grad()
def test_generated_codes_are_those_of_the_textbook(prefix):
    transformer = small_transformer().double()
    config = GeneratedCodesConfig(
        transformer="", keep=0.4, prefix=prefix, temperature=0.7, guidance_scale=3.0, guidance_schedule="power-cosine",
        guidance_power=1.15,
    )  # fmt: skip
    codes, classes = request()
    torch.manual_seed(1)
    expected = textbook(transformer, config, codes, classes)
    torch.manual_seed(1)
    assert torch.equal(Generation(config, transformer)(codes, classes, 0), expected)
    assert 0.3 < (expected != codes).double().mean() < 0.8


@pytest.mark.parametrize("prefix", ["image", "drawn"])
def test_a_transformer_in_bfloat16_draws_nearly_the_same_also_under_autocast(prefix):
    config, found = GeneratedCodesConfig(transformer="", keep=0.3, prefix=prefix), []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(Generation(config, small_transformer().to(dtype))(*request((4, 4)), 0))
    assert (found[0] == found[1]).double().mean() > 0.7 > 0.5 > (found[0] == request((4, 4))[0]).double().mean()


@torch.no_grad()
def test_freely_drawn_codes_know_nothing_of_the_image():
    config = GeneratedCodesConfig(transformer="", keep=0, prefix="drawn", guidance_scale=1.0)
    generation, found = Generation(config, small_transformer()), []
    for seed in (0, 1):
        torch.manual_seed(5)
        found.append(generation(*request(seed=seed), 0))
    assert torch.equal(*found)


def test_validation_draws_the_same_numbers_and_training_goes_on_as_before():
    torch.manual_seed(3)
    first = []
    for _ in range(2):
        with same_numbers(CPU):
            first.append(torch.rand(3))
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(*first) and torch.equal(torch.rand(3), after)


# --- A step ---


def task_of(change=None, *, gan=None, accumulation=1, dropout=0.0) -> TokenizerTask:
    model = parse_config(TokenizerConfig, TOKENIZER | {"dropout": dropout})

    def build() -> Tokenizer:
        return Tokenizer(model)

    groups = frozen_groups(build) if change else {}
    settings = EngineSettings(
        optimizer=OptimizerConfig(kind="sgd", groups=groups), device=CPU, accumulation=accumulation
    )
    judge = EngineSettings(optimizer=OptimizerConfig(kind="sgd"), device=CPU, accumulation=accumulation)
    small = PatchDiscriminatorConfig(channels=4, layers=2)
    task = TokenizerTask(
        LocalEngine(Blueprint(name="tokenizer", build=build, seed=0), settings),
        gan and LocalEngine(Blueprint(name="judge", build=lambda: PatchDiscriminator(small), seed=0), judge),
        TokenizerLossConfig(gan=GanConfig(weight=1.0, judged_by=gan or "updated", discriminator=small)),
        perceptual=None,
        learning_rate=lambda step: 0.1,
        change_codes=change,
    )
    return task


class Shifted:
    """In place of each code the next; and notes what it was asked for."""

    config = PerturbedCodesConfig()

    def __init__(self):
        self.asked: list[Tensor] = []

    def __call__(self, codes, classes, step):
        self.asked.append(codes)
        return (codes + 1 + classes[:, None, None]) % TOKENIZER["quantizer"]["num_codes"]


IMAGES = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 3


def batches(parts: int) -> list[tuple[Tensor, Tensor]]:
    return [*zip(IMAGES.chunk(parts), LABELS.chunk(parts), strict=True)]


def weights(module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def test_a_step_is_that_of_the_reconstruction_loss_of_the_changed_codes():
    """Written out: L1 between the images and what the decoder makes of the codes; nothing else has a gradient."""
    task = task_of(Shifted())
    copy = Tokenizer(task.tokenizer.config)
    copy.load_state_dict(task.tokenizer.state_dict())
    before, x = weights(copy), IMAGES.float() / 127.5 - 1
    codes = (copy.encode(x) + 1 + LABELS[:, None, None]) % 32
    rows = copy.quantizer.codebook.detach()[codes].permute(0, 3, 1, 2)
    (copy.decoder(copy.post_quant_conv(rows)) - x).abs().mean().backward()
    outcome = task.step(0, batches(1), Stopwatch(CPU))
    assert not outcome.skipped and float(outcome.metrics["codes/changed"]) == 1
    assert {name.split("/")[0] for name in outcome.metrics} == {"codes", "gradient_norm", "learning_rate", "loss"}
    for name, parameter in copy.named_parameters():
        trained = name.startswith(("decoder.", "post_quant_conv."))
        assert trained == (parameter.grad is not None), name
        expected = before[name] - 0.1 * parameter.grad if trained else before[name]
        torch.testing.assert_close(task.tokenizer.state_dict()[name], expected)


@pytest.mark.parametrize("judged_by", ["updated", "previous"])
def test_both_networks_see_the_same_changed_codes_also_in_micro_batches(judged_by):
    """Codes are changed once for each micro-batch, though it may go through the decoder twice."""
    whole, split = task_of(Shifted(), gan=judged_by), task_of(Shifted(), gan=judged_by, accumulation=2)
    for task, parts in ((whole, 1), (split, 2)):
        seen: list[Tensor] = []
        task.tokenizer.register_forward_hook(lambda module, inputs, out, seen=seen: seen.append(out.codes))
        assert not task.step(0, batches(parts), Stopwatch(CPU)).skipped
        assert len(task.change_codes.asked) == parts
        once = torch.cat(seen[:parts])
        passes = 2 if judged_by == "updated" and parts == 2 else 1
        assert len(seen) == passes * parts and torch.equal(torch.cat(seen), once.repeat(passes, 1, 1))


def test_codes_stay_bit_by_bit_under_dropout_and_whatever_is_learned():
    task = task_of(Shifted(), gan="updated", dropout=0.5)
    x = IMAGES.float() / 127.5 - 1
    task.tokenizer.eval()
    before, codes = weights(task.tokenizer), task.tokenizer.encode(x)
    task._to_training()
    assert task.tokenizer.decoder.training
    for step in range(2):
        task.step(step, batches(1), Stopwatch(CPU))
        validation = task.validate(batches(2))
    assert all(torch.equal(asked, codes) for asked in (task.change_codes.asked[0], task.change_codes.asked[3]))
    task.tokenizer.eval()
    assert torch.equal(task.tokenizer.encode(x), codes)
    changed = {name for name, tensor in weights(task.tokenizer).items() if not torch.equal(tensor, before[name])}
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
    assert {name for name in before if name.startswith("decoder.") and name.endswith("conv2.weight")} <= changed
    assert validation.score == validation.metrics["psnr_perturbed"] != validation.metrics["psnr"]


def test_figures_of_changed_codes_are_those_of_what_the_decoder_makes_of_them():
    task = task_of(Shifted())
    metrics = task.validate(batches(2)).metrics
    x = IMAGES.float() / 127.5 - 1
    with torch.no_grad():
        decoded = task.tokenizer.decode(task.change_codes(task.tokenizer.encode(x), LABELS, 0))
    pixels = ((decoded.clamp(-1, 1) + 1) * 127.5).round()
    psnr = -10 * ((pixels - IMAGES.float()) / 255).double().square().flatten(1).mean(1).log10()
    assert metrics["psnr_perturbed"] == pytest.approx(float(psnr.mean()), abs=1e-3)
    assert metrics["l1_perturbed"] == pytest.approx(float((decoded - x).abs().mean()), rel=1e-4)
    assert metrics["images"] == 6 and "psnr_perturbed" not in task_of().validate(batches(2)).metrics


# --- Settings that cannot work ---


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"codes": {"kind": "perturbed"}}, "codes: perturbed trains the decoder of a trained tokenizer; give it as st"),
        ({"codes": {"kind": "perturbed", "images": 0}, "start_from": "a"}, "codes.images: must lie in"),
        ({"codes": {"kind": "perturbed", "neighbours": 1}, "start_from": "a"}, "codes.neighbours: must be at least 2"),
        ({"codes": {"kind": "perturbed", "start": 0.7, "end": 0.5}, "start_from": "a"}, "codes.start: must lie betwe"),
        ({"codes": {"kind": "perturbed", "last": 0}, "start_from": "a"}, "codes.last: must lie in"),
        ({"codes": {"kind": "generated"}, "start_from": "a"}, "codes.transformer: required and missing"),
        ({"codes": {"kind": "generated", "transformer": "b", "keep": 1}, "start_from": "a"}, "codes.keep: must lie"),
        ({"codes": {"kind": "generated", "transformer": "b", "keep": 0}, "start_from": "a"}, "set prefix=drawn"),
        ({"codes": {"kind": "generated", "transformer": "b", "top_p": 2}, "start_from": "a"}, "codes.top_p: 2"),
        (
            {"codes": {"kind": "perturbed"}, "start_from": {"place": "a", "codebook": "new"}},
            "codes: perturbed leaves the codes as they are; set start_from.codebook=same",
        ),
        (
            {"codes": {"kind": "perturbed"}, "start_from": "a", "optimizer": {"groups": {"quant*": "frozen"}}},
            "optimizer.groups: quant* is of what makes codes, which codes: perturbed freezes by itself; leave it out",
        ),
        (
            {
                "codes": {"kind": "generated", "transformer": "b"},
                "start_from": "a",
                "training": {"max_steps": 1, "micro_batch": "auto"},
            },
            "training.micro_batch: auto does not count codes.transformer; give a number",
        ),
    ],
)
def test_settings_that_cannot_work(settings, words):
    tree = {"data": {"train": "x"}, "training": {"max_steps": 1}} | settings
    with pytest.raises(ConfigError) as error:
        parse_config(TokenizerRunConfig, tree)
    assert words in str(error.value) and str(error.value).count("\n") == 0


def test_groups_that_would_train_what_makes_codes_are_refused():
    """Others are not, such as those of the decoder, or of all convolutions."""
    tree = {"data": {"train": "x"}, "training": {"max_steps": 1}, "codes": {"kind": "perturbed"}, "start_from": "a"}
    groups = {"decoder.conv_out.*": 0.5, "*conv*": 0.1}
    assert parse_config(TokenizerRunConfig, tree | {"optimizer": {"groups": groups}}).optimizer.groups == groups
    model = parse_config(TokenizerConfig, TOKENIZER)

    def build() -> Tokenizer:
        return Tokenizer(model)

    own = frozen_groups(build)
    assert own == dict.fromkeys(("encoder.*", "quant_conv.*", "quantizer.*"), "frozen")
    lookup_free = parse_config(TokenizerConfig, TOKENIZER | {"quantizer": {"kind": "lfq", "dim": 5}})
    assert list(frozen_groups(lambda: Tokenizer(lookup_free))) == ["encoder.*", "quant_conv.*"]
    settings = EngineSettings(optimizer=OptimizerConfig(groups=own | {"encoder.conv_in.*": 0.5}), device=CPU)
    with pytest.raises(UserError, match=r"encoder.conv_in.\* comes after patterns that match all of its parameters"):
        LocalEngine(Blueprint(name="tokenizer", build=build, seed=0), settings)


# --- The plan ---


def test_the_plan_of_a_decoder_alone():
    """FLOPs as counted; weights, gradients and moments of the decoder, and nothing saved of the encoder."""
    model = parse_config(TokenizerConfig, TOKENIZER)
    losses = TokenizerLosses(discriminator=None, perceptual=False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tokenizer = Tokenizer(model)
        for pattern in frozen_groups(lambda: Tokenizer(model)):
            tokenizer.get_submodule(pattern.removesuffix(".*")).requires_grad_(False)
        with torch.no_grad():
            latents = tokenizer.encode_latents(torch.zeros(2, 3, 16, 16))
        loss = tokenizer(None, False, torch.zeros(2, 4, 4, dtype=torch.int64)).reconstruction.mean()
        forward = counter.get_total_flops() + 2 * latents.numel() * 32  # and the search among 32 codes
        loss.backward()
        backward = counter.get_total_flops() - forward + 2 * latents.numel() * 32
    alone, whole = DecoderStage(model, losses), TokenizerStage(model, losses)
    flops = alone.flops()["tokenizer"]
    assert (2 * flops.forward, 2 * flops.backward) == (forward, backward)
    layout, training = Layout(kind="local", gpus=1), Training(precision="fp32", micro_batch=2, batch_size=2)
    trained = sum(p.numel() for p in tokenizer.parameters() if p.requires_grad)
    networks = [stage.network(layout, training) for stage in (alone, whole)]
    assert networks[0].elements == trained < networks[1].elements
    assert alone.parameters() == whole.parameters()
    frozen = sum(p.numel() for p in tokenizer.parameters() if not p.requires_grad)
    assert networks[0].extra - networks[1].extra >= 4 * frozen
    sizes = [bytes_needed(stage, layout, training, 2) for stage in (alone, whole)]
    assert sizes[0] < 0.8 * sizes[1]


# --- The sweep ---


def test_the_sweep_measures_each_decoder_by_the_same_drawn_codes(monkeypatch):
    monkeypatch.chdir(ROOT)
    file = "yaml/ablations/post_training.yaml"
    config = load_config(SweepConfig, file)
    runs = runs_of(config, file)
    assert {run.name for run in runs} == {f"{n}.seed-{s}" for n in ("own", "perturbed", "generated") for s in range(3)}
    for run in runs:
        assert [part.name for part in run.parts] == ["train", "reconstruction", "usage", "sample", "generation"]
        script, *argv = run.parts[3].command
        asked = sample.parse(argv)
        assert script == "tools/sample.py" and asked.tokenizer == str(run.folder)
        assert asked.transformer == config.generation.transformer and asked.guidance_scale == 1.5
    for settings in (["generation.transformer=null"], ["generation.tokenizer=runs/a"]):
        with pytest.raises(ConfigError, match=r"generation.tokenizer: give it where the runs are transformers"):
            load_config(SweepConfig, file, settings)
