"""The transformer: decoding, dropout, initial state, precision, checkpointing and bad input."""

import copy
import math

import pytest
import torch
from support.models import SMALL, VARIANTS, small_transformer
from torch import Tensor

from ibq.models.transformer import Transformer, TransformerConfig


def random_batch(rows: int, config: TransformerConfig, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(config.vocab_size, (rows, config.num_tokens), generator=generator)
    return codes, torch.randint(config.num_classes + 1, (rows,), generator=generator)


def decode(transformer: Transformer, codes: Tensor, classes: Tensor) -> Tensor:
    condition, cache = transformer.condition(classes), transformer.new_cache(len(classes))
    previous = [None, *codes[:, :-1].unbind(1)]
    return torch.stack(
        [transformer.decode_step(previous[i], condition, cache, i) for i in range(codes.shape[1])], dim=1
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cached_decoding_equals_full_forward(variant, dtype, tolerance):
    transformer = small_transformer(**VARIANTS[variant]).to(dtype)
    codes, classes = random_batch(3, transformer.config)
    full = transformer.logits(codes, classes)
    assert full.dtype == dtype and full.abs().max() > 1
    torch.testing.assert_close(decode(transformer, codes, classes), full, rtol=0, atol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_predictions_see_only_the_past(variant):
    transformer = small_transformer(**VARIANTS[variant]).double()
    codes, classes = random_batch(2, transformer.config)
    changed = codes.clone()
    changed[:, 7] = (changed[:, 7] + 1) % transformer.config.vocab_size
    before, after = transformer.logits(codes, classes), transformer.logits(changed, classes)
    torch.testing.assert_close(before[:, :8], after[:, :8], rtol=0, atol=1e-12)
    assert ((before - after)[:, 8:].abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_rows_do_not_depend_on_their_place_in_the_batch(threads):
    transformer = small_transformer(tokens_per_side=7, depth=1)
    codes, classes = random_batch(16, transformer.config)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = decode(transformer, codes, classes)
        rows = torch.arange(16).roll(5)
        assert torch.equal(decode(transformer, codes[rows], classes[rows]), expected[rows])
    finally:
        torch.set_num_threads(before)


def test_loss_is_the_cross_entropy_of_the_logits():
    transformer = small_transformer()
    codes, classes = random_batch(3, transformer.config)
    log_probabilities = transformer.logits(codes, classes).log_softmax(-1)
    expected = -log_probabilities.gather(-1, codes[..., None])[..., 0]
    nll = transformer(codes, classes)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, expected)
    torch.testing.assert_close(transformer(codes.int(), classes.int()), nll)


def test_training_makes_no_logits():
    transformer = small_transformer().train()
    shapes = []
    transformer.head.register_forward_hook(lambda module, arguments, output: shapes.append(tuple(output.shape)))
    codes, classes = random_batch(3, transformer.config)
    transformer(codes, classes).mean().backward()
    assert shapes == [(codes.numel(),)] and transformer.head.weight.grad.any()


def test_head_loss_replaces_head_and_cross_entropy():
    transformer = small_transformer()
    codes, classes = random_batch(3, transformer.config)
    expected = transformer(codes, classes)

    def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = hidden @ weight.T
        return logits.logsumexp(-1) - logits.gather(-1, targets[:, None])[:, 0]

    transformer.head.loss = head_loss
    torch.testing.assert_close(transformer(codes, classes), expected)


@pytest.mark.parametrize("field", ["residual_dropout", "ffn_dropout", "token_dropout", "class_dropout"])
def test_every_dropout_is_active_in_training_only(field):
    off = dict.fromkeys(("residual_dropout", "ffn_dropout", "token_dropout", "class_dropout"), 0.0)
    transformer = small_transformer(**(off | {field: 0.5}))
    codes, classes = random_batch(8, transformer.config)
    evaluated = transformer(codes, classes)
    assert torch.equal(transformer(codes, classes), evaluated)
    transformer.train()
    torch.manual_seed(0)
    first, second = transformer(codes, classes), transformer(codes, classes)
    torch.manual_seed(0)
    assert torch.equal(transformer(codes, classes), first)
    assert (first - second).abs().max() > 1e-3 and (first - evaluated).abs().max() > 1e-3


def test_without_dropout_training_mode_changes_nothing():
    off = dict.fromkeys(("residual_dropout", "ffn_dropout", "token_dropout", "class_dropout"), 0.0)
    transformer = small_transformer(**off)
    codes, classes = random_batch(3, transformer.config)
    evaluated = transformer(codes, classes)
    assert torch.equal(transformer.train()(codes, classes), evaluated)


def test_share_of_dropped_classes():
    transformer = small_transformer(
        tokens_per_side=1, residual_dropout=0, ffn_dropout=0, token_dropout=0, class_dropout=0.1
    )
    rows = 4000
    codes, classes = torch.zeros(rows, 1, dtype=torch.int64), torch.full((rows,), 2)
    with torch.no_grad():
        null = transformer(codes[:1], torch.tensor([transformer.null_class]))
        kept = transformer(codes[:1], classes[:1])
        torch.manual_seed(0)
        nll = transformer.train()(codes, classes)
    dropped = (nll - null).abs() < 1e-4
    assert (dropped | ((nll - kept).abs() < 1e-4)).all()
    # Five standard deviations of a binomial share.
    assert abs(dropped.float().mean() - 0.1) < 5 * math.sqrt(0.1 * 0.9 / rows)


@pytest.mark.parametrize("variant", VARIANTS)
def test_initial_state(variant):
    torch.manual_seed(0)
    config = TransformerConfig(**(SMALL | VARIANTS[variant] | {"width": 64, "adaln_gamma_init": 1e-3}))
    transformer = Transformer(config)
    parameters = dict(transformer.named_parameters())
    nll = transformer.eval()(*random_batch(3, config))
    torch.testing.assert_close(nll, torch.full_like(nll, math.log(config.vocab_size)))
    assert not parameters["head.weight"].any()
    for name, parameter in parameters.items():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("ada_lin.1.weight") and not name.startswith("head_nm"):
            gates, others = parameter[:128], parameter[128:]
            assert gates.std().item() == pytest.approx(0.02e-3, rel=0.05), name
            assert others.std().item() == pytest.approx(0.02, rel=0.05), name
        elif name.endswith("ada_gss"):
            assert parameter[0, 0, :2].std().item() == pytest.approx(1e-3 / 8, rel=0.3), name
            assert parameter[0, 0, 2:].std().item() == pytest.approx(1 / 8, rel=0.3), name
        elif name != "head.weight":
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
            assert abs(parameter.mean().item()) < 0.005, name


def saved_bytes(transformer: Transformer) -> int:
    """Bytes that autograd keeps for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in transformer.parameters()}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            kept[place] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = transformer(*random_batch(3, transformer.config)).mean()
    assert loss.requires_grad
    return sum(kept.values())


def test_recomputation_keeps_less():
    """Nothing recomputed keeps the most, then every second block, and all blocks the least."""
    sizes = [
        saved_bytes(small_transformer(depth=4, heads=4, **options).train())
        for options in ({}, RECOMPUTED["every second block"], RECOMPUTED["all"])
    ]
    assert sizes[0] > 1.2 * sizes[1] > 1.2 * 1.2 * sizes[2], sizes


RECOMPUTED = {
    "all": {"gradient_checkpointing": True},
    "every second block": {"gradient_checkpointing": True, "checkpoint_every": 2},
    "the cheap rest": {"gradient_checkpointing": True, "checkpoint_selective": True},
}


@pytest.mark.parametrize("recomputed", RECOMPUTED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_gives_equal_gradients(variant, recomputed):
    gradients = []
    for options in ({}, RECOMPUTED[recomputed]):
        transformer = small_transformer(**VARIANTS[variant], **options).train()
        torch.manual_seed(3)  # dropout must be recomputed with the same masks
        transformer(*random_batch(3, transformer.config)).mean().backward()
        gradients.append({name: p.grad for name, p in transformer.named_parameters()})
    for name, expected in gradients[0].items():
        assert expected is not None and expected.any(), name
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-7)


def test_autocast_runs_in_bfloat16_with_a_float32_loss():
    transformer = small_transformer()
    codes, classes = random_batch(4, transformer.config)
    expected = transformer(codes, classes)
    products, norms = [], []
    transformer.blocks[0].attention.wqkv.register_forward_hook(lambda m, i, output: products.append(output))
    transformer.blocks[1].ffn_norm.register_forward_hook(lambda m, i, output: norms.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        nll = transformer(codes, classes)
    nll.mean().backward()
    assert products[0].dtype == torch.bfloat16
    assert norms[0].dtype == torch.float32 and nll.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in transformer.parameters())
    difference = (nll - expected).abs()
    assert difference.max() > 0 and difference.mean() < 0.05 * expected.mean()


def test_bfloat16_weights_run():
    transformer = small_transformer().bfloat16()
    codes, classes = random_batch(2, transformer.config)
    with torch.no_grad():
        full, nll = transformer.logits(codes, classes), transformer(codes, classes)
        cached = decode(transformer, codes, classes)
    assert full.dtype == cached.dtype == torch.bfloat16 and nll.dtype == torch.float32
    assert (cached - full).abs().mean() < 0.05 * full.abs().mean()


def test_sampling_in_inference_mode_does_not_spoil_training():
    transformer = small_transformer()
    codes, classes = random_batch(2, transformer.config)
    with torch.inference_mode():
        transformer.logits(codes, classes)
    transformer(codes, classes).mean().backward()


def test_meta_device_and_copies():
    with torch.device("meta"):
        transformer = Transformer(TransformerConfig(**SMALL))
    assert all(p.is_meta for p in transformer.parameters())
    transformer = transformer.to_empty(device="cpu")
    transformer.load_state_dict(small_transformer().state_dict(), strict=True)
    batch = random_batch(2, transformer.config)
    transformer.eval()
    assert torch.equal(transformer(*batch), small_transformer()(*batch))
    assert torch.equal(copy.deepcopy(transformer)(*batch), transformer(*batch))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"heads": 5}, r"heads: 5 heads do not divide the width 32; .*multiple"),
        ({"heads": 16}, r"heads: .*2 channels per head.*multiple of 4"),
        ({"kv_heads": 3}, r"kv_heads: 3 does not divide the 4 heads; use a divisor"),
        ({"kv_heads": 0}, r"kv_heads: 0 is not positive"),
        ({"condition_dim": 16}, r"condition_dim: 16 differs .*leave condition_dim out"),
        ({"depth": 0}, r"depth: 0 is not positive; use at least 1"),
        ({"vocab_size": -1}, r"vocab_size: -1 is not positive"),
        ({"class_dropout": 1.0}, r"class_dropout: 1.0 .*\[0, 1\)"),
        ({"residual_dropout": -0.1}, r"residual_dropout: -0.1"),
        ({"rope_base": 1.0}, r"rope_base: 1.0 .*10000"),
    ],
)
def test_bad_settings(overrides, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**(SMALL | overrides))


def test_default_sizes_follow_from_the_depth():
    config = TransformerConfig(depth=16)
    assert (config.num_heads, config.num_kv_heads, config.model_width, config.head_dim) == (16, 16, 1024, 64)


BAD_INPUTS = [
    (
        lambda codes, classes: (codes[:, :-1], classes),
        r"codes: shape \(3, 15\), expected \[B, h, w\], or \[B, 16\] \(4 x 4.*tokens_per_side",
    ),
    (lambda codes, classes: (codes.view(3, 1, 4, 4), classes), r"codes: shape .*give the code grid"),
    (lambda codes, classes: (codes.float(), classes), r"codes: dtype torch.float32; convert"),
    (lambda codes, classes: (codes + 50, classes), r"codes: values .*vocab_size"),
    (lambda codes, classes: (codes - 50, classes), r"codes: values .*vocab_size"),
    (lambda codes, classes: (codes, classes[:2]), r"classes: shape \(2,\), expected \[3\]"),
    (lambda codes, classes: (codes, classes[:, None]), r"classes: shape \(3, 1\).*one class per image"),
    (lambda codes, classes: (codes, classes + 6), r"classes: values .*num_classes"),
    (lambda codes, classes: (codes, classes - 6), r"classes: values .*num_classes"),
    (lambda codes, classes: (codes, classes.double()), r"classes: dtype torch.float64; convert"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_INPUTS)
def test_bad_input(spoil, message):
    transformer = small_transformer()
    codes, classes = spoil(*random_batch(3, transformer.config))
    for call in (transformer, transformer.logits):
        with pytest.raises(ValueError, match=message):
            call(codes, classes)


def test_bad_decoding_calls():
    transformer = small_transformer()
    condition, cache = transformer.condition(torch.tensor([0, 5])), transformer.new_cache(2)
    codes = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="position: 1 without codes"):
        transformer.decode_step(None, condition, cache, 1)
    with pytest.raises(ValueError, match="position: 0 with codes"):
        transformer.decode_step(codes, condition, cache, 0)
    with pytest.raises(ValueError, match="position: 16 with codes"):
        transformer.decode_step(codes, condition, cache, 16)
    with pytest.raises(ValueError, match="classes: values"):
        transformer.condition(torch.tensor([6]))


def test_shapes_are_checked_where_values_cannot_be_read():
    with torch.device("meta"):
        transformer = Transformer(TransformerConfig(**SMALL))
        codes, classes = torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        assert transformer(codes, classes).shape == (2, 16)  # a read of the values would fail here
        with pytest.raises(ValueError, match="codes: shape"):
            transformer(codes[:, :3], classes)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_step_on_cuda_never_waits_for_the_device():
    transformer = small_transformer().cuda().train()
    codes, classes = (tensor.cuda() for tensor in random_batch(4, transformer.config))
    transformer(codes, classes).mean().backward()  # builds the rotary table
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            nll = transformer(codes, classes)
        nll.mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
