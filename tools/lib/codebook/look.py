"""What tools/inspect_codebook.py does: measure, print, draw."""

import argparse
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ibq.api import load_tokenizer
from ibq.config import UserError
from ibq.data.images import ImageDataset
from ibq.data.index import ImageIndex
from ibq.data.loader import validation_batches
from ibq.data.shards import ImageDataConfig
from ibq.evaluation.codebook import (
    DUPLICATE,
    LOGGED,
    Neighbours,
    Survey,
    channel_evenness,
    last_logged,
    latent_scale,
    nearest_neighbours,
    principal_plane,
    reachable,
    sample_rows,
    spread,
    survey,
)
from ibq.evaluation.reconstruction import MIN_TOKENS_PER_CODE, CodeUsage, effective_rank
from ibq.models.tokenizer import Tokenizer
from ibq.progress import progress_bar, say
from ibq.quantizers import IBQConfig, Quantizer, VQConfig
from ibq.quantizers.base import CodebookQuantizer
from ibq.reports.codebook import CodebookPicture
from ibq.training.checkpoint import weights_hash
from ibq.training.provenance import origin
from ibq.training.run import set_up_torch
from tools.lib.evaluate import record as records
from tools.lib.options import autocast_of, open_images_of, say_left_out

DRAWN_CODES, DRAWN_LATENTS = 16_384, 2_048  # of the points of the picture


def run(arguments: argparse.Namespace, argv: Sequence[str], device: torch.device) -> None:
    """Look at a codebook as the options say; UserError, before anything is written, for what cannot be read."""
    set_up_torch(training=False)
    tokenizer = load_tokenizer(arguments.tokenizer, weights=arguments.weights, device=device)
    quantizer = tokenizer.quantizer
    vectors = quantizer.code_vectors()
    broken = int((~torch.isfinite(vectors)).any(dim=1).sum())
    if broken:
        raise UserError(f"{arguments.tokenizer}: {broken:,} codes are not finite; give an earlier checkpoint")
    images = None
    if arguments.images is not None:
        images = open_images_of(arguments, ImageDataConfig(train=arguments.images, labels=False))
    for option in ("output", "json"):
        if (path := getattr(arguments, option)) is not None:
            records.require_writable(f"--{option}", path)
    seen = None if images is None else look_at_images(tokenizer, images, arguments, device)
    near = None
    if isinstance(quantizer, CodebookQuantizer) and quantizer.num_codes > 1:
        near = neighbours_of(quantizer, vectors, arguments.neighbours)
    figures = {
        "codebook": describe(quantizer),
        "codes": codes_alone(vectors, near),
        "training": noted_by_training(Path(arguments.tokenizer)),
        "images": {} if seen is None else codes_and_latents(quantizer, vectors, near, seen),
    }
    show(arguments, figures)
    if arguments.json is not None:
        dead = [] if seen is None else (seen.counts == 0).nonzero()[:, 0].tolist()
        found = {"origin": origin(shlex.join(["python", "tools/inspect_codebook.py", *argv]))}
        found |= {"tokenizer": arguments.tokenizer, "tokenizer_sha256": weights_hash(tokenizer.state_dict())}
        records.write(arguments.json, found | figures | {"dead_codes": dead})
    if arguments.output is not None:
        picture_of(arguments.tokenizer, quantizer, vectors, near, seen).write(arguments.output)
        say(f"picture: {arguments.output}")


# --- Measuring ---


def look_at_images(
    tokenizer: Tokenizer, images: ImageIndex, arguments: argparse.Namespace, device: torch.device
) -> Survey:
    """Encode all images, with a progress bar; UserError if none of them can be used."""
    dataset = ImageDataset(images, tokenizer.config.resolution)
    batches = validation_batches(
        dataset, arguments.batch_size, workers=arguments.workers, device=device, report=say_left_out
    )
    with progress_bar("encode", len(dataset), "image") as progress, autocast_of(arguments):

        def counted():
            for batch in batches:
                yield batch
                progress.update(len(batch[0]))

        try:
            return survey(tokenizer, counted())
        except ValueError as error:
            raise UserError(
                f"{arguments.images}: none of its images can be used ({error}); mend them, or give others"
            ) from error


def neighbours_of(quantizer: CodebookQuantizer, vectors: Tensor, count: int) -> Neighbours:
    """The nearest other codes of a sample, with a progress bar where that takes a while."""
    rows = sample_rows(len(vectors), count)
    with progress_bar("neighbours", len(rows), "code", disable=len(rows) * vectors.numel() < 2**32) as progress:
        return nearest_neighbours(
            vectors, rows, inner_product=search_of(quantizer) == "inner product", progress=progress.update
        )


def search_of(quantizer: Quantizer) -> str:
    """By what the code of a latent is found."""
    match quantizer.config:
        case _ if not isinstance(quantizer, CodebookQuantizer):
            return "each channel alone"
        case VQConfig(normalize="search"):
            return "angle"
        case IBQConfig() if not quantizer.spherical:
            return "inner product"
    return "angle" if quantizer.spherical else "distance"


def describe(quantizer: Quantizer) -> dict:
    """Which codebook it is."""
    config = quantizer.config
    found = {"kind": config.kind, "num_codes": quantizer.num_codes, "dim": quantizer.dim}
    found["search"] = search_of(quantizer)
    names = ("selection_temperature", "entropy_temperature", "sample_entropy_weight", "batch_entropy_weight")
    return found | {name: getattr(config, name) for name in names if hasattr(config, name)}


def codes_alone(vectors: Tensor, near: Neighbours | None) -> dict:
    """Norms, rank and distances of the codes; of a grid of signs or levels (no `near`) these say nothing."""
    if near is None:
        return {}
    norms = vectors.norm(dim=1)
    return {
        "norm": spread(norms),
        "nearest": spread(near.distances),
        "compared": len(near.rows),
        "duplicates": int((near.distances <= DUPLICATE * norms.median().cpu()).sum()),
        "shadowed": int((~near.own).sum()),
        "effective_rank": effective_rank(vectors),
    }


def noted_by_training(place: Path) -> dict[str, float]:
    """What the log of the run says to which the place belongs."""
    folders = (place, *place.absolute().parents[:2]) if place.is_dir() else ()
    return next((found for folder in folders if (found := last_logged(folder))), {})


def codes_and_latents(quantizer: Quantizer, vectors: Tensor, near: Neighbours | None, seen: Survey) -> dict:
    """Usage over the images, and how latents stand to codes, and codes in use to dead ones."""
    usage = CodeUsage(len(seen.counts))
    usage.counts = seen.counts.cpu()
    figures, used = usage.figures(), usage.used()
    found = {
        "images": seen.images,
        **figures,
        "usage_of_reachable": figures["usage"] / reachable(figures["tokens_per_code"]),
        "dead": int((~used).sum()),
        "codes_by_use": usage.histogram(),
        "latents": asdict(latent_scale(quantizer, seen.latents, seen.codes, vectors)),
    }
    if near is None:
        return found | {"channel_evenness": channel_evenness(vectors, seen.counts)}
    norms = vectors.norm(dim=1).cpu()
    for name, those in (("in_use", used), ("dead", ~used)):
        found[f"norm_{name}"] = spread(norms[those])
        found[f"nearest_{name}"] = spread(near.distances[those[near.rows]])
    return found


# --- Showing ---


def show(arguments: argparse.Namespace, figures: Mapping[str, Mapping]) -> None:
    """Print the figures."""
    codebook, codes, training, images = figures.values()
    print(
        f"{arguments.tokenizer}: {codebook['kind']}, {codebook['num_codes']:,} codes x {codebook['dim']}, "
        f"found by {codebook['search']}"
    )
    rows = [(name.replace("_", " "), f"{value:g}") for name, value in list(codebook.items())[4:]]
    if codes:
        share = "" if codes["compared"] == codebook["num_codes"] else f" ({codes['compared']:,} codes, each among all)"
        rows += [
            ("norm of the codes", ranges(codes["norm"])),
            ("nearest other code", ranges(codes["nearest"]) + share),
            ("the same as another code", f"{codes['duplicates']:,}"),
            ("do not find themselves", f"{codes['shadowed']:,}"),
            ("effective rank", f"{codes['effective_rank']:.1f}"),
        ]
    noted = [name for name in LOGGED if name in training]
    rows += [(f"training: {LOGGED[name]}", f"{training[name]:{'.2%' if 'usage' in name else '.4g'}}") for name in noted]
    if images:
        rows += image_rows(images)
    for name, text in rows:
        print(f"{name:34s} {text}")
    if images and images["tokens_per_code"] < MIN_TOKENS_PER_CODE:
        few = f"note: {images['tokens_per_code']:.1f} tokens per code are few: with under {MIN_TOKENS_PER_CODE} the "
        say(f"{few}usage says as much about the set's size as about the codebook")


def image_rows(images: Mapping) -> list[tuple[str, str]]:
    """What the images have shown, as rows of the table."""
    latents = images["latents"]
    rows = [
        ("images", f"{images['images']:,}, {images['tokens_per_code']:.1f} tokens per code"),
        ("usage", f"{images['usage']:.2%}, {images['usage_of_reachable']:.2%} of reachable codes"),
        ("dead codes", f"{images['dead']:,}"),
        ("perplexity", f"{images['perplexity']:.1f}"),
        ("median norm", f"latents {latents['latent_norm']:.3g}, codes {latents['code_norm']:.3g}"),
        ("error", f"{latents['error']:.3g} of the latents' variance"),
    ]
    if latents["logit_spread"] is not None:
        rows += [("spread of a token's logits", f"{latents['logit_spread']:.3g} selection temperatures")]
        rows += [("codes that share a gradient", f"{latents['codes_sharing']:.1f}")]
    for name, text in (("in_use", "in use"), ("dead", "dead")):
        for figure in ("norm", "nearest"):
            if images.get(f"{figure}_{name}"):
                rows.append((f"{figure}, codes {text}", ranges(images[f"{figure}_{name}"])))
    if "channel_evenness" in images:
        rows.append(("evenness of the channels", " ".join(f"{value:.2f}" for value in images["channel_evenness"])))
    return rows


def ranges(values: Mapping[str, float]) -> str:
    """Lowest to highest values in one line."""
    if math.isclose(values["min"], values["max"], rel_tol=1e-5):
        return f"all {values['max']:.3g}"
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())


def picture_of(
    name: str, quantizer: Quantizer, vectors: Tensor, near: Neighbours | None, seen: Survey | None
) -> CodebookPicture:
    """The picture of what has been measured."""
    title = f"{name}: {quantizer.config.kind}, {quantizer.num_codes:,} codes x {quantizer.dim}"
    used = None if seen is None else (seen.counts > 0).cpu()
    parts = {"codes": torch.ones(len(vectors), dtype=torch.bool)} if used is None else {"dead": ~used, "in use": used}
    latents = vectors[:0] if seen is None else seen.latents[:DRAWN_LATENTS]
    drawn = sample_rows(len(vectors), DRAWN_CODES)
    codes, others = principal_plane(vectors[drawn.to(vectors.device)], latents)
    found = {
        "title": title,
        "counts": None if seen is None else seen.counts,
        "points": {part: codes.cpu()[those[drawn]] for part, those in parts.items()} | {"latents": others},
        "weights": None if used is None else seen.counts.cpu()[drawn][used[drawn]],
    }
    if near is None:
        channels = () if seen is None else channel_evenness(vectors, seen.counts)
        return CodebookPicture(**found, channels=channels)
    distances = {part: near.distances[those[near.rows]] for part, those in parts.items()}
    norms = vectors.norm(dim=1).cpu()
    lengths = {part: norms[those] for part, those in parts.items()}
    if seen is not None:
        distances["latents"] = (seen.latents - vectors[seen.codes]).norm(dim=1)
        lengths["latents"] = seen.latents.norm(dim=1)
    return CodebookPicture(**found, distances=distances, norms={} if quantizer.spherical else lengths)
