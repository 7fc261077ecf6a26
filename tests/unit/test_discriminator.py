"""The patch discriminator: batch statistics over ranks, shapes, settings."""

import pytest
import torch
from torch import Tensor, nn

from ibq.models.discriminator import BatchNorm2d, PatchDiscriminator, PatchDiscriminatorConfig


def draw(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).add(3.0).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_reduction_over_one_rank_is_plain_batch_normalization(dtype: torch.dtype):
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    plain, ours = nn.BatchNorm2d(4, dtype=parameters), BatchNorm2d(4, dtype=parameters)
    ours.mean_over_ranks = lambda value: value
    x = draw(3, 4, 6, 5, dtype=dtype)
    expected, actual = plain(x), ours(x)
    assert actual.dtype == expected.dtype == dtype
    tolerance = 4 * float(expected.detach().abs().max()) * torch.finfo(dtype).eps
    assert float((actual - expected).detach().abs().max()) <= tolerance
    for name, value in plain.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value, rtol=1e-5), name


def test_two_ranks_have_the_statistics_of_the_joint_batch():
    """Rank 0 of two, its reductions completed with what rank 1 would send."""
    joint, ours = nn.BatchNorm2d(4).double(), BatchNorm2d(4).double()
    halves = draw(6, 4, 5, 5).chunk(2)
    mean = torch.cat(halves).mean(dim=(0, 2, 3))
    other = iter([halves[1].mean(dim=(0, 2, 3)), (halves[1] - mean[:, None, None]).square().mean(dim=(0, 2, 3))])
    ours.mean_over_ranks, ours.world_size = lambda value: (value + next(other)) / 2, 2
    expected = joint(torch.cat(halves)).chunk(2)[0]
    assert torch.allclose(ours(halves[0]), expected, rtol=1e-10, atol=1e-12)
    for name, value in joint.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value, rtol=1e-12), name


def test_evaluation_uses_the_running_statistics():
    plain, ours = nn.BatchNorm2d(4).eval(), BatchNorm2d(4).eval()
    ours.mean_over_ranks = pytest.fail
    x = draw(2, 4, 3, 3, dtype=torch.float32)
    assert torch.equal(ours(x), plain(x))


def test_every_norm_of_the_discriminator_is_told():
    discriminator = PatchDiscriminator(PatchDiscriminatorConfig(channels=4, layers=2))
    calls = []
    discriminator.use_world_statistics(lambda value: calls.append(value) or value, world_size=3)
    norms = [module for module in discriminator.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(norm.world_size == 3 for norm in norms)
    discriminator(torch.zeros(1, 3, 32, 32))
    assert len(calls) == 2 * len(norms)


@pytest.mark.parametrize(("layers", "side"), [(1, 14), (2, 6), (3, 2)])
def test_patch_logits(layers: int, side: int):
    discriminator = PatchDiscriminator(PatchDiscriminatorConfig(channels=4, layers=layers))
    assert discriminator(torch.zeros(2, 3, 32, 32)).shape == (2, 1, side, side)


@pytest.mark.parametrize("field", ["channels", "layers"])
def test_settings_that_cannot_work(field: str):
    with pytest.raises(ValueError, match=f"^{field}: "):
        PatchDiscriminatorConfig(**{field: 0})
