"""Images of any size: in tiles as without, filled up and cut, with bounded memory, by the command."""

import re

import pytest
import torch
from PIL import Image
from support.models import TOKENIZER
from support.processes import run_script
from support.training import write_best
from torch import nn
from torch.nn import functional as F

from ibq.config import parse_config
from ibq.models.tiling import Tiles, decode_tiled, encode_tiled, reconstruct
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.quantizers import IBQConfig

SMALL = {"resolution": 64, "channels": 32, "channel_multipliers": (1, 2, 2), "res_blocks": 2}
NETWORKS = {
    "vqgan": {"attention_resolutions": (16,), "latent_channels": 32},
    "open_magvit2": {"network": "open_magvit2", "attention_resolutions": (), "latent_channels": 16},
}


@pytest.fixture(scope="module", params=NETWORKS)
def tokenizer(request):
    torch.manual_seed(0)
    config = TokenizerConfig(**SMALL, **NETWORKS[request.param], quantizer=IBQConfig(num_codes=512, dim=16))
    found = Tokenizer(config).eval()
    for module in found.modules():
        if isinstance(module, nn.GroupNorm) and module.affine:  # every channel scaled and shifted in its own way
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return found


def pictures(height: int, width: int, count: int = 2) -> torch.Tensor:
    """Smooth, and with other means and contrasts at every place."""
    coarse = torch.randn(count, 3, 20, 13, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(0.1, 1, 20)[:, None] * torch.linspace(1, 0.3, 13)
    return F.interpolate(coarse * ramp + ramp - 0.5, size=(height, width), mode="bicubic").clamp(-1, 1)


def decibels(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(-10 * ((one.double() - other.double()) / 2).square().mean().log10())


@pytest.mark.parametrize("tile", [16, 50, 128])
@pytest.mark.parametrize("spilled", [False, True])
def test_tiles_give_what_the_whole_gives(tokenizer, tile, spilled, tmp_path):
    images = pictures(160, 104)
    codes = tokenizer.encode(images)
    folder = tmp_path if spilled else None
    assert torch.equal(encode_tiled(tokenizer, images, tile, folder), codes)
    found, whole = decode_tiled(tokenizer, codes, tile, folder), tokenizer.decode(codes)
    assert found.shape == whole.shape and decibels(found, whole) > 100
    assert not list(tmp_path.iterdir())


def test_normalized_by_tile_it_would_show(tokenizer, monkeypatch):
    """The check above notices statistics of a tile in place of the whole's."""
    real = Tiles._scale_and_shift
    monkeypatch.setattr(Tiles, "_scale_and_shift", lambda self, norm, x: real(self, norm, x[..., : x.shape[-1] // 2]))
    images = pictures(160, 104)
    codes = tokenizer.encode(images)
    assert decibels(decode_tiled(tokenizer, codes, 64), tokenizer.decode(codes)) < 60


@pytest.mark.parametrize(("height", "width"), [(37, 101), (64, 20), (130, 33)])
def test_sides_that_do_not_divide(tokenizer, height, width):
    images = pictures(height, width, count=1)
    found, codes = reconstruct(tokenizer, images)
    assert found.shape == images.shape and codes.shape[1:] == (-(-height // 4), -(-width // 4))
    tiled, tiled_codes = reconstruct(tokenizer, images, tile=32)
    assert torch.equal(codes, tiled_codes) and decibels(found, tiled) > 100
    assert torch.equal(images, pictures(height, width, count=1)), "the images stay as they are"


def test_no_tile_is_larger_than_asked_for(tokenizer, monkeypatch):
    seen = []
    conv2d = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, *rest, **more: seen.append(x.shape[2:]) or conv2d(x, *rest, **more))
    reconstruct(tokenizer, pictures(320, 256, count=1), tile=64)
    assert max(max(shape) for shape in seen) <= 2 * 64 + 1  # what a strided convolution sees for 64 cells


def test_tiles_that_are_too_small(tokenizer):
    with pytest.raises(ValueError, match="tile: must be at least 16 cells, got 8"):
        reconstruct(tokenizer, pictures(64, 64), tile=8)


# --- The command ---


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reconstruct")
    torch.manual_seed(0)
    write_best(folder / "tokenizer" / "best", Tokenizer(parse_config(TokenizerConfig, TOKENIZER)))
    for name, size in (("wide", (150, 70)), ("tall", (60, 110))):
        Image.radial_gradient("L").resize(size).convert("RGB").save(folder / f"{name}.png")
    return folder


def command(place, *more: str, images: str = "wide.png") -> list[str]:
    argv = ["tools/reconstruct.py", "--tokenizer", str(place / "tokenizer"), "--device", "cpu"]
    return [*argv, "--images", str(place / images), "--output", str(place / "out"), *more]


def test_pictures_are_written_in_their_own_size(place):
    done = run_script(*command(place, "--tile", "32", "--compare", "--spill", str(place), "--images", str(place)))
    assert done.returncode == 0, done.stderr
    for name, size in (("wide", (150, 70)), ("tall", (60, 110))):
        assert Image.open(place / "out" / f"{name}.png").size == size
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(name))
        assert f"{size[0]} x {size[1]} px" in line and "100.00% of the codes equal" in line
        assert float(re.search(r"against the whole: ([\d.]+) dB", line)[1]) > 100
    assert "peak memory" in done.stderr


def test_another_size(place):
    done = run_script(*command(place, "--size", "96"))
    assert done.returncode == 0, done.stderr
    assert Image.open(place / "out/wide.png").size == (206, 96)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--images", "nothing.png"], "nothing.png: no picture there"),
        (["--images", __file__], "not a readable picture"),
        (["--tile", "8"], "--tile: must be at least 16"),
        (["--compare"], "--compare is about tiles; give --tile too"),
        (["--tile", "32", "--spill", "nowhere"], "--spill: nowhere is no folder"),
        (["--size", "2"], "--size: must be at least"),
    ],
)
def test_mistakes_are_one_line(place, more, words):
    done = run_script(*command(place, *more))
    *_, last = done.stderr.strip().splitlines()
    assert done.returncode == 2 and last.startswith("error: ") and words in last and "Traceback" not in done.stderr
