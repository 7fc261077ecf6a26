"""Losses of the tokenizer's GAN: pure functions of tensors."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

LECAM_DECAY = 0.999
DiscriminatorLoss = Literal["hinge", "vanilla", "non_saturating"]


def discriminator_loss(kind: DiscriminatorLoss, real: Tensor, fake: Tensor) -> Tensor:
    """The loss of that kind of the discriminator's patch logits."""
    match kind:
        case "hinge":
            return hinge_discriminator_loss(real, fake)
        case "vanilla":
            return vanilla_discriminator_loss(real, fake)
        case "non_saturating":
            return non_saturating_discriminator_loss(real, fake)


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator's patch logits (Geometric GAN, arXiv 1705.02894)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Cross-entropy of the discriminator's patch logits (GAN, arXiv 1406.2661)."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def non_saturating_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Cross-entropy of the patch logits averaged per image first."""
    return (F.softplus(-_per_image(real)) + F.softplus(_per_image(fake))).mean()


def non_saturating_generator_loss(fake: Tensor) -> Tensor:
    """softplus(-logit) of the patch logits [B, ...] averaged per image first, mean over images."""
    return F.softplus(-_per_image(fake)).mean()


def _per_image(logits: Tensor) -> Tensor:
    return logits.flatten(1).mean(dim=1)


def lecam_regularizer(real: Tensor, fake: Tensor, average_real: Tensor, average_fake: Tensor) -> Tensor:
    """Distance of the logits to the moving averages of the other kind (LeCAM, arXiv 2104.03310, equation 7)."""
    return F.relu(real - average_fake).square().mean() + F.relu(average_real - fake).square().mean()


def lecam_update(average: Tensor, logits_mean: Tensor, decay: float = LECAM_DECAY) -> Tensor:
    """The moving average after one more batch; it is updated before it is used."""
    return average * decay + logits_mean.detach() * (1 - decay)


def gram_matrix(features: Tensor) -> Tensor:
    """Products of channels, over C L: [B, C, L] -> [B, C, C] (arXiv 1603.08155, equation 3)."""
    return features @ features.transpose(1, 2) / (features.shape[1] * features.shape[2])


def gram_loss(features: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Squared Frobenius distance of Gram matrices (arXiv 1603.08155, equation 4), summed over layers; mean over images.

    `features` and `wanted` of each layer: [B, C, ...].
    """
    found = [
        (gram_matrix(x.flatten(2)) - gram_matrix(y.flatten(2))).square().sum(dim=(1, 2)).mean()
        for x, y in zip(features, wanted, strict=True)
    ]
    return sum(found[1:], found[0])


def adaptive_weight(nll_gradient: Tensor, gan_gradient: Tensor, scale: float) -> Tensor:
    """GAN weight that balances both gradients of the last layer (VQGAN, arXiv 2012.09841, equation 7)."""
    ratio = nll_gradient.norm() / (gan_gradient.norm() + 1e-4)
    return scale * ratio.clamp(0.0, 1e4).detach()
