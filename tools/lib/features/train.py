"""Train a small vision transformer as a classifier, and write it as a backbone of frozen features."""

import argparse

import torch
from torch import Tensor, nn

from ibq.data.shards import open_images
from ibq.data.transforms import to_unit_range
from ibq.evaluation.classifier import BATCH, ClassifierConfig, accuracies, fit_classifier
from ibq.models.frozen_features import normalized
from ibq.models.vision_transformer import VisionTransformer, VisionTransformerConfig
from ibq.progress import progress_bar
from ibq.tensor_file import write_tensors
from tools.lib.evaluate.generation import real_images, with_classes_of
from tools.lib.options import settings_of


class TokenClassifier(nn.Module):
    """uint8 images [B, 3, S, S] -> logits of the class token."""

    def __init__(self, config: VisionTransformerConfig, num_classes: int):
        super().__init__()
        self.backbone = VisionTransformer(config)
        self.head = nn.Linear(config.width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes]."""
        backbone = self.backbone
        (tokens,) = backbone(normalized(to_unit_range(images)), (backbone.config.depth,))
        return self.head(backbone.norm(tokens[:, 0]))


def run(arguments: argparse.Namespace, device: torch.device) -> None:
    """Train as the command line says; UserError for settings that cannot work."""
    shape = settings_of(VisionTransformerConfig, arguments)
    training = ClassifierConfig(
        size=shape.side, steps=arguments.steps, learning_rate=arguments.learning_rate, seed=arguments.seed
    )
    train, validation = (open_images(place) for place in (arguments.images, arguments.validation))
    validation = with_classes_of(train, validation, "--validation: classes are matched by name with --images")
    sets = [real_images(index, shape.side, device)[0] for index in (train, validation)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments.seed)
        model = TokenClassifier(shape, len(train.classes)).to(device)
    with progress_bar("features", arguments.steps, "step") as progress:
        fit_classifier(model, sets[0].images, sets[0].labels, training, progress.update)
    predicted = torch.cat([model(part).argmax(dim=1) for part in sets[1].images.split(BATCH)])
    found = accuracies(predicted, sets[1].labels)["balanced_accuracy"]
    print(
        f"balanced accuracy on {len(predicted):,} validation images: {found:.1%}, chance {1 / len(train.classes):.1%}"
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(arguments.output, {name: t.contiguous().cpu() for name, t in model.backbone.state_dict().items()})
