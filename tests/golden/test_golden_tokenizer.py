"""The tokenizer, its checkpoints and its full sizes against data of the public reference implementation.

Tensors are stored in float32 with the reference's float32-against-float64 difference. A float32 result may
differ from them by 20 times that; a float64 result must show just that difference, since the reference's did.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.golden import (
    FLOAT32_FACTOR,
    FLOAT32_FLOOR,
    FLOAT64_TOLERANCE,
    assert_close,
    assert_equal_codes,
    assert_float32,
    assert_float64,
    golden_dir,
    golden_json,
    golden_tensors,
)
from support.published import read_discriminator, read_tokenizer
from torch import Tensor

from ibq.engine.base import move_average
from ibq.interop import seed_voken
from ibq.interop.lightning_tokenizer import infer_discriminator_config
from ibq.interop.reference_tensors import FIRST_STAGE
from ibq.interop.seed_voken import infer_tokenizer_config, tokenizer_config_from_reference
from ibq.models.discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.quantizers import IBQConfig

NAME = "tokenizer_small"
DTYPES = {"f32": torch.float32, "f64": torch.float64}
IMAGES = sorted(key.removesuffix("/image") for key in golden_tensors(NAME) if key.endswith("/image"))
SETS = sorted(key.removesuffix("/encoder_out") for key in golden_tensors(NAME) if key.endswith("/encoder_out"))
GRADIENTS = sorted({key.split("/grad/")[0] for key in golden_tensors(NAME) if "/grad/" in key})
SCALARS = ("quant_loss", "sample_entropy", "avg_entropy", "entropy_loss")


def checkpoint_path() -> Path:
    return golden_dir() / golden_json(NAME)["checkpoint"]["file"]


def load_tokenizer(weights: str, dtype: torch.dtype = torch.float32) -> Tokenizer:
    tokenizer = Tokenizer(tokenizer_config_from_reference(golden_json(NAME)["config"]))
    tokenizer.load_state_dict(read_tokenizer(checkpoint_path(), weights), strict=True)
    return tokenizer.to(dtype).eval()


def our_name(parameter: str) -> str:
    return seed_voken.CODEBOOK if parameter == seed_voken.REFERENCE_CODEBOOK else parameter


def assert_stored(actual: Tensor, key: str, dtype: torch.dtype) -> None:
    """Compare with a tensor that the reference stored in float32."""
    expected = golden_tensors(NAME)[key]
    if dtype == torch.float32:
        assert_float32(actual, expected, NAME, key)
        return
    entry = golden_json(NAME)["float32_vs_float64"][key]
    allowed = 1.001 * entry["max_abs_diff"] + FLOAT64_TOLERANCE * entry["max_abs_value"]
    assert_close(actual, expected, allowed, key)


def scalar_error(quantity: str) -> float:
    """The reference's largest float32 error of a scalar over all image and weight sets."""
    results = [golden_json(NAME)["results"][key] for key in SETS]
    return max(abs(result["f32"][quantity] - result["f64"][quantity]) for result in results)


def assert_stored_scalar(actual: Tensor, result: dict, quantity: str, precision: str) -> None:
    expected = result[precision][quantity]
    if precision == "f64":
        assert_float64(actual, expected, quantity)
    else:
        allowed = max(FLOAT32_FACTOR * scalar_error(quantity), FLOAT32_FLOOR * abs(expected))
        assert_close(actual, expected, allowed, quantity)


# --- Forward --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("key", SETS)
def test_forward(key: str, precision: str):
    image, weights = key.split("/")
    dtype, result, tensors = DTYPES[precision], golden_json(NAME)["results"][key], golden_tensors(NAME)
    tokenizer = load_tokenizer(weights, dtype)
    with torch.no_grad():
        images = tensors[f"{image}/image"].to(dtype)
        assert_stored(tokenizer.encoder(images), f"{key}/encoder_out", dtype)
        prequant = tokenizer.encode_latents(images)
        assert_stored(prequant, f"{key}/prequant", dtype)
        out, quantized = tokenizer(images), tokenizer.quantizer(prequant)
        same_codes = result["indices_same_f32_f64"]
        for quantity, value in quantizer_scalars(out.losses, out.metrics).items():
            if same_codes or precision == "f64" or quantity != "quant_loss":
                assert_stored_scalar(value, result, quantity, precision)
        # The decoder alone, whatever the codes of the image.
        indices = tensors[f"{key}/indices"].view(out.codes.shape)
        assert_stored(tokenizer.quantizer.lookup(indices), f"{key}/z_q", dtype)
        assert_stored(tokenizer.decode(indices), f"{key}/reconstruction", dtype)
        if same_codes:
            assert_equal_codes(out.codes, indices, key)
            assert_equal_codes(tokenizer.encode(images), indices, key)
            assert_stored(quantized.latents, f"{key}/z_q", dtype)
            assert_stored(out.reconstruction, f"{key}/reconstruction", dtype)
            assert len(out.codes.unique()) == result[precision]["distinct_indices"]


@pytest.mark.parametrize("key", SETS)
def test_logits_and_shapes(key: str):
    image, weights = key.split("/")
    result = golden_json(NAME)["results"][key]
    tokenizer = load_tokenizer(weights, torch.float64)
    images = golden_tensors(NAME)[f"{image}/image"].double()
    with torch.no_grad():
        prequant = tokenizer.encode_latents(images)
        logits = prequant.permute(0, 2, 3, 1) @ tokenizer.quantizer.codebook.t()
    assert list(images.shape) == result["image_shape"]
    assert list(prequant.shape) == result["latent_shape"]
    best = logits.topk(2, dim=-1).values
    largest = result["f64"]["max_abs_logit"]
    assert_float64(logits.abs().max(), largest, "max_abs_logit")
    gap, floor = (best[..., 0] - best[..., 1]).min(), FLOAT64_TOLERANCE * largest
    assert_float64(gap, result["f64"]["min_top1_top2_logit_gap"], "logit gap", floor=floor)


@pytest.mark.parametrize("image", IMAGES)
def test_averaged_and_raw_weights_differ_as_in_the_reference(image: str):
    key = f"{image}/raw_vs_ema_max_abs_reconstruction_difference"
    results, errors = golden_json(NAME)["results"], golden_json(NAME)["float32_vs_float64"]
    sets = [f"{image}/{weights}" for weights in ("raw", "ema")]
    if key not in results or not all(name in results and results[name]["indices_same_f32_f64"] for name in sets):
        pytest.skip(f"no {key}, or of codes that depend on the precision")
    images = golden_tensors(NAME)[f"{image}/image"]
    with torch.no_grad():
        raw, ema = (load_tokenizer(weights)(images).reconstruction for weights in ("raw", "ema"))
    entries = [errors[f"{name}/reconstruction"] for name in sets]
    allowed = sum(
        max(FLOAT32_FACTOR * entry["max_abs_diff"], FLOAT32_FLOOR * entry["max_abs_value"]) for entry in entries
    )
    assert_close((raw - ema).abs().max(), results[key], allowed, key)


def quantizer_scalars(losses: dict[str, Tensor], metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    values = (losses["quantization"], metrics["sample_entropy"], metrics["batch_entropy"], losses["entropy"])
    return dict(zip(SCALARS, values, strict=True))


# --- Gradients and EMA ----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("key", GRADIENTS)
def test_gradients(key: str, precision: str):
    image, weights = key.split("/")
    if precision == "f32" and not golden_json(NAME)["results"][key]["indices_same_f32_f64"]:
        pytest.skip(f"{key}: codes that depend on the precision")
    dtype, expected = DTYPES[precision], golden_json(NAME)["grad"]
    weight = golden_json(NAME)["config"]["lossconfig"]["params"]
    tokenizer = load_tokenizer(weights, dtype)
    images = golden_tensors(NAME)[f"{image}/image"].to(dtype)
    out = tokenizer(images)
    loss = (images - out.reconstruction).abs().mean()
    loss = loss + weight["quant_loss_weight"] * out.losses["quantization"]
    loss = loss + weight["entropy_loss_weight"] * out.losses["entropy"]
    if precision == "f64":
        assert_float64(loss, expected["L_f64"], "L")
    else:
        allowed = FLOAT32_FACTOR * max(abs(expected["L_f32"] - expected["L_f64"]), 1e-7 * abs(expected["L_f64"]))
        assert_close(loss, expected["L_f32"], allowed, "L")
    parameters = dict(tokenizer.named_parameters())
    names = expected["parameters"]
    gradients = torch.autograd.grad(loss, [parameters[our_name(name)] for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        assert_stored(gradient, f"{key}/grad/{name}", dtype)


def test_ema_update():
    tensors = golden_tensors(NAME)
    prefix = "ema_update/new_raw/"
    names = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
    assert names
    averages = read_tokenizer(checkpoint_path(), "ema")
    decay = float(torch.load(checkpoint_path(), weights_only=True)["state_dict"]["model_ema.decay"])
    for name in names:
        average = averages[our_name(name)].clone()
        before = average.data_ptr()
        move_average([average], [tensors[prefix + name]], decay)
        assert average.data_ptr() == before
        assert_float32(average, tensors[f"ema_update/new_ema/{name}"], NAME, f"ema_update/{name}", 1e-6)


# --- Reading checkpoints --------------------------------------------------------------------------


def read_golden_state() -> dict[str, Tensor]:
    return torch.load(checkpoint_path(), weights_only=True)["state_dict"]


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[dict[str, Tensor]], Path]:
    """Writes a state as a checkpoint and returns its path."""

    def write(state: dict[str, Tensor]) -> Path:
        path = tmp_path / "edited.ckpt"
        torch.save({"epoch": 0, "state_dict": state}, path)
        return path

    return write


def test_discriminator_weights():
    path = golden_dir() / f"{NAME}_discriminator.safetensors"
    expected = golden_tensors(path.stem)
    raw, ema = (read_discriminator(checkpoint_path(), weights) for weights in ("raw", "ema"))
    assert raw.keys() == expected.keys() == ema.keys()
    for name, value in expected.items():
        assert torch.equal(raw[name], value), name
    settings = golden_json(NAME)["config"]["lossconfig"]["params"]
    config = infer_discriminator_config(raw)
    assert config == PatchDiscriminatorConfig(channels=settings["disc_ndf"], layers=settings["disc_num_layers"])
    for weights in (raw, ema):
        PatchDiscriminator(config).load_state_dict(weights, strict=True)
    state = read_golden_state()
    parameters = [name for name, _ in PatchDiscriminator(config).named_parameters()]
    for name, value in ema.items():
        shadow = "model_ema." + f"loss.discriminator.{name}".replace(".", "")
        assert torch.equal(value, state[shadow] if name in parameters else raw[name]), name


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_config_from_shapes_equals_the_references(weights: str):
    config = tokenizer_config_from_reference(golden_json(NAME)["config"])
    inferred = infer_tokenizer_config(read_tokenizer(checkpoint_path(), weights), config.resolution)
    assert shown_by_shapes(inferred) == shown_by_shapes(config)


def shown_by_shapes(config: TokenizerConfig) -> TokenizerConfig:
    """The configuration with the default of whatever shapes do not show, and attention only where there is a level."""
    levels = [i for i in range(len(config.channel_multipliers)) if config.has_attention(i)]
    return dataclasses.replace(
        config,
        attention_resolutions=tuple(config.resolution // 2**i for i in levels),
        dropout=0.0,
        quantizer=IBQConfig(num_codes=config.quantizer.num_codes, dim=config.quantizer.dim),
    )


def test_tokenizer_of_an_ar_checkpoint_is_the_averaged_one():
    """The reference's loader for the AR stage takes the averaged values."""
    paths = [p for p in sorted(golden_dir().glob("*.ckpt")) if has_first_stage(p)]
    assert paths
    averaged = read_tokenizer(checkpoint_path(), "ema")
    for path in paths:
        weights = read_tokenizer(path)
        assert weights.keys() == averaged.keys()
        assert all(torch.equal(weights[name], averaged[name]) for name in averaged)
        with pytest.raises(ValueError, match="weights='ema'"):
            read_tokenizer(path, "raw")
        with pytest.raises(ValueError, match="no discriminator"):
            read_discriminator(path)


def has_first_stage(path: Path) -> bool:
    state = torch.load(path, weights_only=True)["state_dict"]
    return any(name.startswith(FIRST_STAGE) for name in state)


def test_checkpoint_without_losses(edited):
    """Saved by a reference model with the empty loss module: neither LPIPS nor discriminator."""
    state = {
        name: value
        for name, value in read_golden_state().items()
        if not name.startswith(("loss.", "model_ema.lossdiscriminator"))
    }
    assert len(state) == golden_json(NAME)["dummy_loss_state_dict"]["number_of_entries"]
    path = edited(state)
    for weights in ("raw", "ema"):
        expected = read_tokenizer(checkpoint_path(), weights)
        assert all(torch.equal(value, expected[name]) for name, value in read_tokenizer(path, weights).items())
    with pytest.raises(ValueError, match="no discriminator"):
        read_discriminator(path)


def test_checkpoint_without_averages(edited):
    state = {name: value for name, value in read_golden_state().items() if not name.startswith("model_ema.")}
    path = edited(state)
    assert read_tokenizer(path, "raw").keys() == read_tokenizer(checkpoint_path(), "raw").keys()
    with pytest.raises(ValueError, match="weights='raw'"):
        read_tokenizer(path, "ema")


def one_name_per_part() -> list[str]:
    """First and last name of every group of tensors that a reading depends on."""
    names = [n for n in read_golden_state() if not n.startswith("loss.perceptual_loss.")]
    names = [n for n in names if n not in ("model_ema.decay", "model_ema.num_updates")]
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name[:12], []).append(name)
    return sorted({name for group in groups.values() for name in (group[0], group[-1])})


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize("name", one_name_per_part())
def test_missing_tensor_is_named(edited, name: str, weights: str):
    state = read_golden_state()
    del state[name]
    path = edited(state)
    for read in (read_tokenizer, read_discriminator):
        with pytest.raises(ValueError) as error:
            read(path, weights)
        assert name in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "encoder.surplus.weight",
        "quantize.surplus",
        "surplus.weight",
        "loss.perceptual_loss.surplus",
        "loss.discriminator.main.0.surplus",
        "model_ema.encodersurplusweight",
        "transformer.surplus",
    ],
)
def test_unexpected_tensor_is_named(edited, name: str):
    path = edited(read_golden_state() | {name: torch.zeros(3)})
    for read in (read_tokenizer, read_discriminator):
        for weights in ("raw", "ema"):
            with pytest.raises(ValueError, match=name):
                read(path, weights)


@pytest.mark.parametrize("name", one_name_per_part())
def test_wrong_shape_is_named(edited, name: str):
    state = read_golden_state()
    state[name] = torch.zeros(*state[name].shape, 2)
    with pytest.raises(ValueError, match=f"wrong shapes: .*{re.escape(name)}"):
        read_tokenizer(edited(state), "raw")


def test_files_that_are_no_checkpoints(tmp_path: Path):
    path = tmp_path / "numbers.ckpt"
    torch.save({"state_dict": {"encoder.conv_in.weight": 3}}, path)
    with pytest.raises(ValueError, match="state_dict"):
        read_tokenizer(path)
    torch.save({"state_dict": {}, "hyper_parameters": DTYPES | {"path": Path("/")}}, path)
    with pytest.raises(ValueError, match="state_dict"):
        read_tokenizer(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("l2_normalize", True, "l2_normalize"),
        ("surplus", 1, "surplus"),
        ("ddconfig.double_z", True, "ddconfig.double_z"),
        ("ddconfig.out_ch", 4, "ddconfig.out_ch"),
        ("ddconfig.surplus", 4, "ddconfig.surplus"),
        ("ddconfig.ch", None, "ddconfig.ch"),
        ("n_embed", None, "n_embed"),
    ],
)
def test_reference_arguments_that_cannot_be_converted(key: str, value: object, message: str):
    arguments = json.loads(json.dumps(golden_json(NAME)["config"]))
    *parents, leaf = key.split(".")
    target = arguments[parents[0]] if parents else arguments
    if value is None:
        del target[leaf]
    else:
        target[leaf] = value
    with pytest.raises(ValueError, match=message):
        tokenizer_config_from_reference(arguments)


def test_no_entropy_loss_is_zero_weights():
    config = tokenizer_config_from_reference(golden_json(NAME)["config"] | {"use_entropy_loss": False})
    assert config.quantizer.sample_entropy_weight == config.quantizer.batch_entropy_weight == 0.0


# --- The full sizes -------------------------------------------------------------------------------


def official() -> dict:
    return golden_json("official_shapes")["tokenizer"]


def official_listing(num_codes: str) -> dict[str, tuple[int, ...]]:
    """Every state_dict entry of the reference's model with this codebook size, averages included."""
    plain = {
        f"{prefix}.{leaf}": tuple(shape)
        for prefix, leaves in official()["plain"].items()
        for leaf, shape in leaves.items()
    }
    without_ema = official()["model_ema"]["plain_entries_without_ema"]["buffers"]
    trainable = [n for n in plain if n not in without_ema and not n.startswith("loss.perceptual_loss.")]
    averages = {"model_ema." + name.replace(".", ""): plain[name] for name in trainable}
    listing = plain | averages | {"model_ema.decay": (), "model_ema.num_updates": ()}
    changed = official()["differences_to_16384"].get(num_codes, {})
    assert changed.keys() <= listing.keys()
    return listing | {name: tuple(shape) for name, shape in changed.items()}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("num_codes", official()["parameter_counts"])
def test_official_shapes(num_codes: str):
    counts, listing = official()["parameter_counts"][num_codes], official_listing(num_codes)
    assert len(listing) == counts["state_dict_entries"]
    config = tokenizer_config_from_reference(official()["config"] | {"n_embed": int(num_codes)})
    with torch.device("meta"):
        tokenizer, discriminator = Tokenizer(config), PatchDiscriminator(PatchDiscriminatorConfig())
    ours = {our_name(n): s for n, s in listing.items() if not n.startswith(("loss.", "model_ema."))}
    assert {name: tuple(value.shape) for name, value in tokenizer.state_dict().items()} == ours
    prefix = "loss.discriminator."
    theirs = {n.removeprefix(prefix): s for n, s in listing.items() if n.startswith(prefix)}
    assert {name: tuple(value.shape) for name, value in discriminator.state_dict().items()} == theirs
    for part in ("encoder", "decoder", "quantizer", "quant_conv", "post_quant_conv"):
        assert count(getattr(tokenizer, part)) == counts[part], part
    assert count(discriminator) == counts["discriminator"]
    assert count(tokenizer) == counts["tokenizer_total"]
    assert count(tokenizer) + count(discriminator) == counts["trainable"]


@pytest.mark.parametrize("num_codes", official()["parameter_counts"])
def test_full_size_checkpoints_are_read_strictly(num_codes: str, monkeypatch: pytest.MonkeyPatch):
    """A complete checkpoint with the VGG part, by its official names and shapes; and with one tensor less."""
    state = {name: torch.empty(shape, device="meta") for name, shape in official_listing(num_codes).items()}
    monkeypatch.setattr(seed_voken, "read_state", lambda path: dict(state))
    expected = tokenizer_config_from_reference(official()["config"] | {"n_embed": int(num_codes)})
    for weights in ("raw", "ema"):
        tensors = read_tokenizer("full.ckpt", weights)
        assert infer_tokenizer_config(tensors) == expected
        assert infer_discriminator_config(read_discriminator("full.ckpt", weights)) == PatchDiscriminatorConfig()
    del state["decoder.up.0.block.0.conv1.bias"]
    with pytest.raises(ValueError, match=r"missing tensors: decoder\.up\.0\.block\.0\.conv1\.bias"):
        read_tokenizer("full.ckpt")
