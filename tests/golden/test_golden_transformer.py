"""The transformer, its checkpoints, its sampler and its full sizes against data of the public reference.

Tensors are stored in float32 with the reference's float32-against-float64 difference. A float32 result may
differ from them by 20 times that. A float64 result must show just that difference (to 1e-9 of the largest
value), since the reference's own float64 result did.
"""

import math

import pytest
import torch
from support.golden import (
    FLOAT32_FACTOR,
    FLOAT64_TOLERANCE,
    assert_close,
    assert_equal_codes,
    assert_float32,
    assert_float64,
    golden_dir,
    golden_json,
    golden_tensors,
)
from support.published import read_tokenizer, read_transformer
from torch import Tensor

from ibq.interop.seed_voken import infer_tokenizer_config, transformer_config_from_reference
from ibq.models.tokenizer import Tokenizer
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.models.transformer_blocks import rotary_table
from ibq.sampler import SamplerConfig
from ibq.sampling import filter_logits, sample_codes

CASES = sorted(
    path.stem for path in golden_dir().glob("*.json") if "n_layer" in golden_json(path.stem).get("params", {})
)
DTYPES = [torch.float32, torch.float64]


def having(*keys: str) -> list[str]:
    return [case for case in CASES if all(key in golden_tensors(case) for key in keys)]


def load_transformer(case: str, dtype: torch.dtype = torch.float32) -> Transformer:
    settings = golden_json(case)
    transformer = Transformer(transformer_config_from_reference(settings["params"]))
    transformer.load_state_dict(read_transformer(golden_dir() / settings["checkpoint"]["file"]), strict=True)
    return transformer.to(dtype).eval()


def inputs(case: str) -> tuple[Tensor, Tensor]:
    tensors = golden_tensors(case)
    return tensors["tokens"], tensors["classes"].flatten()


def our_name(parameter: str) -> str:
    return parameter.replace("class_emb.embedding_table.", "class_emb.")


def check(actual: Tensor, case: str, key: str) -> None:
    expected = golden_tensors(case)[key]
    if actual.dtype == torch.float32:
        assert_float32(actual, expected, case, key)
        return
    entry = golden_json(case)["float32_vs_float64"].get(key)
    if entry is None:  # how far the stored float32 value is from the reference's float64 one is not known
        assert_close(actual, expected, 1e-5 * float(expected.abs().max()), f"{case}:{key}")
        return
    difference, largest = (actual.detach() - expected).abs().max(), actual.detach().abs().max()
    tolerance = FLOAT64_TOLERANCE * entry["max_abs_value"]
    stored = {name: torch.tensor(value, dtype=torch.float64) for name, value in entry.items()}
    assert_close(difference, stored["max_abs_diff"], tolerance, f"{case}:{key}, difference to float32")
    assert_close(largest, stored["max_abs_value"], tolerance, f"{case}:{key}, largest value")


def test_data_present():
    assert CASES and having("greedy/tokens") + having("greedy_uncached/tokens")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits(case, dtype):
    transformer = load_transformer(case, dtype)
    codes, classes = inputs(case)
    check(transformer.logits(codes, classes), case, "logits")
    null = torch.full_like(classes, transformer.null_class)
    check(transformer.logits(codes, null), case, "logits_null_class")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(case, dtype):
    transformer = load_transformer(case, dtype)
    loss = transformer(*inputs(case)).mean()
    loss.backward()
    if dtype == torch.float32:
        check(loss, case, "loss")
        assert_float32(loss, golden_json(case)["cross_entropy_f32"], case, "loss")
    else:
        assert_float64(loss, golden_tensors(case)["loss_f64"], f"{case}:loss_f64")
        assert_float64(loss, golden_json(case)["cross_entropy_f64"], f"{case}:cross_entropy_f64")
    gradients = {name: parameter.grad for name, parameter in transformer.named_parameters()}
    stored = [key.removeprefix("grad/") for key in golden_tensors(case) if key.startswith("grad/")]
    assert sorted(stored) == sorted(golden_json(case)["grad_parameters"])
    for name in stored:
        check(gradients[our_name(name)], case, f"grad/{name}")


@pytest.mark.parametrize("case", having("rope_table"))
def test_rotary_table(case):
    config = transformer_config_from_reference(golden_json(case)["params"])
    assert config.head_dim == golden_json(case)["head_dim"]
    table = rotary_table(config.code_grids[0], config.head_dim, config.rope_base)
    expected = golden_tensors(case)["rope_table"]
    # The reference computes angles in float32: up to half a unit in the last place of the largest angle.
    tolerance = max(1e-6, config.tokens_per_side * torch.finfo(torch.float32).eps)
    assert_close(torch.view_as_real(table), expected, tolerance, f"{case}:rope_table")
    assert torch.equal(torch.view_as_real(table)[0], torch.zeros(expected.shape[1:], dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", having("hidden_after_blocks"))
@torch.no_grad()
def test_hidden_after_blocks(case, dtype):
    transformer = load_transformer(case, dtype)
    hidden = []
    transformer.blocks[-1].register_forward_hook(lambda module, arguments, output: hidden.append(output))
    transformer.logits(*inputs(case))
    check(hidden[0], case, "hidden_after_blocks")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", having("cached/logits_cond"))
@torch.no_grad()
def test_cached_logits(case, dtype):
    transformer = load_transformer(case, dtype)
    codes, classes = inputs(case)
    both = torch.cat([classes, torch.full_like(classes, transformer.null_class)])
    condition, cache = transformer.condition(both), transformer.new_cache(len(both))
    steps = []
    for position in range(codes.shape[1]):
        previous = None if position == 0 else codes[:, position - 1].repeat(2)
        steps.append(transformer.decode_step(previous, condition, cache, position))
    cond, uncond = torch.stack(steps, dim=1).chunk(2)
    check(cond, case, "cached/logits_cond")
    check(uncond, case, "cached/logits_uncond")
    scale = golden_json(case)["greedy"]["cfg_scale"]
    check(uncond + scale * (cond - uncond), case, "cached/logits_guided")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case, kind",
    [(c, k) for c in CASES for k in ("greedy", "greedy_uncached") if f"{k}/tokens" in golden_tensors(c)],
)
def test_greedy_codes(case, kind, dtype):
    expected = golden_tensors(case)[f"{kind}/tokens"]
    transformer = load_transformer(case, dtype)
    settings = golden_json(case)[kind]
    config = SamplerConfig(guidance_scale=settings["cfg_scale"], temperature=0, rows_per_block=len(expected) + 1)
    _, classes = inputs(case)
    codes = sample_codes(transformer, classes.tolist(), list(range(len(classes))), config)
    certain = before_near_ties(case, transformer, expected, settings["cfg_scale"])
    assert certain.any()
    assert_equal_codes(codes.flatten(1)[certain], expected[certain], f"{case}:{kind}/tokens")


@torch.no_grad()
def before_near_ties(case: str, transformer: Transformer, codes: Tensor, scale: float) -> Tensor:
    """Boolean [B, T]: the greedy codes ahead of the first choice that the reference's rounding could turn around."""
    _, classes = inputs(case)
    cond, uncond = (transformer.logits(codes, c) for c in (classes, torch.full_like(classes, transformer.null_class)))
    best = (uncond + scale * (cond - uncond)).topk(2, dim=-1).values
    errors = golden_json(case)["float32_vs_float64"]
    error = (2 * scale + 1) * max(errors[key]["max_abs_diff"] for key in ("logits", "logits_null_class"))
    return (best[..., 0] - best[..., 1] > FLOAT32_FACTOR * error).cumprod(dim=1).bool()


@pytest.mark.parametrize("case", having("wrapper/images"))
@torch.no_grad()
def test_image_to_logits_and_codes_to_image(case):
    tensors = golden_tensors(case)
    weights = read_tokenizer(golden_dir() / golden_json(case)["checkpoint"]["file"])
    images = tensors["wrapper/images"]
    tokenizer = Tokenizer(infer_tokenizer_config(weights, resolution=images.shape[-1])).eval()
    tokenizer.load_state_dict(weights, strict=True)
    transformer = load_transformer(case)
    tokens, classes = inputs(case)

    targets = tensors["wrapper/targets"]
    latents = tokenizer.encode_latents(images).permute(0, 2, 3, 1)
    best = (latents @ tokenizer.quantizer.codebook.t()).topk(2, dim=-1).values.flatten(1, 2)
    certain = best[..., 0] - best[..., 1] > 1e-5 * best.abs().max()
    codes = tokenizer.encode(images).flatten(1)
    assert_equal_codes(codes[certain], targets[certain], f"{case}:wrapper/targets")
    assert certain.double().mean() > 0.9
    assert_float32(transformer.logits(targets, classes), tensors["wrapper/logits"], case, "wrapper/logits")
    nll = transformer(targets, classes).mean()
    assert_float32(nll, golden_json(case)["wrapper_cross_entropy"], case, "wrapper_cross_entropy")
    side = math.isqrt(tokens.shape[1])
    decoded = tokenizer.decode(tokens.unflatten(1, (side, side)))
    key = "wrapper/decoded_tokens_image"
    assert_float32(decoded, tensors[key], case, key)


def shapes_by_name(model: dict) -> dict[str, tuple[int, ...]]:
    """The transformer entries of one published model, patterns expanded, under our names."""
    return {
        our_name(pattern.replace("{i}", str(i)).removeprefix("transformer.")): tuple(shape)
        for pattern, shape in model["transformer_pattern"].items()
        for i in (range(model["n_layer"]) if "{i}" in pattern else [None])
    }


@pytest.mark.parametrize("size", golden_json("official_shapes")["ar"]["models"])
def test_published_sizes(size):
    model = golden_json("official_shapes")["ar"]["models"][size]
    config = transformer_config_from_reference(model["config"])
    assert (config.ffn_width, config.head_dim) == (model["ffn_hidden"], model["head_dim"])
    with torch.device("meta"):
        transformer = Transformer(config)
        # The published sizes follow from the depth alone.
        by_depth = Transformer(TransformerConfig(depth=model["n_layer"], vocab_size=model["vocab_size"]))
    expected = shapes_by_name(model)
    for candidate in (transformer, by_depth):
        assert {name: tuple(value.shape) for name, value in candidate.state_dict().items()} == expected
    assert len(expected) == model["entries"]["transformer"]

    block = transformer.blocks[0]
    parts = {
        "transformer_total": transformer,
        "per_block": block,
        "per_block_attention": block.attention,
        "per_block_ffn": block.feed_forward,
        "per_block_ada_lin": block.ada_lin,
        **{name: getattr(transformer, name) for name in ("tok_emb", "class_emb", "blocks", "head_nm", "head")},
    }
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    expected_counts = {n: count for n, count in model["parameter_counts"].items() if n != "first_stage_model"}
    assert counts == expected_counts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", golden_json("top_k_top_p")["cases"])
def test_top_k_top_p(case, dtype):
    settings = golden_json("top_k_top_p")["cases"][case]
    if dtype == torch.float64 and not settings.get("same_in_float64", True):
        pytest.skip(f"{case}: the reference's masks depend on the precision")
    tensors = golden_tensors("top_k_top_p")
    logits = tensors["logits"].to(dtype)
    filtered = filter_logits(logits, settings["top_k"], settings["top_p"])
    kept = filtered > -torch.inf
    assert torch.equal(filtered[kept], logits[kept])
    assert kept.sum(-1).tolist() == settings["kept_per_row"]
    for row, expected in enumerate(tensors[f"kept/{case}"].bool()):
        if row not in settings["rows_where_equal_logits_are_split_by_the_cut"]:
            assert torch.equal(kept[row], expected), f"row {row}"


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_are_read_strictly(case, tmp_path):
    state = torch.load(golden_dir() / golden_json(case)["checkpoint"]["file"], weights_only=True)["state_dict"]
    cache = "transformer.blocks.0.attention.kv_cache.k_cache"
    read_transformer(saved(tmp_path, state | {cache: torch.zeros(1)}))  # left behind by sampling: dropped
    missing = "transformer.blocks.0.attention.wo.weight"
    incomplete = {name: value for name, value in state.items() if name != missing}
    with pytest.raises(ValueError, match=rf"missing tensors: {missing}"):
        read_transformer(saved(tmp_path, incomplete))
    with pytest.raises(ValueError, match=r"unexpected tensors: transformer\.extra"):
        read_transformer(saved(tmp_path, state | {"transformer.extra": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"unexpected tensors: other"):
        read_transformer(saved(tmp_path, state | {"other": torch.zeros(1)}))
    head = "transformer.head.weight"
    with pytest.raises(ValueError, match=rf"wrong shapes: {head}"):
        read_transformer(saved(tmp_path, state | {head: torch.zeros(2, 2)}))
    with pytest.raises(ValueError, match="has no transformer"):
        read_transformer(saved(tmp_path, {"other": torch.zeros(1)}))


def saved(folder, state: dict[str, Tensor]):
    path = folder / "checkpoint.ckpt"
    torch.save({"state_dict": state}, path)
    return path


def test_reference_arguments_are_converted_strictly():
    arguments = golden_json(CASES[0])["params"]
    with pytest.raises(ValueError, match="block_size: 65 is not a square"):
        transformer_config_from_reference(arguments | {"block_size": 65})
    with pytest.raises(ValueError, match="drop_path_rate"):
        transformer_config_from_reference(arguments | {"drop_path_rate": 0.1})
    with pytest.raises(ValueError, match="surprise: is not an argument"):
        transformer_config_from_reference(arguments | {"surprise": 1})
    with pytest.raises(ValueError, match="n_head: is missing"):
        transformer_config_from_reference({k: v for k, v in arguments.items() if k != "n_head"})
