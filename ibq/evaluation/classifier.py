"""A small classifier of real images, and what it makes of generated ones: for sets that Inception says little about.

It is trained in seconds on the set's own training images; the share of generated images that it takes for what they
were meant to be, beside its accuracy on real validation images, says whether the classes are recognisable. The distance
to the nearest training image, in pixels and in the classifier's features, says whether they are copies.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ibq.config import UserError, require_least
from ibq.data.transforms import to_unit_range
from ibq.evaluation.distances import Gaussian, Moments, frechet_distance, nearest

BATCH = 128
SHIFT = 8  # an image is moved by up to its size / SHIFT in training


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """How it is built and trained; the same seed gives the same classifier on a given device and thread count."""

    size: int = 32  # pixels of the images' sides
    width: int = 16  # channels of the first convolution; doubled at each of three halvings
    steps: int = 250
    learning_rate: float = 3e-3
    seed: int = 0

    def __post_init__(self):
        require_least(self, steps=1)


class Classifier(nn.Module):
    """uint8 images [B, 3, H, W] -> logits [B, classes]; `features` [B, 4 width] are what it sees in them."""

    def __init__(self, num_classes: int, config: ClassifierConfig):
        super().__init__()
        layers, channels = [], 3
        for width in (config.width, 2 * config.width, 4 * config.width):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
            channels = width
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """What the head sees, averaged over the image."""
        x = self.trunk(to_unit_range(images))
        return x.mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.features(images))


def train_classifier(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    config: ClassifierConfig | None = None,
    advance: Callable[[int], None] = lambda steps: None,
) -> Classifier:
    """A classifier in eval mode of uint8 images [N, 3, H, W] on their device; every class is drawn equally often.

    UserError where fewer than two classes have images.
    """
    config = config or ClassifierConfig()
    present = labels.unique()
    if len(present) < 2:
        raise UserError(f"a classifier needs training images of at least 2 classes, found {len(present)}")
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Classifier(num_classes, config)
    model = model.to(images.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps + 1)
    weights = (1 / labels.bincount(minlength=num_classes).clamp_min(1).double())[labels].cpu()
    for _ in range(config.steps):
        chosen = torch.multinomial(weights, BATCH, replacement=True, generator=generator).to(images.device)
        moved = _moved(images[chosen], generator)
        loss = F.cross_entropy(model(moved), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        advance(1)
    return model.eval().requires_grad_(False)


def _moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each half of the batch mirrored or not, and moved as a whole; the edges are repeated."""
    most = max(images.shape[-1] // SHIFT, 1)
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None].to(images.device), images.flip(3), images)
    left, top = torch.randint(0, 2 * most + 1, (2,), generator=generator).tolist()
    padded = F.pad(images.float(), (most,) * 4, mode="replicate").to(torch.uint8)
    return padded[..., top : top + images.shape[2], left : left + images.shape[3]]


@torch.no_grad()
def classify(model: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """(most likely class [N], features [N, D]) of uint8 images."""
    features = torch.cat([model.features(part) for part in images.split(BATCH)])
    return model.head(features).argmax(dim=1), features


def accuracies(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Share that is right over all images, and the mean of the classes' shares."""
    right = predicted == labels
    shares = [right[labels == label].double().mean() for label in labels.unique()]
    return {"accuracy": float(right.double().mean()), "balanced_accuracy": float(torch.stack(shares).mean())}


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """uint8 [N, 3, H, W] and classes [N]."""

    images: Tensor
    labels: Tensor


def evaluate_with_classifier(
    train: LabelledImages,
    validation: LabelledImages,
    generated: LabelledImages,
    num_classes: int,
    config: ClassifierConfig | None = None,
    advance: Callable[[int], None] = lambda steps: None,
) -> dict[str, float]:
    """Accuracy on real validation images and on generated ones, and distances to the training images.

    "nearest" are means over images of the distance to the nearest one: "pixel" is the root mean square difference of
    values in [-1, 1], "feature" the Euclidean one of the classifier's features; the validation images' own say what is
    usual. "frechet" is the Frechet distance of the sets' features, as FID (Heusel et al., 2017) has it of Inception's.
    UserError for classes that the real images do not have.
    """
    for name, part in (("validation", validation), ("generated", generated)):
        if not len(part.labels):
            raise UserError(f"no {name} images for the classifier")
        if int(part.labels.max()) >= num_classes or int(part.labels.min()) < 0:
            raise UserError(f"a class of the {name} images is none of the {num_classes} of the training images")
    config = config or ClassifierConfig()
    model = train_classifier(train.images, train.labels, num_classes, config, advance)
    _, known_features = classify(model, train.images)
    known_pixels = to_unit_range(train.images).flatten(1)
    metrics = {"chance": 1 / num_classes, "train_images": len(train.labels), "steps": config.steps}
    for name, part in (("validation", validation), ("generated", generated)):
        predicted, features = classify(model, part.images)
        metrics |= {f"{name}_{key}": value for key, value in accuracies(predicted, part.labels).items()}
        pixels = to_unit_range(part.images).flatten(1)
        distance, _ = nearest(pixels, known_pixels)
        metrics[f"{name}_nearest_pixel"] = float(distance.mean() / pixels.shape[1] ** 0.5)
        metrics[f"{name}_nearest_feature"] = float(nearest(features, known_features)[0].mean())
        if min(len(features), len(known_features)) > 1:
            metrics[f"{name}_frechet"] = frechet_distance(_gaussian(known_features), _gaussian(features))
        metrics[f"{name}_images"] = len(part.labels)
    return metrics


def _gaussian(features: Tensor) -> Gaussian:
    moments = Moments(features.shape[1])
    moments.add(features)
    return moments.gaussian()
