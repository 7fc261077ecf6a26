"""The step that draws a code: the same at every position, from buffers that stay, with few operators and no waiting."""

import gc
import weakref

import pytest
import torch
from support.dispatch import Recorder
from support.models import VARIANTS, small_transformer
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ibq.editing import Edit
from ibq.models.heads import BitsHeadConfig, FactorisedHeadConfig, MaskedBitsHeadConfig
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.models.transformer_blocks import Attention, FeedForward, RMSNorm, rotate
from ibq.sampler import SamplerConfig
from ibq.sampling import Drawing, decoder_for, pick, sample_codes, sample_rows, settled_for

OPERATORS_A_CODE = 160  # a quarter of the 600 that were launched before
VIEWS = {"view", "t", "transpose", "expand", "slice", "select", "unsqueeze", "split", "unbind", "detach", "alias"}
VIEWS |= {"_unsafe_view", "expand_as", "split_with_sizes", "view_as_real", "view_as_complex"}
HOST = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "unique"}


def as_one(monkeypatch, owner, name: str, recorder: Recorder) -> None:
    """Count a method that a kernel replaces on CUDA as one operator."""
    plain = getattr(owner, name)

    def counted(*arguments, **keywords):
        recorder.names[f"{owner.__name__}.{name}"] += 1
        with _disable_current_modes():
            return plain(*arguments, **keywords)

    monkeypatch.setattr(owner, name, counted)


def test_operators_of_a_code(monkeypatch):
    """Of the B model, guided, with what kernels replace counted as one each."""
    torch.manual_seed(0)
    shape = TransformerConfig(depth=16, width=64, heads=16, vocab_size=128, num_classes=10, tokens_per_side=4)
    config = SamplerConfig(rows_per_block=2, precision="fp32", temperature=0.9)
    decoder = decoder_for(Transformer(shape), config)
    drawing = Drawing(decoder, settled_for(decoder, config))
    recorder = Recorder()
    as_one(monkeypatch, RMSNorm, "after", recorder)
    as_one(monkeypatch, Attention, "_attend", recorder)
    as_one(monkeypatch, FeedForward, "_gated", recorder)
    as_one(monkeypatch, Drawing, "code", recorder)
    with torch.inference_mode():
        drawing.begin(decoder, [1, 2], [3, 4])
        drawing.advance(decoder, 0)
        recorder.names.clear()
        with recorder:
            drawing.advance(decoder, 1)
    assert recorder.names.total() <= OPERATORS_A_CODE, recorder.names
    assert not HOST & recorder.names.keys()
    assert recorder.names["_linear_pointwise"] + recorder.names["linear"] + recorder.names["mm"] >= 4 * 16 + 1
    made = {name for name in recorder.names if name.startswith(("zeros", "ones", "arange", "tensor", "rand", "full"))}
    assert not made, "noise and positions are made before the first code"


def launches_of_a_code(monkeypatch, order: str, fused: bool) -> int:
    """Operators that are no views of a guided step; with what stands in for a kernel as one."""
    config = SamplerConfig(rows_per_block=2, precision="fp32", top_k=20)
    decoder = decoder_for(small_transformer(order=order), config)
    decoder.fused = fused
    drawing, recorder = Drawing(decoder, settled_for(decoder, config), graph=lambda *_: None), Recorder()
    with monkeypatch.context() as patch, torch.inference_mode():
        stand_in(patch)
        kernels = pytest.importorskip("ibq.ops.triton_decode_step", reason="Triton comes with PyTorch for CUDA")
        as_one(patch, kernels, "embed", recorder)
        drawing.begin(decoder, [1, 2], [3, 4])
        drawing.advance(decoder, 0)
        recorder.names.clear()
        with recorder:
            drawing.advance(decoder, 1)
    return sum(count for name, count in recorder.names.items() if name not in VIEWS)


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_of_random_orders_launches_no_more(monkeypatch, fused):
    raster, random = (launches_of_a_code(monkeypatch, order, fused) for order in ("raster", "random"))
    assert 40 < random <= raster


class Recording(TorchDispatchMode):
    """Stands in for a CUDA graph: the operators of one step, run again on the very same tensors."""

    def __init__(self, step, device):
        super().__init__()
        self.calls = []
        step()
        with self:
            step()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        self.calls.append((function, arguments, keywords or {}, out))
        return out

    def replay(self) -> None:
        for function, arguments, keywords, out in self.calls:
            for kept, new in zip(tree_leaves(out), tree_leaves(function(*arguments, **keywords)), strict=True):
                if kept.data_ptr() != new.data_ptr():  # no view, and not in place
                    kept.copy_(new)


def attend(qkv, rope, keys, values, position):
    """As Triton's kernel, in operators whose shapes are the same at every position."""
    kv_heads, tokens, head_dim = keys.shape[1:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    q, k, v = qkv.unflatten(-1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
    q, k = (rotate(each[:, None], rope.index_select(0, position))[:, 0] for each in (q, k))
    keys.index_copy_(2, position, k[:, :, None].to(keys.dtype))
    values.index_copy_(2, position, v[:, :, None].to(values.dtype))
    q = q.unflatten(1, (kv_heads, -1))
    scores = (q * head_dim**-0.5) @ keys.transpose(-1, -2)
    scores = scores.masked_fill(torch.arange(tokens) > position, -torch.inf)
    return (scores.softmax(-1) @ values).flatten(1)


def embed(codes, table, targets, position, out):
    """As Triton's kernel."""
    out.copy_(table[codes] + targets.index_select(0, position + 1))


def drawn(logits, scales, numbers, position, temperature):
    """As Triton's kernels."""
    if scales is not None:
        cond, uncond = logits.chunk(2)
        logits = uncond + scales.index_select(0, position) * (cond - uncond)
    return pick(logits / temperature, numbers.index_select(1, position))[:, 0]


def stand_in(monkeypatch) -> None:
    """Plain forms in place of the kernels."""
    kernels = pytest.importorskip("ibq.ops.triton_decode_step", reason="Triton comes with PyTorch for CUDA")
    monkeypatch.setattr(kernels, "attend", attend)
    monkeypatch.setattr(kernels, "embed", embed)
    monkeypatch.setattr("ibq.ops.triton_draw.draw", drawn)
    monkeypatch.setattr(kernels, "swiglu", lambda both: FeedForward._gated(None, both, fused=False))
    plain = RMSNorm.after
    monkeypatch.setattr(RMSNorm, "after", lambda self, *arguments, fused: plain(self, *arguments, fused=False))


WITH_HEADS = VARIANTS | {
    "sub-codes": {"head": FactorisedHeadConfig()},
    "sub-codes, random": {"head": FactorisedHeadConfig(sub_codes=(4, 2, 8)), "order": "random"},
    "plain norms": {"adaln": False},
    "bits": {"head": BitsHeadConfig()},
    "masked bits, random": {"head": MaskedBitsHeadConfig(width=16, layers=1), "order": "random"},
}


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 1.0}, {"top_k": 20, "top_p": 0.9, "temperature": 1.3}])
@pytest.mark.parametrize("variant", WITH_HEADS)
def test_a_step_that_is_replayed_is_the_plain_one(variant, settings, monkeypatch):
    """With plain forms in place of the kernels. Two blocks of images, so that a graph serves more than one."""
    if "bits" in variant and "top_k" in settings:
        settings = {"temperature": 1.3}  # bits are not filtered
    stand_in(monkeypatch)
    transformer = small_transformer(tokens_per_side=4, vocab_size=64, **WITH_HEADS[variant])
    config = SamplerConfig(rows_per_block=3, precision="fp32", **settings)
    request = [1, 2, 3, 4], [5, 6, 7, 8]
    expected = sample_codes(transformer, *request, config)
    decoder = decoder_for(transformer, config)
    decoder.fused = True
    decoder.drawing = Drawing(decoder, settled_for(decoder, config), graph=Recording)
    assert torch.equal(sample_codes(decoder, *request, config), expected)
    assert len(decoder.drawing._graph.calls) > 0


def test_one_graph_serves_every_part_of_an_image_that_is_kept(monkeypatch):
    """With plain forms in place of the kernels, and recordings in place of graphs."""
    stand_in(monkeypatch)
    transformer, made = small_transformer(tokens_per_side=4, vocab_size=64, order="random"), []
    config, request = SamplerConfig(rows_per_block=3, precision="fp32"), ([1, 2, 3, 4], [5, 6, 7, 8])
    decoder = decoder_for(transformer, config)
    decoder.fused = True

    def graph(*arguments):
        made.append(Recording(*arguments))
        return made[-1]

    decoder.drawing = Drawing(decoder, settled_for(decoder, config), graph=graph)
    plain, codes = sample_codes(transformer, *request, config), torch.arange(64).view(4, 4, 4)
    for modulus, rest in ((3, 0), (2, 1), (1, 0), (20, 19)):
        edit = Edit(codes=codes, keep=torch.arange(16).view(4, 4) % modulus == rest)
        expected = sample_codes(transformer, *request, config, edit=edit)
        assert torch.equal(sample_codes(decoder, *request, config, edit=edit), expected)
        assert torch.equal(sample_codes(decoder, *request, config), plain), "after an edit all is in raster order"
    assert torch.equal(expected, plain) and len(made) == 1


def test_an_image_alone_in_three_and_in_sixty_four():
    transformer, config = small_transformer(tokens_per_side=4, vocab_size=64), SamplerConfig(rows_per_block=64)
    requests = [(number % 5, 100 + number) for number in range(64)]
    codes = sample_codes(transformer, *zip(*requests, strict=True), config)
    assert torch.equal(sample_codes(transformer, [2], [107], config)[0], codes[7])
    assert torch.equal(sample_codes(transformer, [1, 2, 3], [106, 107, 108], config), codes[6:9])


def test_requests_that_overlap_do_not_meet():
    """As where a page is told to stop and to draw anew: the first goes on in its own memory."""
    transformer = small_transformer(tokens_per_side=4, vocab_size=64)
    config = SamplerConfig(rows_per_block=2, precision="fp32")
    decoder = decoder_for(transformer, config)
    first = sample_rows(decoder, [1], [5], config)
    next(first)
    between = sample_codes(decoder, [2], [6], config)
    *_, last = first
    assert torch.equal(last, sample_codes(transformer, [1], [5], config))
    assert torch.equal(between, sample_codes(transformer, [2], [6], config))


def test_a_decoder_is_let_go_with_its_memory():
    config = SamplerConfig(rows_per_block=2, precision="fp32")
    decoder = decoder_for(small_transformer(tokens_per_side=4, vocab_size=64), config)
    sample_codes(decoder, [2], [6], config)
    drawing = weakref.ref(decoder.drawing)
    gc.disable()
    try:
        del decoder
        assert drawing() is None
    finally:
        gc.enable()


def test_a_decoder_says_what_auto_means_and_refuses_other_settings():
    transformer = small_transformer(tokens_per_side=4, vocab_size=64)
    decoder = decoder_for(transformer, SamplerConfig(rows_per_block=3, precision="bf16"))
    own = sample_codes(decoder, [1, 2], [5, 6], SamplerConfig())
    same = sample_codes(transformer, [1, 2], [5, 6], SamplerConfig(rows_per_block=3, precision="bf16"))
    assert torch.equal(own, same)
    for settings in ({"rows_per_block": 4}, {"precision": "fp32"}, {"rows_per_block": 3, "guidance_scale": 1.0}):
        with pytest.raises(ValueError, match=r"rows_per_block: these settings take .* made for 6 in bf16"):
            sample_codes(decoder, [1], [5], SamplerConfig(**settings))


class NotCaptured:
    def __init__(self, step, device):
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_step_that_cannot_be_captured_is_launched(capsys):
    transformer, config = small_transformer(tokens_per_side=4, vocab_size=64), SamplerConfig(rows_per_block=2)
    decoder = decoder_for(transformer, config)
    config = settled_for(decoder, config)
    decoder.fused = True
    decoder.drawing = Drawing(decoder, settled_for(decoder, config), graph=NotCaptured)
    codes = sample_codes(decoder, [1, 2, 3], [5, 6, 7], config)
    assert torch.equal(codes, sample_codes(transformer, [1, 2, 3], [5, 6, 7], config)) and not decoder.fused
    said = capsys.readouterr().err
    assert said.count("note: no CUDA graph (operation not permitted when stream is capturing)") == 1
