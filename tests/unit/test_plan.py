"""The planner's arithmetic against what PyTorch counts and allocates, and its command line."""

import json
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from support import ROOT
from support.golden import golden_json
from support.peak_memory import peak_of_step
from support.processes import run_ranks
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ibq.config import exit_on_user_error, load_section, parse_config
from ibq.engine.tensor_parallel import tensor_piece
from ibq.losses import gram_loss
from ibq.models.code_order import draw_orders
from ibq.models.discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from ibq.models.feature_discriminator import FeatureDiscriminator, FeaturesDiscriminatorConfig
from ibq.models.frozen_features import FrozenFeatures
from ibq.models.perceptual import PerceptualConfig, build_perceptual, perceptual_features
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.models.vision_transformer import VisionTransformerConfig
from ibq.ops import textbook
from ibq.quantizers import (
    BSQConfig,
    FSQConfig,
    IBQConfig,
    LFQConfig,
    LinearProjectorConfig,
    SimVQConfig,
    VQBridgeConfig,
    VQConfig,
    build_quantizer,
)
from ibq.scaling.layouts import Layout, Training, numerics, rules
from ibq.scaling.memory import peak_memory
from ibq.scaling.networks import TokenizerLosses, tokenizer_network, transformer_network
from ibq.scaling.plan import TransformerStage
from ibq.scaling.tokenizer import quantizer_parameters, tokenizer_flops, tokenizer_parts
from ibq.scaling.tokenizer_losses import (
    discriminator_flops,
    discriminator_layers,
    feature_layers,
    gram_flops,
    perceptual_flops,
    perceptual_layers,
)
from ibq.scaling.traffic import parameter_traffic, ring, tensor_traffic
from ibq.scaling.transformer import (
    Numerics,
    block_kept,
    head_saved,
    recomputed_blocks,
    root_saved,
    transformer_flops,
    transformer_parameters,
    transformer_weights,
)
from tools.plan import LOOKED_AT, TokenizerPlan, TransformerPlan, main

YAML = ROOT / "yaml"
BATCH = 5
SMALL = {"vocab_size": 96, "num_classes": 5, "tokens_per_side": 4, "depth": 3, "heads": 4, "width": 64}
TRANSFORMERS = {
    "plain": {},
    "grouped": {"kv_heads": 2},
    "shared norms": {"shared_adaln": True, "tokens_per_side": 6},
}
TOKENIZER = {
    "resolution": 32,
    "channels": 32,
    "channel_multipliers": (1, 2),
    "res_blocks": 2,
    "attention_resolutions": (16,),
    "latent_channels": 48,
    "norm_groups": 8,
    "quantizer": IBQConfig(num_codes=256, dim=40),
}
PRECISE = Numerics(stream=4, compute=4, root=4, device="cpu")
PRECISIONS = {
    "float32": PRECISE,
    "autocast": Numerics(stream=4, compute=2, root=4, casts=True, device="cpu"),
    "bfloat16": Numerics(stream=2, compute=2, root=2, device="cpu"),
}


# --- Parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["b", "l", "xl", "xxl"])
def test_parameters_of_the_published_transformers(size):
    config = load_section(TransformerConfig, YAML / f"{size}.yaml", "model")
    published = golden_json("official_shapes")["ar"]["models"][size.upper()]["parameter_counts"]["transformer_total"]
    with torch.device("meta"):
        built = sum(p.numel() for p in Transformer(config).parameters())
    assert transformer_parameters(config) == published == built
    assert sum(TransformerStage(config).parameters().values()) == published


def test_parameters_of_random_orders():
    config = TransformerConfig(**SMALL, grids=((2, 6), (4, 3)), order="random")
    with torch.device("meta"):
        built = sum(p.numel() for p in Transformer(config).parameters())
    assert transformer_parameters(config) == built
    assert built - transformer_parameters(replace(config, order="raster")) == 4 * 6 * 64


@pytest.mark.parametrize("num_codes", [1024, 8192, 16384, 262144])
def test_parameters_of_the_published_tokenizers(num_codes):
    config = load_section(TokenizerConfig, YAML / f"tokenizer_{num_codes}.yaml", "model")
    with torch.device("meta"):
        built = sum(p.numel() for p in Tokenizer(config).parameters())
    assert sum(part.parameters for part in tokenizer_parts(config, PRECISE)) == built


@pytest.mark.parametrize(
    "config",
    [
        IBQConfig(num_codes=64, dim=12),
        IBQConfig(num_codes=64, dim=12, projector=LinearProjectorConfig()),
        VQConfig(num_codes=64, dim=12, projector=VQBridgeConfig(group=8, width=16, heads=2)),
        SimVQConfig(num_codes=64, dim=12),
        LFQConfig(),
        BSQConfig(),
        FSQConfig(),
    ],
    ids=lambda config: config.kind,
)
def test_parameters_of_quantizers(config):
    built = build_quantizer(config)
    assert quantizer_parameters(config) == sum(p.numel() for p in built.parameters())


# --- FLOPs ----------------------------------------------------------------------------------------


def counted(call) -> tuple[int, int]:
    """FLOPs of a forward and of its backward pass in the textbook form."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = call()
        forward = counter.get_total_flops()
        loss.backward()
        return forward, counter.get_total_flops() - forward


def textbook_loss(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")


@pytest.mark.parametrize("settings", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_flops_of_transformers(settings):
    config = TransformerConfig(**{**SMALL, **settings})
    with torch.device("meta"):
        model = Transformer(config)
        model.head.loss = textbook_loss
        codes, classes = torch.zeros(BATCH, config.num_tokens, dtype=torch.int64), torch.zeros(BATCH, dtype=torch.int64)
        found = counted(lambda: model(codes, classes).mean())
    flops = transformer_flops(config)
    assert found == (BATCH * flops.forward, BATCH * flops.backward)
    assert transformer_parameters(config) == sum(p.numel() for p in model.parameters())


def test_recomputed_flops_of_transformers():
    """Full checkpointing runs every recomputed block's products again; selective checkpointing none."""
    with torch.device("meta"):
        codes, classes = torch.zeros(BATCH, 16, dtype=torch.int64), torch.zeros(BATCH, dtype=torch.int64)

    def extra(**settings):
        config = TransformerConfig(**SMALL, gradient_checkpointing=True, **settings)
        with torch.device("meta"):
            model = Transformer(config)
        model.head.loss = textbook_loss
        found, flops = counted(lambda: model(codes, classes).mean()), transformer_flops(config)
        again = found[1] - BATCH * flops.backward
        return again, BATCH * (flops.recomputed - transformer_flops(TransformerConfig(**SMALL)).recomputed)

    for settings in ({}, {"checkpoint_every": 2}, {"checkpoint_selective": True}):
        found, planned = extra(**settings)
        assert found == planned and (planned == 0) == ("checkpoint_selective" in settings)


def test_flops_of_tokenizers():
    config = TokenizerConfig(**TOKENIZER)
    with torch.device("meta"):
        model, images = Tokenizer(config), torch.rand(BATCH, 3, 32, 32)

    def loss():
        z = model.encode_latents(images)
        tokens = z.permute(0, 2, 3, 1).reshape(-1, 40)
        found = textbook.index_backprop(tokens, model.quantizer.codebook, beta=0.25, temperature=0.1)
        latents = found.latents.view(BATCH, 16, 16, 40).permute(0, 3, 1, 2)
        return model.decode_latents(latents).sum() + found.quantization_loss + found.sample_entropy

    flops = tokenizer_flops(config)
    assert counted(loss) == (BATCH * flops.forward, BATCH * flops.backward)


def test_flops_of_the_losses_networks():
    config = PatchDiscriminatorConfig(channels=16)
    with torch.device("meta"):
        images = torch.rand(BATCH, 3, 64, 64)
        fakes = torch.rand(BATCH, 3, 64, 64, requires_grad=True)
        model = PatchDiscriminator(config)
    own = counted(lambda: model(images).sum() + model(fakes.detach()).sum())
    model.requires_grad_(False)
    frozen = counted(lambda: model(fakes).sum())
    flops = discriminator_flops(config, 64)
    assert own[0] + frozen[0] == BATCH * flops.forward and own[1] + frozen[1] == BATCH * flops.backward
    layers = discriminator_layers(config, 64, PRECISE)
    assert sum(layer.parameters for layer in layers) == sum(p.numel() for p in model.parameters())

    perceptual = build_perceptual(PerceptualConfig(weights="random")).to("meta")
    flops = perceptual_flops(64)
    assert counted(lambda: perceptual(images, fakes).sum()) == (BATCH * flops.forward, BATCH * flops.backward)
    layers = perceptual_layers(64, PRECISE)
    assert sum(layer.parameters for layer in layers) == sum(p.numel() for p in perceptual.parameters())


FEATURES = FeaturesDiscriminatorConfig(
    backbone=VisionTransformerConfig(width=48, depth=3, heads=2, patch=8, side=64, layer_scale=True, registers=2),
    layers=(0, 1, 2),
    side=64,
    head_width=32,
    weights="random",
    augment=0.0,
)


def test_flops_of_a_discriminator_on_features():
    features, model = FrozenFeatures(FEATURES), FeatureDiscriminator(FEATURES)
    images, fakes = torch.rand(BATCH, 3, 64, 64), torch.rand(BATCH, 3, 64, 64, requires_grad=True)
    own = counted(lambda: model(features(images)).sum() + model(features(fakes.detach())).sum())
    model.requires_grad_(False)
    frozen = counted(lambda: model(features(fakes)).sum())
    flops = discriminator_flops(FEATURES, 64)
    assert own[0] + frozen[0] == BATCH * flops.forward and own[1] + frozen[1] == BATCH * flops.backward
    layers = discriminator_layers(FEATURES, 64, PRECISE)
    assert sum(layer.parameters for layer in layers) == sum(p.numel() for p in model.parameters())
    layers = feature_layers(FEATURES, PRECISE)
    assert sum(layer.parameters for layer in layers) == sum(p.numel() for p in features.parameters())
    assert feature_layers(PatchDiscriminatorConfig(), PRECISE) == []


@pytest.mark.parametrize("kind", ["perceptual", "discriminator"])
def test_flops_of_gram_losses(kind):
    images, fakes = torch.rand(BATCH, 3, 64, 64), torch.rand(BATCH, 3, 64, 64, requires_grad=True)
    see = FrozenFeatures(FEATURES).plain
    if kind == "perceptual":
        see = partial(perceptual_features, build_perceptual(PerceptualConfig(weights="random")))
    found = counted(lambda: gram_loss(see(fakes), see(images)))
    flops = gram_flops(kind, FEATURES, 64)
    if kind == "perceptual":  # without the 1 x 1 products of LPIPS, which the plan lets stand
        assert found == pytest.approx((BATCH * flops.forward, BATCH * flops.backward), rel=0.01)
    else:
        assert found == (BATCH * flops.forward, BATCH * flops.backward)


# --- Saved tensors --------------------------------------------------------------------------------


def saved_bytes(module, call, autocast: bool) -> int:
    """Bytes of what autograd saves in a call, without the module's weights and autocast's copies of them."""
    own = {p.untyped_storage().data_ptr() for p in [*module.parameters(), *module.buffers()]}
    shapes = {tuple(p.shape) for p in module.parameters()} | {tuple(p.shape[::-1]) for p in module.parameters()}
    kept = {}

    def pack(tensor):
        is_copy = autocast and tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes
        if tensor.untyped_storage().data_ptr() not in own and not tensor.is_complex() and not is_copy:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        call()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(("dropout", "order"), [(0.0, "raster"), (0.1, "raster"), (0.1, "random")])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_transformers_save(precision, dropout, order):
    names = ("residual_dropout", "ffn_dropout", "token_dropout")
    config = TransformerConfig(**{**SMALL, "tokens_per_side": 8, **dict.fromkeys(names, dropout)}, order=order)
    model, kind = Transformer(config), PRECISIONS[precision]
    model = model.bfloat16() if precision == "bfloat16" else model
    inputs = torch.zeros(BATCH, config.num_tokens, dtype=torch.int64), torch.zeros(BATCH, dtype=torch.int64)
    tensors = [*root_saved(config, kind), *head_saved(config, kind)]
    for recomputed in recomputed_blocks(config):
        tensors += block_kept(config, kind, recomputed=recomputed)
    planned = BATCH * sum(tensor.bytes for tensor in tensors if not tensor.name.startswith("rotations"))  # complex
    inputs += (draw_orders(inputs[0], 1.0),) if order == "random" else ()
    found = saved_bytes(model, lambda: model(*inputs), precision == "autocast")
    assert found == pytest.approx(planned, rel=1e-3)
    silu = BATCH * config.depth * sum(tensor.bytes for tensor in tensors if tensor.name == "silu") / config.depth
    assert found != pytest.approx(planned - silu, rel=1e-3)  # a table without one of its rows


@pytest.mark.parametrize(("recomputed", "selective"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_what_tokenizers_save(precision, recomputed, selective):
    kind, autocast = PRECISIONS[precision], precision == "autocast"
    config = TokenizerConfig(
        **TOKENIZER, gradient_checkpointing=recomputed, checkpoint_selective=selective, dropout=0.1
    )
    model, images = Tokenizer(config), torch.rand(BATCH, 3, 32, 32)
    parts = tokenizer_parts(config, kind)
    planned = BATCH * sum(part.kept(recomputed) for part in parts)
    found = saved_bytes(model, lambda: model(images), autocast)
    assert found == pytest.approx(planned, rel=1e-3)
    assert found != pytest.approx(BATCH * sum(part.kept(not recomputed) for part in parts), rel=0.1)


@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_what_the_losses_networks_save(precision):
    kind, autocast = PRECISIONS[precision], precision == "autocast"
    images, fakes = torch.rand(BATCH, 3, 64, 64), torch.rand(BATCH, 3, 64, 64, requires_grad=True)
    config = PatchDiscriminatorConfig(channels=16)
    for model, inputs, layers in (
        (PatchDiscriminator(config), (fakes,), discriminator_layers(config, 64, kind)),
        (build_perceptual(PerceptualConfig(weights="random")), (images, fakes), perceptual_layers(64, kind)),
    ):
        found = saved_bytes(model, lambda model=model, inputs=inputs: model(*inputs), autocast)
        assert found == pytest.approx(BATCH * sum(layer.saved for layer in layers), rel=0.01)


@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_what_a_discriminator_on_features_saves(precision):
    kind, autocast = PRECISIONS[precision], precision == "autocast"
    features, model = FrozenFeatures(FEATURES), FeatureDiscriminator(FEATURES)
    images, fakes = torch.rand(BATCH, 3, 64, 64), torch.rand(BATCH, 3, 64, 64, requires_grad=True)
    found = saved_bytes(model, lambda: model(features(images)), autocast)
    planned = BATCH * sum(layer.saved for layer in discriminator_layers(FEATURES, 64, kind))
    weights = 0 if autocast else 4 * sum(p.numel() for p in model.parameters() if p.dim() == 3)  # divided by sigma
    assert found == pytest.approx(planned + weights, rel=0.02)
    found = saved_bytes(features, lambda: features(fakes), autocast)
    assert found == pytest.approx(BATCH * sum(layer.saved for layer in feature_layers(FEATURES, kind)), rel=0.02)


# --- Peak memory, measured ------------------------------------------------------------------------

# Weights dominate, activations dominate.
WEIGHTS = {"depth": 3, "width": 384, "heads": 6, "vocab_size": 2048, "num_classes": 10, "tokens_per_side": 4}
ACTIVATIONS = {"depth": 3, "width": 128, "heads": 4, "vocab_size": 512, "num_classes": 10, "tokens_per_side": 8}
RECOMPUTED = {**ACTIVATIONS, "gradient_checkpointing": True}
BUCKETS = {
    **dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size", "prefetch_bucket_size"), 200_000),
    "max_live_parameters": 1_000_000,
    "sub_group_size": 2_000_000,
}
ENGINES = {
    "local": {"kind": "local"},
    "zero-1": {"kind": "zero", "stage": 1, **BUCKETS},
    "zero-2": {"kind": "zero", "stage": 2, **BUCKETS},
    "zero-3": {"kind": "zero", "stage": 3, **BUCKETS},
    "fsdp": {"kind": "fsdp"},
    "fsdp x tensor": {"kind": "fsdp", "tensor_parallel": 2},
    "fsdp x tensor + sequence": {"kind": "fsdp", "tensor_parallel": 2, "sequence_parallel": True},
}
FSDP = {
    "fsdp, reduced in each": {"kind": "fsdp", "reduce": "each"},
    "fsdp, kept gathered": {"kind": "fsdp", "reshard": False},
}
SIZES = {
    "weights": (WEIGHTS, "fp32", 2, 1),
    "weights, accumulated": (WEIGHTS, "bf16", 2, 2),
    "activations": (ACTIVATIONS, "fp32", 16, 1),
    "activations, recomputed": (RECOMPUTED, "bf16", 16, 1),
}
KEPT_SIZES = {
    "activations, selective": ({**RECOMPUTED, "checkpoint_selective": True}, "bf16", 16, 1),
    "activations, every second": ({**RECOMPUTED, "checkpoint_every": 2}, "fp32", 16, 1),
}


def case(engine: str, size: str) -> dict:
    model, precision, micro_batch, accumulation = (SIZES | KEPT_SIZES | TOKENIZER_SIZES)[size]
    return {
        "model": model,
        "engine": (ENGINES | FSDP)[engine],
        "precision": precision,
        "micro_batch": micro_batch,
        "accumulation": accumulation,
    }


TOKENIZER_WEIGHTS = {
    **{"resolution": 32, "channels": 64, "channel_multipliers": [1, 2, 4], "res_blocks": 1, "latent_channels": 64},
    **{"attention_resolutions": [], "quantizer": {"kind": "ibq", "num_codes": 16384, "dim": 64}},
}
TOKENIZER_ACTIVATIONS = {
    **{"resolution": 64, "channels": 32, "channel_multipliers": [1, 2], "res_blocks": 1, "latent_channels": 32},
    **{"attention_resolutions": [], "norm_groups": 16, "quantizer": {"kind": "ibq", "num_codes": 512, "dim": 32}},
}
TOKENIZER_SIZES = {
    "tokenizer's weights": (TOKENIZER_WEIGHTS, "fp32", 1, 1),
    "tokenizer's activations": (TOKENIZER_ACTIVATIONS, "bf16", 2, 1),
    "tokenizer's activations, recomputed": ({**TOKENIZER_ACTIVATIONS, "gradient_checkpointing": True}, "fp32", 1, 2),
}
CASES = {f"{engine}: {size}": case(engine, size) for engine in ENGINES for size in SIZES}
CASES |= {f"{engine}: {size}": case(engine, size) for engine in ("local", "fsdp") for size in TOKENIZER_SIZES}
CASES |= {f"{engine}: weights, accumulated": case(engine, "weights, accumulated") for engine in FSDP}
CASES |= {f"local: {size}": case("local", size) for size in KEPT_SIZES}


def planned_peak(found: dict, gpus: int) -> float:
    engine, stage = found["engine"], found["engine"].get("stage")
    tensor = engine.get("tensor_parallel", 1)
    layout = Layout(
        kind=engine["kind"],
        gpus=gpus,
        stage=stage or 0,
        tensor=tensor,
        sequence=engine.get("sequence_parallel", False),
        reduces_each=engine.get("reduce") == "each",
        reshards=engine.get("reshard", True),
        bucket=BUCKETS["reduce_bucket_size"],
        gather=BUCKETS["prefetch_bucket_size"],
        live=BUCKETS["max_live_parameters"],
        sub_group=BUCKETS["sub_group_size"],
    )
    rows = found["micro_batch"]
    training = Training(
        precision=found["precision"],
        micro_batch=rows,
        batch_size=rows * found["accumulation"] * layout.data,
        device="cpu",
    )
    if "resolution" in found["model"]:
        config = parse_config(TokenizerConfig, found["model"])
        losses = TokenizerLosses(discriminator=PatchDiscriminatorConfig(channels=16), perceptual=True)
        network = tokenizer_network(config, losses, layout, training)
    else:
        network = transformer_network(parse_config(TransformerConfig, found["model"]), layout, training)
    return peak_memory(network, rules(layout, training), accumulated=found["accumulation"] > 1).total


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    """Bytes at the peak of a step, by case, of two processes that do the same: the smaller, see `peak_of_step`."""
    path = tmp_path_factory.mktemp("plan") / "cases.json"
    path.write_text(json.dumps(CASES))
    result = run_ranks(2, "tests/workers/plan_worker.py", path, timeout=1800)
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [json.loads((path.parent / f"cases.json.{rank}").read_text()) for rank in range(2)]
    return {name: min(found[name] for found in ranks) for name in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_peak_memory_on_two_processes(peaks, name):
    assert planned_peak(CASES[name], gpus=2) == pytest.approx(peaks[name], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "measured, other",
    [
        ("local: weights", "zero-2: weights"),
        ("zero-1: weights, accumulated", "zero-2: weights, accumulated"),
        ("zero-2: weights", "local: weights"),
        ("fsdp: weights, accumulated", "local: weights, accumulated"),
        ("fsdp: activations", "fsdp x tensor: activations"),
        ("local: activations, recomputed", "local: activations"),
        ("local: tokenizer's weights", "fsdp: tokenizer's weights"),
    ],
)
def test_the_figures_of_another_layout_would_not_pass(peaks, measured, other):
    assert planned_peak(CASES[other], gpus=2) != pytest.approx(peaks[measured], rel=0.1)


def test_measuring_counts_every_tensor():
    """Held before and made in the step, freed in it, and within an operator."""

    def prepare():
        held = torch.zeros(250_000)

        def step():
            made = held + 1  # 1 MB more
            del made
            return (held * 2).sum(), held.sort()  # sorting needs more than what it returns

        return step

    assert 4_000_000 <= peak_of_step(prepare) < 8_000_000


# --- Communication --------------------------------------------------------------------------------


def test_traffic_per_engine():
    config = TransformerConfig(**SMALL)
    count = transformer_parameters(config)
    training = Training(precision="bf16", micro_batch=2, batch_size=64)

    def sent(**settings):
        layout = Layout(**{"gpus": 8, "gpus_per_node": 4, **settings})
        return parameter_traffic(transformer_network(config, layout, training), layout, training)

    passes = 4  # 64 images on 8 ranks by 2
    assert sent(kind="local").data == 2 * ring(8) * 4 * count  # once, whatever the accumulation
    assert sent(kind="zero", stage=1).data == ring(8) * (2 * 4 + 2) * count
    assert sent(kind="zero", stage=2).data == ring(8) * (passes * 4 + 2) * count
    assert sent(kind="zero", stage=3).data == ring(8) * passes * (2 + 2 + 4) * count
    assert sent(kind="zero", stage=3, reduce_dtype="bf16").data == ring(8) * passes * (2 + 2 + 2) * count
    full, hybrid = sent(kind="fsdp"), sent(kind="fsdp", shard_ranks=4)
    root = transformer_network(config, Layout(kind="fsdp", gpus=8), training).root
    assert full.data == ring(8) * (passes * (4 * (count - root) + 4 * root) + 4 * count)
    assert full.copies == 0 and hybrid.copies == 2 * ring(2) * 4 * count / 4
    assert hybrid.data == full.data * ring(4) / ring(8)
    each, kept = sent(kind="fsdp", reduces_each=True), sent(kind="fsdp", reshards=False)
    assert each.data == pytest.approx(full.data + ring(8) * (passes - 1) * 4 * count)
    assert kept.data == pytest.approx(full.data - ring(8) * passes * 2 * (count - root))
    offloaded = sent(kind="zero", stage=3, offload_optimizer="nvme", offload_parameters="nvme")
    assert offloaded.disk == (2 * 16 + passes * 2 * 2) * count / 8


def test_traffic_of_tensor_parallelism():
    config = TransformerConfig(**SMALL)
    layout = Layout(kind="fsdp", gpus=8, tensor=2)
    training = Training(precision="bf16", micro_batch=2, batch_size=16)
    stream = 2 * config.num_tokens * config.model_width
    # Two images of 16 on each of four ranks with data of their own: two passes; all-reduces over two ranks.
    assert numerics(layout, training).compute == 2
    assert tensor_traffic(config, layout, training) == 2 * (2 * ring(2)) * (4 * config.depth * 2 + 2 * 4) * stream


# --- The command line -----------------------------------------------------------------------------


def test_configs_are_read_whole():
    """Each key of a run is either used or known to be of no account."""
    from ibq.training.ar_config import ARRunConfig
    from ibq.training.tokenizer_config import TokenizerRunConfig

    for run, planned in (
        (ARRunConfig, TransformerPlan),
        (TokenizerRunConfig, TokenizerPlan),
    ):
        assert {field.name for field in fields(run)} == {field.name for field in fields(planned)}


def test_what_says_nothing_of_the_size_may_be_anything():
    """The data need not be there; what a run does not know is an error all the same."""
    others = [f"{own.name}=[1]" for own in fields(TransformerPlan) if own.name not in LOOKED_AT]
    assert "data=[1]" in others and "schedule=[1]" in others
    assert run_plan("--config", YAML / "b.yaml", "--gpus", 8, *others) == 0
    assert run_plan("--config", YAML / "b.yaml", "--gpus", 8, "sizes=[1]") == 2


def run_plan(*argv) -> int:
    with pytest.raises(SystemExit) as end:
        exit_on_user_error(lambda: main([str(item) for item in argv]))
    return end.value.code


def test_plan_of_xxl(capsys, tmp_path):
    path = tmp_path / "plan.json"
    assert run_plan("--config", YAML / "xxl.yaml", "--gpus", 96, "--gpu", "h100", "--json", path) == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 120
    for expected in ("2,063,331,840", "* ZeRO-3", "FSDP2 hybrid", "divide by 2, 3, 5, 6, 10, 15", "Recommended: "):
        assert expected in text, expected
    found = json.loads(path.read_text())
    names = [layout["name"] for layout in found["layouts"]]
    assert names[:4] == ["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
    assert "FSDP2 x tensor 2" in names and not any("tensor 3" in name for name in names)  # 3 divides no machine of 8
    memory = {layout["name"]: layout["memory_bytes"] for layout in found["layouts"]}
    assert memory["ZeRO-2"]["total"] < memory["ZeRO-1"]["total"] < memory["DDP"]["total"]
    for layout in found["layouts"]:
        kinds = layout["memory_bytes"]
        assert kinds["total"] == pytest.approx(sum(size for kind, size in kinds.items() if kind != "total"))


def test_layers_that_do_not_divide_stay_whole():
    config = parse_config(TransformerConfig, {"vocab_size": 64, "num_classes": 3, "tokens_per_side": 4, "depth": 2,
                                              "heads": 6, "width": 96})  # fmt: skip
    module = Transformer(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    for tensor in (1, 2, 3, 6):
        held = sum(tensor_piece(module, name, shape, 0, tensor).numel for name, shape in shapes.items())
        weights = transformer_weights(config, tensor)
        planned = sum(part.local(tensor) * (config.depth if name == "block" else 1) for name, part in weights.items())
        assert planned == held, tensor
    # Of 3 ranks each makes the head's and the feed-forward part's products alone.
    stage = TransformerStage(config)
    two, three = (stage.rank_flops(Layout(kind="fsdp", gpus=6, tensor=tensor)) for tensor in (2, 3))
    whole = sum(flops.textbook + flops.recomputed for flops in stage.flops().values())
    assert two == whole / 2 and whole / 3 < three < whole


def test_days_follow_from_flops(tmp_path):
    path = tmp_path / "plan.json"
    one = ["--config", YAML / "b.yaml", "--gpus", 1, "--gpu-memory-gib", 400, "--gpu-tflops", 100, "--mfu", 0.5]
    assert run_plan(*one, "--images", 7680, "--json", path, "training.epochs=2") == 0
    found = json.loads(path.read_text())
    flops = transformer_flops(load_section(TransformerConfig, YAML / "b.yaml", "model"))
    seconds = 768 * (flops.textbook + flops.recomputed) / 50e12
    local = found["layouts"][0]
    assert (local["name"], found["steps"]) == ("one process", 20)
    assert local["seconds_per_step"] == pytest.approx(seconds)
    assert local["days"] == pytest.approx(20 * seconds / 86400)
    assert local["tokens_per_second"] == pytest.approx(768 * 256 / seconds)


def test_zero_goes_by_the_blocks(capsys, tmp_path):
    """Sizes that are not given follow from a block, and one rank of stage 3 gathers nothing."""
    path, block = tmp_path / "plan.json", 66_370_560
    for given, settings in ((block, ()), (1_000_000, ("engine.reduce_bucket_size=1000000",))):
        assert run_plan("--config", YAML / "xxl.yaml", "--gpus", 8, "--json", path, *settings) == 0
        assert f"ZeRO-3 reduces gradients of {given:,} elements at a time in fp32" in capsys.readouterr().out
        own = next(layout["layout"] for layout in json.loads(path.read_text())["layouts"] if layout["own"])
        assert (own["bucket"], own["gather"]) == (given, 1.5 * block)
    alone = Layout(kind="zero", stage=3, gpus=1, bucket=block, gather=block, live=block)
    costs = rules(alone, Training(precision="bf16", micro_batch=8, batch_size=8))
    assert (costs.held, costs.live, costs.gradient) == (0, 0, 2)


def test_largest_micro_batch_is_the_largest(tmp_path):
    path = tmp_path / "plan.json"
    common = ["--config", YAML / "l.yaml", "--gpus", 8, "--gpu", "a100-40", "--json", path]
    assert run_plan(*common) == 0
    for layout in json.loads(path.read_text())["layouts"]:
        config = load_section(TransformerConfig, YAML / "l.yaml", "model")
        place = Layout(**layout["layout"])

        def total(rows, config=config, place=place):
            batch = rows * place.data * (1 if rows >= 768 // place.data else 2)
            training = Training(precision="bf16", micro_batch=rows, batch_size=batch)
            network = transformer_network(config, place, training)
            accumulated = training.accumulation(place) > 1
            return peak_memory(network, rules(place, training), accumulated=accumulated).total

        largest, usable = layout["largest_micro_batch"], 36 * 2**30
        assert total(largest) <= usable < total(largest + 1)
        assert (768 // place.data) % layout["micro_batch"] == 0 and layout["micro_batch"] <= largest


def test_plan_of_a_tokenizer(capsys, tmp_path):
    path = tmp_path / "plan.json"
    common = ["--config", YAML / "tokenizer_262144.yaml", "--gpus", 64, "--gpu", "a100-40", "--json", path]
    totals = {}
    for recomputed in ("true", "false"):
        settings = (f"model.gradient_checkpointing={recomputed}", "model.checkpoint_selective=false")
        assert run_plan(*common, *settings) == 0
        totals[recomputed] = json.loads(path.read_text())["layouts"][0]["memory_bytes"]["activations"]
    assert totals["true"] < 0.6 * totals["false"]
    text = capsys.readouterr().out
    for expected in ("encoder", "quantizer", "discriminator", "LPIPS (frozen)", "* DDP", "FSDP2"):
        assert expected in text, expected
    assert "ZeRO" not in text and "tensor" not in text


def test_a_gpu_that_is_too_small(capsys):
    assert run_plan("--config", YAML / "xxl.yaml", "--gpus", 1, "--gpu-memory-gib", 5, "engine.kind=local") == 0
    assert "Recommended: none." in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--gpus", "100"], ["--gpus 100", "768 images does not divide"]),
        (["--gpus", "0"], ["--gpus", "0 is not positive"]),
        (["--gpus", "8", "--mfu", "2"], ["--mfu", "not a share"]),
        (
            ["--gpus", "8", "engine={kind: fsdp, tensor_parallel: 4}"],
            ["tensor_parallel: 4 does not", "use 1, 2, 3, 5, 6, 10, 15 or 30"],
        ),
        (["--gpus", "96", "engine={kind: fsdp, tensor_parallel: 5}"], ["tensor_parallel", "5"]),
        (["--gpus", "8", "model.dept=3"], ["model.dept", "depth"]),
        (["--gpus", "8", "training.micro_batch=null"], ["micro_batch"]),
    ],
)
def test_impossible_plans(capsys, argv, words):
    assert run_plan("--config", YAML / "xxl.yaml", *argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error


def test_a_file_of_neither_stage(capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("training: {epochs: 1}\n")
    assert run_plan("--config", path, "--gpus", 8) == 2
    assert "model.depth or model.resolution" in capsys.readouterr().err
    path.write_text("model: {depth: 4}\n")
    assert run_plan("--config", path, "--gpus", 8) == 2
    assert "training" in capsys.readouterr().err
    assert run_plan("--config", tmp_path / "none.yaml", "--gpus", 8) == 2
