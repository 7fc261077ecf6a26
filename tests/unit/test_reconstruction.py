"""Reconstruction figures against the reference's values, and against figures worked out by hand."""

import math

import pytest
import torch
from support.golden import assert_close, golden_json, golden_tensors
from torch import nn

from ibq.data.transforms import to_uint8
from ibq.evaluation.reconstruction import CodeUsage, effective_rank, evaluate_reconstruction, psnr, ssim, thumbnail

TENSORS = golden_tensors("evaluator")
GOLDEN = golden_json("evaluator")["values"]["psnr_ssim"]
BATCHES = sorted(key.split("/")[1] for key in TENSORS if key.startswith("images/") and key.endswith("/gt_uint8"))
PSNR_TOLERANCE_DB, SSIM_TOLERANCE = 1e-5, 1e-5  # stated in the data's README, against the float64 values


def golden_images(batch, name):
    return TENSORS[f"images/{batch}/{name}_uint8"].permute(0, 3, 1, 2)  # B, H, W, C -> B, C, H, W


def pair(batch):
    return golden_images(batch, "gt"), golden_images(batch, "rec")


def expected(batch, name):
    return torch.tensor(GOLDEN["per_image"][f"batch_{batch}"][f"{name}_float64"], dtype=torch.float64)


@pytest.mark.parametrize("batch", BATCHES)
def test_golden_psnr_and_ssim(batch):
    originals, reconstructions = pair(batch)
    assert_close(psnr(originals, reconstructions), expected(batch, "psnr"), PSNR_TOLERANCE_DB, "psnr")
    assert_close(ssim(originals, reconstructions), expected(batch, "ssim"), SSIM_TOLERANCE, "ssim")
    identical = GOLDEN["per_image"][f"batch_{batch}"].get("identical_images", {})
    if "ssim" in identical:
        same = ssim(originals, originals)
        assert_close(same, torch.full_like(same, identical["ssim"]), SSIM_TOLERANCE, "ssim of equal images")


def test_golden_means_are_over_images():
    images = [pair(batch) for batch in BATCHES]
    for name, figure, tolerance in (("psnr", psnr, PSNR_TOLERANCE_DB), ("ssim", ssim, SSIM_TOLERANCE)):
        mean = torch.cat([figure(*both) for both in images]).mean()
        assert_close(mean, GOLDEN["mean_over_images"][name], tolerance, name)


def test_golden_conversion_truncates():
    floats = {key.split("/")[1]: value for key, value in TENSORS.items() if key.endswith("/gt_float")}
    assert floats
    for batch, values in floats.items():
        converted = to_uint8(values.permute(0, 3, 1, 2))
        assert torch.equal(converted, golden_images(batch, "gt")[: len(converted)])


@pytest.mark.parametrize("batch", BATCHES)
def test_golden_comparison_notices_a_changed_channel(batch):
    originals, reconstructions = pair(batch)
    changed = reconstructions.clone()
    changed[0, 0] ^= 16
    with pytest.raises(AssertionError, match="differs"):
        assert_close(psnr(originals, changed), expected(batch, "psnr"), PSNR_TOLERANCE_DB, "psnr")
    with pytest.raises(AssertionError, match="differs"):
        assert_close(ssim(originals, changed), expected(batch, "ssim"), SSIM_TOLERANCE, "ssim")


def test_psnr_by_hand():
    black = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    other = black.clone()
    other[0] = 255  # mean square error 1: 0 dB
    other[1] = 51  # 0.2 ** 2 = 0.04
    assert psnr(black, other).tolist() == pytest.approx([0.0, -10 * math.log10(0.04)])
    assert torch.isinf(psnr(black, black)).all()


def test_ssim_of_images_below_its_window():
    images = torch.zeros(1, 3, 7, 6, dtype=torch.uint8)
    with pytest.raises(ValueError, match="at least 7 x 7 pixels, got 7 x 6"):
        ssim(images, images)
    smallest = torch.zeros(1, 3, 7, 7, dtype=torch.uint8)
    assert ssim(smallest, smallest) == 1


def test_thumbnail():
    flat = torch.full((2, 3, 32, 32), 77, dtype=torch.uint8)
    assert torch.equal(thumbnail(flat, 8), flat)
    ramp = torch.arange(32).repeat(32, 1).mul(8).to(torch.uint8).expand(1, 3, 32, 32)
    found = thumbnail(ramp, 8)
    assert found.shape == ramp.shape and found.dtype == torch.uint8
    assert (found.int() - ramp.int()).abs()[..., 6:-6].max() <= 2  # bicubic keeps a ramp, but for the borders
    noise = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert psnr(noise, thumbnail(noise, 8)) < psnr(noise, thumbnail(noise, 16)) < psnr(noise, thumbnail(noise, 32))


def test_thumbnail_against_pillow():
    import numpy as np
    from PIL import Image

    originals, _ = pair(BATCHES[0])
    image = originals[:1, :, :40, :40]
    pil = Image.fromarray(image[0].permute(1, 2, 0).contiguous().numpy())
    pil = pil.resize((8, 8), Image.Resampling.BICUBIC).resize((40, 40), Image.Resampling.BICUBIC)
    difference = np.asarray(pil).astype(int) - thumbnail(image, 8)[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(difference).mean() < 1.5  # another bicubic kernel (a = -0.5 against -0.75 upwards)


def test_code_usage_by_hand():
    usage = CodeUsage(8)
    usage.add(torch.tensor([[0, 0], [1, 1]]))
    usage.add(torch.tensor([2, 2, 3, 3]))
    found = usage.figures()
    assert found == pytest.approx({"usage": 0.5, "perplexity": 4.0, "entropy": math.log(4), "tokens_per_code": 1.0})
    assert usage.used().tolist() == [True] * 4 + [False] * 4
    usage.add(torch.full((24,), 7))
    p = [1 / 16] * 4 + [3 / 4]
    assert usage.figures()["entropy"] == pytest.approx(-sum(x * math.log(x) for x in p))
    assert usage.figures()["usage"] == 5 / 8
    nothing = CodeUsage(8).figures()
    assert nothing["usage"] == 0 and nothing["perplexity"] == 1


def test_effective_rank_by_hand():
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.ones(9, 4)) == pytest.approx(1, abs=1e-4)
    assert effective_rank(3 * torch.eye(4)[:2]) == pytest.approx(2)
    p = torch.tensor([0.75, 0.25])
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(float((-(p * p.log()).sum()).exp()))
    assert effective_rank(torch.empty(0, 4)) == 0.0
    vectors = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    s = torch.linalg.svdvals(vectors.double())
    p = s / s.sum()
    assert effective_rank(vectors) == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-9)


class Halving(nn.Module):
    """A stand-in tokenizer: a code per 4x4 block, its mean brightness in 16 levels."""

    downsampling = 4

    def __init__(self):
        super().__init__()
        self.quantizer = nn.Module()
        self.quantizer.num_codes = 16
        self.codebook = nn.Parameter(torch.linspace(-1, 1, 16)[:, None].repeat(1, 3))
        self.quantizer.code_vectors = lambda: self.codebook

    def encode(self, images):
        means = nn.functional.avg_pool2d(images.mean(dim=1), 4)
        return ((means + 1) * 7.5).round().long()

    def decode(self, codes):
        values = self.codebook[codes].detach().permute(0, 3, 1, 2)
        return nn.functional.interpolate(values, scale_factor=4)


@pytest.mark.parametrize("sizes", [[7], [3, 4], [1] * 7, [6, 1]])
def test_figures_are_exact_whatever_the_batches(sizes):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (7, 3, 16, 16), generator=generator, dtype=torch.uint8)
    tokenizer = Halving()
    report = evaluate_reconstruction(tokenizer, [(part, None) for part in images.split(sizes)], keep=4)
    unit = images.float() / 127.5 - 1
    codes = tokenizer.encode(unit)
    outputs = tokenizer.decode(codes)
    uint8 = to_uint8(outputs)
    expected = {
        "psnr": float(psnr(images, uint8).mean()),
        "ssim": float(ssim(images, uint8).mean()),
        "thumbnail_psnr": float(psnr(images, thumbnail(images, 4)).mean()),
        "images": 7,
        "usage": len(codes.unique()) / 16,
        "tokens_per_code": 7 * 16 / 16,
        "effective_rank": 1.0,
    }
    for name, value in expected.items():
        assert report.metrics[name] == pytest.approx(value, rel=1e-9, abs=1e-6), name
    assert report.metrics["l1"] == pytest.approx(float((unit - outputs).abs().mean()), rel=1e-6)
    assert torch.equal(report.histogram, codes.flatten().bincount(minlength=16))
    assert torch.equal(report.originals, images[:4]) and torch.equal(report.reconstructions, uint8[:4])


def test_an_exact_copy_counts_as_a_hundred_db():
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)  # black is a level of the stand-in
    assert evaluate_reconstruction(Halving(), [(images, None)]).metrics["psnr"] == 100


def test_a_rank_without_images_reports_nothing():
    report = evaluate_reconstruction(Halving(), [])
    assert report.metrics["images"] == 0 and math.isnan(report.metrics["psnr"])
    assert report.originals.numel() == 0


def test_lpips_is_a_mean_over_images():
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)

    class Distance(nn.Module):
        def forward(self, x, y):
            return (x - y).square().mean(dim=(1, 2, 3), keepdim=True)

    whole, parts = (
        evaluate_reconstruction(Halving(), [(p, None) for p in images.split(n)], perceptual=Distance()) for n in (5, 2)
    )
    assert whole.metrics["lpips"] == pytest.approx(parts.metrics["lpips"], rel=1e-6) and whole.metrics["lpips"] > 0
