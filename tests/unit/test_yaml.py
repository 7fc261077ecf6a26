"""The published models' YAML files describe the published models."""

from dataclasses import replace

import pytest
import torch
from support import ROOT
from support.golden import golden_json

from ibq.config import load_config
from ibq.models.feature_discriminator import FeaturesDiscriminatorConfig
from ibq.models.heads import FactorisedHeadConfig
from ibq.models.tokenizer import Tokenizer
from ibq.models.transformer import Transformer
from ibq.training.ar_config import ARRunConfig
from ibq.training.tokenizer_config import TokenizerRunConfig

YAML = ROOT / "yaml"


@pytest.mark.parametrize("num_codes", [1024, 8192, 16384, 262144])
def test_tokenizer_files(num_codes):
    config = load_config(TokenizerRunConfig, YAML / f"tokenizer_{num_codes}.yaml")
    with torch.device("meta"):
        model = Tokenizer(config.model)
    counts = {name: sum(p.numel() for p in m.parameters()) for name, m in model.named_children()}
    published = golden_json("official_shapes")["tokenizer"]["parameter_counts"][str(num_codes)]
    assert {name: published[name] for name in counts} == counts
    schedule = golden_json("lr_schedule")["tokenizer"]
    assert list(config.schedule.drop_epochs) == schedule["lr_drop_epoch"][str(num_codes)]
    assert config.training.epochs == schedule["max_epochs"][str(num_codes)]
    assert config.training.batch_size == 256 and config.optimizer.betas == (0.5, 0.9)


@pytest.mark.parametrize("size", ["b", "l", "xl", "xxl"])
def test_transformer_files(size):
    config = load_config(ARRunConfig, YAML / f"{size}.yaml")
    with torch.device("meta"):
        model = Transformer(config.model)
    published = golden_json("official_shapes")["ar"]["models"][size.upper()]
    assert sum(p.numel() for p in model.parameters()) == published["parameter_counts"]["transformer_total"]
    official = golden_json("lr_schedule")["ar"]["official"][size.upper()]
    assert config.schedule.warmup_epochs == official["wp"]
    assert config.schedule.end == official["wpe"]
    assert config.schedule.end_weight_decay == official["twde"]
    assert config.training.epochs == official["max_epochs"]
    assert config.model.adaln_gamma_init == official["alng"]
    assert config.training.micro_batch == official["batch_per_gpu"]
    assert config.training.batch_size == official["gpus"] * official["batch_per_gpu"]
    assert config.optimizer.peak_learning_rate(config.training.batch_size) == pytest.approx(3e-4)


@pytest.mark.parametrize("kind, name", [(TokenizerRunConfig, "tokenizer"), (ARRunConfig, "transformer")])
def test_quickstart_files(kind, name):
    load_config(kind, YAML / f"quickstart/{name}.yaml")


def test_the_file_of_the_discriminator_on_features():
    """The 262,144 codes with another discriminator, and nothing else."""
    files = (YAML / f"tokenizer_262144{name}.yaml" for name in ("", "_features"))
    plain, other = (load_config(TokenizerRunConfig, file) for file in files)
    gan = replace(plain.loss.gan, discriminator=FeaturesDiscriminatorConfig())
    assert replace(plain, output=other.output, loss=replace(plain.loss, gan=gan)) == other
    found = other.loss.gan.discriminator
    assert (found.layers, found.kernel, found.norm_images, found.side, found.crop) == ((0, 3, 6, 9, 12), 9, 8, 224, 0.5)
    assert (found.augment, found.cutout, found.spectral_norm) == (1.0, 0.2, True)


IMAGENET = 1_281_167


@pytest.mark.parametrize("num_codes", [16384, 262144])
def test_short_tokenizer_files(num_codes):
    """What the length changes, and nothing else: drops at the same share of the run, the same rate and batch."""
    long = load_config(TokenizerRunConfig, YAML / f"tokenizer_{num_codes}.yaml")
    short = load_config(TokenizerRunConfig, YAML / f"short/tokenizer_{num_codes}.yaml")
    assert short.training.epochs == 50 and short.training.total_steps(IMAGENET / 256) == 250_228
    shares = [round(50 * drop / long.training.epochs) for drop in long.schedule.drop_epochs]
    assert list(short.schedule.drop_epochs) == shares == [38, 45]
    training = replace(long.training, epochs=50, micro_batch="auto")
    schedule = replace(long.schedule, drop_epochs=(38, 45))
    assert replace(long, output=short.output, training=training, schedule=schedule) == short
    rates = [short.schedule.learning_rate(1e-4, 5_004.5 * epoch + 1, 5_004.5, 0) for epoch in (0, 37, 38, 44, 45, 49)]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6])


def test_random_order_file():
    plain, random = (load_config(ARRunConfig, YAML / name) for name in ("b.yaml", "b_random_order.yaml"))
    assert replace(plain, output=random.output, model=replace(plain.model, order="random")) == random
    with torch.device("meta"):
        added = dict(Transformer(random.model).named_parameters())["target_emb.weight"]
    assert tuple(added.shape) == (256, 1024) and 342_994_944 + added.numel() == 343_257_088
    shares = [random.order_annealing.random_share(s, steps_per_epoch=1, total_steps=400) for s in (199, 250, 300)]
    assert shares == [1, 0.5, 0]


@pytest.mark.parametrize(("size", "layers", "count"), [("b", 2, 343_654_400), ("l", 3, 679_303_680)])
def test_files_of_262144_codes(size, layers, count):
    plain, many = (load_config(ARRunConfig, YAML / f"{name}.yaml") for name in (size, f"{size}_262144"))
    head = FactorisedHeadConfig(sub_codes=(64, 4096), layers=layers)
    data = replace(plain.data, train="data/codes_262144/train", validation="data/codes_262144/val")
    assert (
        replace(plain, output=many.output, data=data, model=replace(plain.model, vocab_size=2**18, head=head)) == many
    )
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(many.model).parameters()) == count


def test_short_transformer_file():
    long, short = (load_config(ARRunConfig, YAML / name) for name in ("b.yaml", "short/b.yaml"))
    assert short.training.epochs == 100 and short.training.total_steps(IMAGENET / 768) == 166_819
    assert short.schedule.warmup_epochs / 100 == long.schedule.warmup_epochs / long.training.epochs
    training = replace(long.training, epochs=100, micro_batch="auto")
    schedule = replace(long.schedule, warmup_epochs=2.0)
    assert replace(long, output=short.output, training=training, schedule=schedule) == short
    assert short.optimizer.peak_learning_rate(768) == pytest.approx(3e-4)
    assert short.optimizer.peak_learning_rate(256) == pytest.approx(1e-4), "in proportion to the batch"


def test_frontier_files():
    """Each goes on from what the one before leaves; beside the published ones they differ in what their page lists."""
    files = (YAML / "frontier" / name for name in ("tokenizer.yaml", "decoder.yaml"))
    tokenizer, decoder = (load_config(TokenizerRunConfig, file) for file in files)
    transformer = load_config(ARRunConfig, YAML / "frontier/transformer.yaml")
    assert decoder.start_from == tokenizer.output and decoder.codes.transformer == transformer.output
    assert decoder.model == tokenizer.model and decoder.loss == tokenizer.loss
    assert tokenizer.model.quantizer.num_codes == transformer.model.vocab_size
    assert tokenizer.loss.gan.discriminator.kind == "features" and transformer.model.order == "random"
    published = load_config(TokenizerRunConfig, YAML / "tokenizer_16384.yaml")
    assert replace(tokenizer, output=published.output, model=published.model, loss=published.loss) == published
