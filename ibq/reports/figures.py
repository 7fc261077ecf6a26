"""Names, units and meaning of the figures that an evaluation gives, and how to print them."""

import math

BETTER = {"higher": "↑ higher", "lower": "↓ lower", "": "–"}

# Field: (label, how to print it, which direction is better, what it is).
FIELDS = {
    "reconstruction.psnr": ("PSNR", "dB", "higher", "Closeness of reconstructions to originals, pixel by pixel."),
    "reconstruction.thumbnail_psnr": ("Thumbnail PSNR", "dB", "",
        "The same for a thumbnail with one pixel per token, scaled up: what the tokens must beat."),
    "reconstruction.ssim": ("SSIM", "", "higher", "Structural similarity to the originals; 1 means identical."),
    "reconstruction.l1": ("L1", "", "lower", "Mean absolute error of pixel values in [-1, 1]."),
    "reconstruction.lpips": ("LPIPS", "", "lower", "Perceptual distance, by the features of a VGG network."),
    "reconstruction.images": ("Images measured", "int", "", "Validation images behind these figures."),
    "codebook.num_codes": ("Codebook size", "int", "", "Number of codes that a token can take."),
    "codebook.dim": ("Code dimension", "int", "", "Length of each code's vector."),
    "codebook.usage": ("Codebook usage", "%", "higher", "Share of the codes that occur at least once."),
    "codebook.perplexity": ("Codebook perplexity", "", "higher",
        "exp(entropy) of the codes: as many equally frequent codes would carry as much information."),
    "codebook.entropy": ("Codebook entropy", "nats", "higher", "Entropy of the codes' frequencies."),
    "codebook.effective_rank": ("Effective rank", "", "higher",
        "Number of independent directions that the used codes span, at most the code dimension."),
    "codebook.tokens_per_code": ("Tokens per code", "", "", "Tokens counted for each code on average."),
    "tokens_per_image": ("Tokens per image", "int", "", "Length of the sequence that stands for an image."),
    "ar.val_nll": ("Validation NLL", "nats/token", "lower",
        "Transformer's surprise at each token of unseen images, given their class and all tokens before."),
    "ar.bigram_nll": ("Bigram NLL", "nats/token", "", "The same when only the token before is known: a baseline."),
    "ar.unigram_nll": ("Unigram NLL", "nats/token", "", "The same when only token frequencies are known."),
    "classifier.generated_accuracy": ("Generated images recognised", "%", "higher",
        "Share of the samples that a small classifier, trained on the real images, takes for the class they were meant "
        "to be."),
    "classifier.validation_accuracy": ("Real images recognised", "%", "", "The same share of unseen real images."),
    "classifier.chance": ("Chance", "%", "", "What guessing among the classes gives."),
    "classifier.generated_nearest_pixel": ("Distance to the nearest training image", "", "",
        "Mean over samples of the root mean square difference of pixels in [-1, 1]: near 0 means copies."),
    "classifier.validation_nearest_pixel": ("The same of unseen real images", "", "", "What is usual."),
    "steps.tokenizer": ("Tokenizer steps", "int", "", "Training steps of the first stage."),
    "steps.transformer": ("Transformer steps", "int", "", "Training steps of the second stage."),
    "seconds": ("Total time", "s", "lower", "Wall-clock time from the data to this page."),
}  # fmt: skip


def as_number(value: object) -> float:
    """A float; NaN for what is no number."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def number(value: float, unit: str = "") -> str:
    """A figure with its unit ("int", "%", "s" and "short" have their own forms); "n/a" for NaN."""
    if math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    match unit:
        case "int":
            return f"{value:,.0f}"
        case "%":
            return f"{value:.1%}"
        case "s":
            return duration(value)
        case "dB":
            return f"{value:.2f} dB"
        case "short":
            return short_number(value)
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 3
    return f"{value:,.{digits}f} {unit}".strip()


def short_number(value: float) -> str:
    """A number in few characters: 1,500 -> 1.5k, 2,000,000 -> 2M."""
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds for people: 4.2 s, 3 min 05 s, 2 h 10 min."""
    if math.isnan(seconds):
        return "n/a"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
