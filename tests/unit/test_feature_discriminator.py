"""The discriminator on frozen features: backbone, weights, augmentation, spectral norm, heads, Gram loss, settings."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ibq.config import ConfigError, UserError, parse_config
from ibq.losses import gram_loss
from ibq.models.diff_augment import _hole, diff_augment
from ibq.models.discriminator import PatchDiscriminatorConfig, build_discriminator
from ibq.models.feature_discriminator import (
    FeatureDiscriminator,
    FeaturesDiscriminatorConfig,
    LocalBatchNorm,
    SpectralConv1d,
)
from ibq.models.frozen_features import IMAGENET_MEAN, IMAGENET_STD, FrozenFeatures
from ibq.models.vision_transformer import (
    BACKBONES,
    VisionTransformer,
    VisionTransformerConfig,
    resized_positions,
    rotations,
)
from ibq.training.tokenizer_config import TokenizerLossConfig

SMALL = {"width": 24, "depth": 2, "heads": 2, "patch": 4, "side": 16}
KINDS = {
    "DINO": {},
    "DINOv2": {"layer_scale": True},
    "DINOv3": {"layer_scale": True, "registers": 3, "rotary": True},
}


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_weights(module: nn.Module) -> None:
    """Every parameter its own numbers, so that none can be left out unseen."""
    for number, parameter in enumerate(module.parameters()):
        parameter.data = draw(*parameter.shape, seed=number) * 0.2 + (parameter.dim() < 2) * 0.5


# --- Backbone -------------------------------------------------------------------------------------


def textbook_tokens(state: dict[str, Tensor], image: Tensor, kind: VisionTransformerConfig, blocks: int) -> Tensor:
    """Tokens [N, C] of one image after so many blocks, head by head and place by place."""
    grid, width, dim = kind.side // kind.patch, kind.width, kind.width // kind.heads

    def norm(x, name):
        x = x - x.mean(dim=-1, keepdim=True)
        x = x / (x.square().mean(dim=-1, keepdim=True) + kind.epsilon).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def turned(vector, token):
        place = token - (1 + kind.registers)
        if not kind.rotary or place < 0:
            return vector
        out, half = vector.clone(), dim // 2
        for axis, number in enumerate(divmod(place, grid)):
            for i in range(dim // 4):
                angle = 2 * math.pi * ((number + 0.5) / grid * 2 - 1) / 100 ** (2 * i / half)
                j = axis * (dim // 4) + i  # turned together with j + half
                a, b, c, s = vector[j], vector[j + half], math.cos(angle), math.sin(angle)
                out[j], out[j + half] = a * c - b * s, b * c + a * s
        return out

    rows = [state["cls_token"][0, 0]]
    patches = []
    for i in range(grid):
        for j in range(grid):
            part = image[:, i * kind.patch : (i + 1) * kind.patch, j * kind.patch : (j + 1) * kind.patch]
            weight = state["patch_embed.proj.weight"].flatten(1)
            patches.append(weight @ part.flatten() + state["patch_embed.proj.bias"])
    x = torch.stack(rows + patches)
    if not kind.rotary:
        x = x + state["pos_embed"][0]
    if kind.registers:
        x = torch.cat([x[:1], state["storage_tokens"][0], x[1:]])
    for number in range(blocks):
        at = f"blocks.{number}."
        scale1, scale2 = (state.get(f"{at}ls{i}.gamma", torch.ones(width)) for i in (1, 2))
        qkv = norm(x, f"{at}norm1") @ state[f"{at}attn.qkv.weight"].t() + state[f"{at}attn.qkv.bias"]
        heads = []
        for head in range(kind.heads):
            q, k, v = (qkv[:, i * width + head * dim : i * width + (head + 1) * dim] for i in range(3))
            q, k = (torch.stack([turned(row, n) for n, row in enumerate(part)]) for part in (q, k))
            heads.append((q @ k.t() / math.sqrt(dim)).softmax(dim=1) @ v)
        seen = torch.cat(heads, dim=1) @ state[f"{at}attn.proj.weight"].t() + state[f"{at}attn.proj.bias"]
        x = x + scale1 * seen
        hidden = norm(x, f"{at}norm2") @ state[f"{at}mlp.fc1.weight"].t() + state[f"{at}mlp.fc1.bias"]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + scale2 * (hidden @ state[f"{at}mlp.fc2.weight"].t() + state[f"{at}mlp.fc2.bias"])
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_the_transformer_is_the_textbooks(kind: str):
    config = VisionTransformerConfig(**SMALL, **KINDS[kind])
    model = VisionTransformer(config).double()
    random_weights(model)
    if config.rotary:
        model.cosine, model.sine = (
            table.double() for table in rotations(config.grid(config.side), config.width // config.heads)
        )
    images = draw(2, 3, 16, 16)
    found = model(images, (0, 2, 1))
    for layer, tokens in zip((0, 2, 1), found, strict=True):
        for image, mine in zip(images, tokens, strict=True):
            expected = textbook_tokens(model.state_dict(), image, config, layer)
            # The rotations' angles are float32.
            torch.testing.assert_close(mine, expected, rtol=1e-6 if config.rotary else 1e-10, atol=1e-6)


def test_the_published_backbones():
    """Parameters and a few shapes of the published files, without DINOv2's and DINOv3's mask token."""
    counts = {"dino_vits16": 21_665_664, "dinov2_vits14": 22_056_576 - 384, "dinov3_vits16": 21_601_152 - 384}
    for name, count in counts.items():
        with torch.device("meta"):
            model = VisionTransformer(BACKBONES[name])
        assert sum(parameter.numel() for parameter in model.parameters()) == count, name
        assert {"blocks.11.attn.qkv.weight", "patch_embed.proj.bias", "norm.weight"} <= model.state_dict().keys()
    with torch.device("meta"):
        found = {name: VisionTransformer(BACKBONES[name]).state_dict() for name in BACKBONES}
    assert found["dinov2_vitb14"]["pos_embed"].shape == (1, 1370, 768)
    assert found["dino_vitb16"]["pos_embed"].shape == (1, 197, 768)
    assert found["dinov3_vits16"]["storage_tokens"].shape == (1, 4, 384)
    assert found["dinov2_vits14"]["blocks.0.ls1.gamma"].shape == (384,)


def test_positions_are_resized():
    """A plane stays one, as far as bicubic weights allow, with the factor 16.1 / 37: 16 / 37 would be off by 0.2."""
    rows, columns = torch.meshgrid(torch.arange(37.0), torch.arange(37.0), indexing="ij")
    table = torch.stack([rows, columns, rows + 2 * columns], dim=-1).flatten(0, 1)
    positions = torch.cat([torch.tensor([[5.0, 6.0, 7.0]]), table])[None]
    found = resized_positions(positions, 16)
    assert torch.equal(found[:, 0], positions[:, 0])
    middle = ((torch.arange(16) + 0.5) * 37 / 16.1 - 0.5)[1:-1]
    inner = found[0, 1:].view(16, 16, 3)[1:-1, 1:-1]
    torch.testing.assert_close(inner[..., 0], middle[:, None].expand(14, 14), rtol=0, atol=0.06)
    torch.testing.assert_close(inner[..., 2], middle[:, None] + 2 * middle, rtol=0, atol=0.18)
    assert torch.equal(resized_positions(positions, 37), positions)


# --- Frozen features ------------------------------------------------------------------------------


def settings(**changes) -> FeaturesDiscriminatorConfig:
    fields = {"backbone": VisionTransformerConfig(**SMALL), "layers": (0, 1, 2), "side": 16, "weights": "random"}
    return FeaturesDiscriminatorConfig(**fields | changes)


def test_features_are_patches_plus_the_class_token_of_normalized_images():
    features = FrozenFeatures(settings(augment=0.0))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    tokens = features.backbone(((images + 1) / 2 - mean) / std, (0, 1, 2))
    for found, plain, after in zip(features(images), features.plain(images), tokens, strict=True):
        assert found.shape == (2, 24, 16)
        torch.testing.assert_close(found, (after[:, 1:] + after[:, :1]).transpose(1, 2))
        assert torch.equal(found, plain)


def test_gradients_pass_through_to_the_image_and_nowhere_else():
    features = FrozenFeatures(settings())
    images = torch.zeros(2, 3, 16, 16, requires_grad=True)
    sum(layer.square().sum() for layer in features(images)).backward()
    assert float(images.grad.abs().sum()) > 0
    assert all(p.grad is None and not p.requires_grad for p in features.parameters())
    features.train()
    assert features(torch.zeros(2, 3, 16, 16))[0].grad_fn is None, "nothing is kept for the discriminator's step"


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (20, 28), (40, 40)])
def test_every_size_becomes_the_backbones(size):
    features = FrozenFeatures(settings(crop=1.0))
    images = torch.full((2, 3, *size), 0.25)
    assert [layer.shape for layer in features(images)] == [(2, 24, 16)] * 3
    torch.testing.assert_close(features._resized(images), torch.full((2, 3, 16, 16), 0.25))


def test_larger_images_are_cropped_as_often_as_asked():
    features = FrozenFeatures(settings(crop=0.25, augment=0.0))
    rows = torch.arange(40.0).view(1, 1, 40, 1).expand(2, 3, 40, 40)
    torch.manual_seed(0)
    seen = [features._cropped(rows) for _ in range(400)]
    crops = [image for image in seen if torch.equal(image.diff(dim=2), torch.ones(2, 3, 15, 16))]
    assert len(crops) / len(seen) == pytest.approx(0.25, abs=0.07)
    assert {int(crop[0, 0, 0, 0]) for crop in crops} == set(range(25))
    whole = next(image for image in seen if not torch.equal(image.diff(dim=2), torch.ones(2, 3, 15, 16)))
    assert float(whole.mean()) == pytest.approx(19.5, abs=1e-4)


def test_weights_of_a_file(tmp_path):
    source = VisionTransformer(VisionTransformerConfig(**{**SMALL, "side": 20}, **KINDS["DINOv2"]))
    random_weights(source)
    state = {name: tensor.float() for name, tensor in source.state_dict().items()}
    torch.save(state | {"mask_token": torch.zeros(1, 24)}, tmp_path / "dino.pth")
    save_file(state, tmp_path / "dino.safetensors")
    config = {"backbone": source.config}
    found = [
        FrozenFeatures(settings(**config, weights=str(tmp_path / name))) for name in ("dino.pth", "dino.safetensors")
    ]
    assert found[0].identity == found[1].identity and found[0].identity.startswith("vit_24x2_patch4 ")
    for name, tensor in found[0].backbone.state_dict().items():
        expected = resized_positions(state[name], 4) if name == "pos_embed" else state[name]
        assert torch.equal(tensor, expected), name
    state["norm.bias"] += 1
    save_file(state, tmp_path / "other.safetensors")
    other = FrozenFeatures(settings(**config, weights=str(tmp_path / "other.safetensors")))
    assert other.identity != found[0].identity
    assert FrozenFeatures(settings(layers=(0, 1, 1))).identity != FrozenFeatures(settings()).identity


def test_dinov3_has_no_biases_of_keys(tmp_path):
    config = VisionTransformerConfig(**SMALL, **KINDS["DINOv3"])
    source = VisionTransformer(config)
    random_weights(source)
    others = {"rope_embed.periods": torch.ones(3), "blocks.0.attn.qkv.bias_mask": torch.ones(72)}
    torch.save({n: t.float() for n, t in source.state_dict().items()} | others, tmp_path / "dinov3.pth")
    bias = (
        FrozenFeatures(settings(backbone=config, weights=str(tmp_path / "dinov3.pth"))).backbone.blocks[1].attn.qkv.bias
    )
    assert torch.equal(bias.view(3, 24).abs().sum(dim=1) > 0, torch.tensor([True, False, True]))


def test_what_is_said_without_the_weights(tmp_path, monkeypatch):
    def problem(**changes) -> str:
        with pytest.raises(UserError) as caught:
            FrozenFeatures(settings(**changes))
        assert "\n" not in str(caught.value) and "loss.gan.discriminator" in str(caught.value)
        return str(caught.value)

    assert "no file at 'nowhere.pth'; give a file of vit_24x2_patch4 by" in problem(weights="nowhere.pth")
    assert "those of vit_24x2_patch4 must be given" in problem(weights="download")
    state = VisionTransformer(VisionTransformerConfig(**SMALL)).state_dict()
    for name, changed, words in (
        ("less", {n: t for n, t in state.items() if n != "blocks.1.norm2.bias"}, "blocks.1.norm2.bias is missing"),
        ("more", state | {"register_tokens": torch.zeros(1, 4, 24)}, "it has register_tokens besides"),
        ("other", state | {"cls_token": torch.zeros(1, 1, 25)}, "cls_token has another shape"),
        ("list", [1], "no mapping of tensors"),
    ):
        torch.save(changed, tmp_path / f"{name}.pth")
        assert words in problem(weights=str(tmp_path / f"{name}.pth"))
    (tmp_path / "text.safetensors").write_text("no weights")
    assert "not a file of weights" in problem(weights=str(tmp_path / "text.safetensors"))
    assert "SHA-256 differs" in problem(weights=str(tmp_path / "more.pth"), sha256="0" * 64)

    def offline(*arguments, **_):
        raise OSError(f"cannot reach {arguments[0]}. And more")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    for weights, backbone in (("download", "dinov2_vits14"), ("someone/model", VisionTransformerConfig(**SMALL))):
        text = problem(weights=weights, backbone=backbone, side=28)
        assert "could not be downloaded (cannot reach" in text and "And more" not in text
        assert text.endswith("by loss.gan.discriminator.weights=FILE, or set loss.gan.discriminator.kind=patch")
    torch.save(state, tmp_path / "hub.pth")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *arguments, **_: tmp_path / "hub.pth")
    assert torch.equal(FrozenFeatures(settings(weights="someone/model")).backbone.cls_token, state["cls_token"])


# --- Augmentation ---------------------------------------------------------------------------------


def test_augmentation_means_and_extremes():
    """Over many draws: colour keeps the mean, a translation and a cutout leave out what the geometry says."""
    torch.manual_seed(1)
    images = torch.full((4000, 3, 16, 16), 0.5)
    images[:, 0] += 0.25
    changed = diff_augment(images, 1.0, 0.0)
    kept = changed[:, :, 7:9, 7:9]  # no translation by up to 2 reaches the middle
    shift = kept.mean(dim=(2, 3)) - images.mean(dim=(2, 3))
    assert float(shift.mean()) == pytest.approx(0.0, abs=0.02)  # brightness: U(-1/2, 1/2)
    assert float(shift.mean(dim=1).std()) == pytest.approx(math.sqrt(1 / 12), rel=0.06)
    share = float((changed[:, :1] != 0).float().mean())  # of 16 - |s| rows and columns each, s uniform in -2..2
    assert share == pytest.approx(((16 - 1.2) / 16) ** 2, abs=0.01)
    assert torch.equal(diff_augment(images, 0.0, 0.2), images)


def test_a_cutout_is_a_square_anywhere():
    draws = torch.linspace(0, 1 - 1e-6, 21).view(-1, 1, 1, 1)
    holes = _hole(torch.zeros(21, 3, 20, 20), draws, torch.full_like(draws, 0.5), share=0.2)
    assert holes[10, 0].sum() == 16 and holes[10, 0, 8:12, 8:12].all()
    rows = holes[:, 0].any(dim=2).sum(dim=1)
    assert [int(rows[i]) for i in (0, 1, 2, 10, 18, 19, 20)] == [2, 3, 4, 4, 4, 3, 2]


def test_each_part_of_augmentation_happens_as_often_as_asked():
    torch.manual_seed(2)
    images = torch.rand(3000, 3, 8, 8) + 1
    changed = diff_augment(images, 0.3, 0.5)
    untouched = (changed == images).flatten(1).all(dim=1).float().mean()
    # A translation by nothing changes nothing: by one pixel each way, one of nine.
    assert float(untouched) == pytest.approx(0.7 * 0.7 * (0.7 + 0.3 / 9), abs=0.03)


def test_augmentation_is_the_devices_generators_and_differentiable():
    images = torch.rand(4, 3, 8, 8, requires_grad=True)
    torch.manual_seed(3)
    first = diff_augment(images, 1.0, 0.2)
    second = diff_augment(images, 1.0, 0.2)
    torch.manual_seed(3)
    assert torch.equal(first, diff_augment(images, 1.0, 0.2)) and not torch.equal(first, second)
    inputs = draw(2, 3, 6, 6).requires_grad_()

    def fixed(x):
        torch.manual_seed(5)
        return diff_augment(x, 1.0, 0.2)

    assert torch.autograd.gradcheck(fixed, (inputs,))


# --- Heads ----------------------------------------------------------------------------------------


def test_spectral_norm_is_the_largest_singular_value():
    conv = SpectralConv1d(5, 7, 3).double()
    conv.weight.data = draw(7, 5, 3)
    x = draw(2, 5, 11, seed=1)
    for _ in range(200):  # power iterations
        conv(x)
    largest = torch.linalg.svdvals(conv.weight.detach().flatten(1))[0]
    padded = torch.cat([x[..., -1:], x, x[..., :1]], dim=2)
    expected = F.conv1d(padded, conv.weight / largest, conv.bias)
    torch.testing.assert_close(conv(x), expected, rtol=1e-9, atol=1e-12)
    normalized = conv.weight.detach().flatten(1) / largest
    assert float(torch.linalg.svdvals(normalized)[0]) == pytest.approx(1.0)


def test_the_gradient_of_spectral_norm():
    """Of sigma: the outer product of the singular vectors (arXiv 1802.05957, equation 11)."""
    conv = SpectralConv1d(4, 6, 1).double()
    conv.weight.data = draw(6, 4, 1)
    for _ in range(300):
        conv(draw(1, 4, 3))
    x, weights = draw(2, 4, 3, seed=1), draw(2, 6, 3, seed=2)
    (conv(x) * weights).sum().backward()
    matrix = conv.weight.detach().flatten(1).requires_grad_()
    normalized = matrix / torch.linalg.svdvals(matrix)[0]
    (F.conv1d(x, normalized[..., None], conv.bias) * weights).sum().backward()
    torch.testing.assert_close(conv.weight.grad.flatten(1), matrix.grad, rtol=1e-8, atol=1e-10)


def test_a_power_iteration_is_made_in_training_alone():
    conv = SpectralConv1d(4, 6).double()
    before = conv.direction.clone()
    conv.eval()(draw(1, 4, 3))
    assert torch.equal(conv.direction, before)
    conv.train()(draw(1, 4, 3))
    matrix = conv.weight.detach().flatten(1)
    expected = F.normalize(matrix @ F.normalize(matrix.t() @ before, dim=0), dim=0)
    torch.testing.assert_close(conv.direction, expected)


@pytest.mark.parametrize(("batch", "images", "size"), [(4, 8, 4), (8, 8, 8), (12, 8, 6), (16, 8, 8), (7, 3, 1)])
def test_local_batch_norm(batch: int, images: int, size: int):
    norm = LocalBatchNorm(3, images).double()
    random_weights(norm)
    x = draw(batch, 3, 5) + 2
    expected = torch.cat(
        [F.batch_norm(group, None, None, norm.weight, norm.bias, True, 0.0, 1e-6) for group in x.split(size)]
    )
    torch.testing.assert_close(norm(x), expected, rtol=1e-10, atol=1e-10)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_local_batch_norm_over_two_ranks():
    """Rank 0 of two, its reductions completed with what rank 1 would send; groups within a rank need none."""
    whole, ours = (LocalBatchNorm(3, 8).double() for _ in range(2))
    x = draw(8, 3, 5) + 1
    halves = x.chunk(2)
    mean = x.mean(dim=(0, 2))
    other = iter([halves[1].mean(dim=(0, 2)), (halves[1] - mean[:, None]).square().mean(dim=(0, 2))])
    ours.mean_over_ranks, ours.world_size = lambda value: (value + next(other)[:, None]) / 2, 2
    torch.testing.assert_close(ours(halves[0]), whole(x).chunk(2)[0])
    ours.mean_over_ranks, ours.images = pytest.fail, 2
    assert ours(halves[0]).shape == (4, 3, 5)
    ours.world_size, ours.images = 4, 8
    with pytest.raises(UserError, match="set it to 4, or to 16 or more"):
        ours(halves[0])


def test_a_head_is_the_textbooks():
    """Convolution, norm, activation; again with 9 patches, added and divided by the square root of 2; a row."""
    config = settings(layers=(0,), norm_images=8)
    model = FeatureDiscriminator(config).double()
    random_weights(model)
    x = draw(4, 24, 16)
    for _ in range(400):
        model([x])
    first, second, last = model.heads[0]

    def conv(layer, x):
        weight = layer.weight / torch.linalg.svdvals(layer.weight.flatten(1))[0]
        half = layer.kernel_size[0] // 2
        return F.conv1d(torch.cat([x[..., x.shape[2] - half :], x, x[..., :half]], dim=2), weight, layer.bias)

    def block(parts, x):
        x = F.batch_norm(conv(parts[0], x), None, None, parts[1].weight, parts[1].bias, True, 0.0, 1e-6)
        return torch.where(x > 0, x, 0.2 * x)

    hidden = block(first, x)
    hidden = (block(second, hidden) + hidden) / math.sqrt(2)
    torch.testing.assert_close(model([x]), conv(last, hidden)[:, 0], rtol=1e-7, atol=1e-8)


def test_a_discriminator_has_a_head_for_each_layer():
    model = build_discriminator(settings(head_width=8, kernel=3))
    assert isinstance(model, FeatureDiscriminator)
    logits = model(FrozenFeatures(settings())(torch.zeros(2, 3, 16, 16)))
    assert logits.shape == (2, 3 * 16)
    names = dict(model.named_buffers())
    assert len(names) == 9 and all(name.endswith("direction") for name in names)
    assert not dict(build_discriminator(settings(spectral_norm=False)).named_buffers())
    calls = []
    model.use_world_statistics(lambda value: calls.append(value) or value, 3)
    model(FrozenFeatures(settings())(torch.zeros(2, 3, 16, 16)))
    assert len(calls) == 2 * 2 * 3


def test_the_published_heads():
    """StyleGAN-T's for ViT-S: five heads, of 1 x 1 and 9 convolutions over 384 channels."""
    with torch.device("meta"):
        model = build_discriminator(FeaturesDiscriminatorConfig())
    each = (384 * 384 + 384) + 2 * 384 + (9 * 384 * 384 + 384) + 2 * 384 + 385
    assert sum(parameter.numel() for parameter in model.parameters()) == 5 * each


# --- Gram loss ------------------------------------------------------------------------------------


def test_gram_loss():
    """Johnson et al., arXiv 1603.08155, equations 3 and 4, by its sums."""
    layers = [(draw(2, 3, 2, 4), draw(2, 3, 2, 4, seed=1)), (draw(2, 5, 3), draw(2, 5, 3, seed=2))]
    expected = 0.0
    for x, y in layers:
        x, y = x.flatten(2), y.flatten(2)
        for image in range(2):
            for a in range(x.shape[1]):
                for b in range(x.shape[1]):
                    gram = [sum(z[image, a] * z[image, b]) / (z.shape[1] * z.shape[2]) for z in (x, y)]
                    expected += float((gram[0] - gram[1]) ** 2) / 2
    found = gram_loss(*zip(*layers, strict=True))
    assert float(found) == pytest.approx(expected, rel=1e-12)
    assert float(gram_loss([layers[0][0]], [layers[0][0].flip(3)])) == pytest.approx(0.0, abs=1e-20)


# --- Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": (0, 3)}, "layers: must name numbers of blocks from 0 to 2"),
        ({"layers": ()}, "layers: must name"),
        ({"kernel": 4}, "kernel: must be odd"),
        ({"kernel": 35}, "kernel: 35 is too wide for 16 patches"),
        ({"augment": 1.5}, r"augment: must lie in \[0, 1\]"),
        ({"side": 3}, "side: must be at least 4"),
        ({"norm_images": 0}, "norm_images: must be at least 1"),
    ],
)
def test_settings_that_cannot_work(changes, words):
    with pytest.raises(ValueError, match=words):
        settings(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 25}, "width: 25 is no multiple of heads, 2"),
        ({"width": 28, "rotary": True}, "width: 28 is no multiple of heads times 4"),
        ({"side": 2}, "side: must be at least 4"),
    ],
)
def test_backbones_that_cannot_work(changes, words):
    with pytest.raises(ValueError, match=words):
        VisionTransformerConfig(**SMALL | changes)


def test_a_config_without_kind_is_a_patch_discriminators():
    found = parse_config(TokenizerLossConfig, {"gan": {"discriminator": {"channels": 8, "layers": 2}}})
    assert found.gan.discriminator == PatchDiscriminatorConfig(channels=8, layers=2)
    features = {"kind": "features", "backbone": SMALL, "weights": "random", "layers": [1, 2]}
    found = parse_config(TokenizerLossConfig, {"gan": {"discriminator": features}}).gan.discriminator
    assert found.transformer == VisionTransformerConfig(**SMALL) and found.layers == (1, 2)
    with pytest.raises(ConfigError, match="dinov2_vits14"):
        parse_config(TokenizerLossConfig, {"gan": {"discriminator": {"kind": "features", "backbone": "dinov4"}}})


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ({"gram": {"weight": 1.0}, "perceptual": {"weight": 0.0}}, "which perceptual.weight=0 leaves out"),
        ({"gram": {"weight": 1.0, "features": "discriminator"}}, "needs gan.enabled=true"),
        ({"gram": {"weight": -1.0}}, "must be finite and not negative"),
    ],
)
def test_gram_losses_that_cannot_work(loss, words):
    with pytest.raises(ConfigError, match=words):
        parse_config(TokenizerLossConfig, loss)
