"""tools/evaluate.py: the same figures for every number of processes, with all that they depend on, checked again."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.models import TOKENIZER, TRANSFORMER
from support.processes import run_ranks, run_script
from support.training import CLASSES, CODES, picture, png, write_best, write_images

import ibq
from ibq.config import UserError, parse_config
from ibq.data.images import ImageDataset
from ibq.data.shards import open_images
from ibq.data.transforms import to_uint8, to_unit_range
from ibq.evaluation.classifier import (
    ClassifierConfig,
    LabelledImages,
    classify,
    evaluate_with_classifier,
    train_classifier,
)
from ibq.evaluation.features import Inception
from ibq.evaluation.image_sets import NpzImages
from ibq.models.perceptual import BACKBONES, build_lpips
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import Transformer, TransformerConfig
from tools import evaluate
from tools.lib.evaluate.generation import as_numbered_in

IMAGES = 19  # of which neither the batches nor the blocks nor the ranks have equal shares


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several threads on a busy machine wait for each other more than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images, a tokenizer, Inception's and LPIPS' weights at random, and generated images."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_images(folder, count=20, validation=IMAGES)
    torch.manual_seed(0)
    # AlexNet sees nothing in the 16 pixels of the pictures.
    write_best(folder / "tokenizer" / "best", Tokenizer(parse_config(TokenizerConfig, TOKENIZER | {"resolution": 32})))
    write_best(folder / "tokenizer16" / "best", Tokenizer(parse_config(TokenizerConfig, TOKENIZER)))
    write_best(folder / "transformer" / "best", Transformer(parse_config(TransformerConfig, TRANSFORMER)))
    torch.save(Inception().state_dict(), folder / "inception.pth")
    for net in BACKBONES:
        state = build_lpips(net, "random", remedy="").net.state_dict()
        torch.save({f"features.{name.split('.', 1)[1]}": value for name, value in state.items()}, folder / f"{net}.pth")
    done = run_script(*sample(folder, "samples"))
    assert done.returncode == 0, done.stderr
    return folder


def sample(place: Path, name: str) -> list[str]:
    models = ["--tokenizer", str(place / "tokenizer16"), "--transformer", str(place / "transformer")]
    return ["tools/sample.py", *models, "--device", "cpu", "--total", "12", "--output", str(place / name)]


def reconstruction(place: Path, *more: str) -> list[str]:
    argv = ["tools/evaluate.py", "reconstruction", "--tokenizer", str(place / "tokenizer"), "--device", "cpu"]
    argv += ["--images", f"{place}/val-0.tar", "--inception", str(place / "inception.pth"), "--workers", "0"]
    return [*argv, "--lpips", str(place / "vgg.pth"), "--lpips-alex", str(place / "alex.pth"), *more]


def generation(place: Path, *more: str) -> list[str]:
    argv = ["tools/evaluate.py", "generation", "--samples", str(place / "samples/samples.npz"), "--device", "cpu"]
    return [*argv, *more]


@pytest.fixture(scope="module")
def whole(place):
    """The record of one process."""
    path = place / "whole.json"
    done = run_script(*reconstruction(place, "--json", str(path)))
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


def test_every_figure_is_there(whole):
    metrics = whole["metrics"]
    expected = {"psnr", "ssim", "l1", "lpips", "lpips_alex", "rfid", "usage", "perplexity", "effective_rank", "images"}
    assert expected <= metrics.keys() and metrics["images"] == IMAGES == whole["image_count"]
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert metrics["rfid"] > 0 and metrics["lpips"] > 0 and metrics["lpips"] != metrics["lpips_alex"]


def test_reconstructions_as_samples(place, tmp_path):
    """With the classes of the images, in their order; 19 images are a block and a part of one."""
    command = ["tools/evaluate.py", "reconstruction", "--tokenizer", str(place / "tokenizer16"), "--device", "cpu"]
    command += ["--images", f"{place}/val-0.tar", "--workers", "0", "--batch-size", "5"]
    done = run_script(*command, "--samples", str(tmp_path / "new" / "s.npz"), "--json", str(tmp_path / "r.json"))
    assert done.returncode == 0, done.stderr
    found = NpzImages(tmp_path / "new" / "s.npz")
    assert found.labels().tolist() == [(20 + number) % CLASSES for number in range(IMAGES)]
    (written,) = found.blocks(100)
    images, _, _ = ImageDataset(open_images(f"{place}/val-0.tar"), 16).batch(range(IMAGES))
    tokenizer = ibq.load_tokenizer(place / "tokenizer16", device="cpu")
    with torch.no_grad():
        expected = to_uint8(tokenizer.decode(tokenizer.encode(to_unit_range(images))))
    assert (written.int() - expected.int()).abs().max() <= 1
    error = (written.double() - images.double()).square().flatten(1).mean(1) / 255**2
    psnr = json.loads((tmp_path / "r.json").read_text())["metrics"]["psnr"]
    assert float((-10 * error.log10()).mean()) == pytest.approx(psnr)


def test_reconstructions_are_judged_by_the_names_of_their_classes(tmp_path):
    """Images of two classes, numbers 0 and 1, by a classifier that knows a third, before them."""
    for number, name in enumerate(("apple", "pear", "plum")):
        for part in ("train", "val"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for copy in range(2):
                pixels = np.full((16, 16, 3), 100 * number + copy, np.uint8)
                Image.fromarray(pixels).save(folder / f"{copy}.png")
    shutil.rmtree(tmp_path / "val" / "apple")
    torch.manual_seed(0)
    write_best(tmp_path / "tokenizer" / "best", Tokenizer(parse_config(TokenizerConfig, TOKENIZER)))
    given = ["--tokenizer", str(tmp_path / "tokenizer"), "--images", str(tmp_path / "val"), "--workers", "0"]
    off = ["--device", "cpu", "--lpips", "none", "--inception", "none", "--lpips-alex", "none"]
    evaluate.main(["reconstruction", *given, *off, "--samples", str(tmp_path / "s.npz")])
    samples = NpzImages(tmp_path / "s.npz")
    assert samples.labels().tolist() == [0, 0, 1, 1] and samples.class_names() == ["pear", "plum"]
    train = open_images(str(tmp_path / "train"))
    assert as_numbered_in(train, samples, samples.labels()).tolist() == [1, 1, 2, 2]
    only = open_images(str(tmp_path / "val")).numbered_as(["pear", "plum"])
    only.classes = ["pear", "fig"]
    with pytest.raises(UserError, match="class 'plum' is none of the classifier's"):
        as_numbered_in(only, samples, samples.labels())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--samples", "s.npz", "--buckets", "16x16"), "--samples: holds images of one shape, from one process"),
        (("--samples", "s.png"), "--samples s.png: give a name that ends in .npz"),
        (("--samples", "tests"), "--samples tests: cannot be written (it is a folder)"),
    ],
)
def test_samples_that_cannot_be(place, options, words):
    done = run_script(*reconstruction(place, *options))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr


def test_samples_of_images_without_a_class(place, tmp_path):
    """Refused: figures with and without --samples are of the same images."""
    shutil.copy(place / "train-0.tar", tmp_path)
    with tarfile.open(tmp_path / "train-0.tar", "a") as tar:
        data = png(picture(1))
        member = tarfile.TarInfo("unlabelled.png")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    given = ["--tokenizer", str(place / "tokenizer16"), "--images", str(tmp_path / "train-0.tar"), "--device", "cpu"]
    done = run_script("tools/evaluate.py", "reconstruction", *given, "--samples", str(tmp_path / "s.npz"))
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "--samples: image 'unlabelled' has no class of its place: no label" in said


def test_a_record_says_what_its_figures_depend_on(whole):
    assert whole["inputs"].keys() == {
        *("tokenizer_sha256", "images_sha256", "inception_sha256", "lpips_sha256", "lpips_alex_sha256")
    }
    assert whole["config"]["quantizer"]["num_codes"] == CODES and whole["protocol"]["rfid"]["reference"]
    assert {"torch", "numpy", "torch-fidelity", "lpips"} <= whole["versions"].keys()
    assert "NOT the published" in whole["protocol"]["rfid"]["network"]
    assert whole["git"] and whole["device"] == "cpu"


@pytest.mark.parametrize(("ranks", "batch"), [(1, 5), (3, 7)])
def test_figures_are_the_same_for_every_number_of_processes_and_batch(place, whole, ranks, batch):
    path = place / f"ranks-{ranks}.json"
    command = reconstruction(place, "--json", str(path), "--batch-size", str(batch))
    done = run_ranks(ranks, *command) if ranks > 1 else run_script(*command)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert found["inputs"] == whole["inputs"] and found["codes_by_use"] == whole["codes_by_use"]
    for name, value in whole["metrics"].items():
        tolerance = 1e-6 if name == "rfid" else 1e-12  # of a singular covariance in 2,048 dimensions
        assert found["metrics"][name] == pytest.approx(value, rel=tolerance), name
    assert found["ranks"] == ranks and done.stdout.count("psnr") == 2, "only one process prints"


def test_images_that_are_too_small_for_alexnet(place, monkeypatch):
    argv = reconstruction(place, "--tokenizer", str(place / "tokenizer16"), "--inception", "none")
    with pytest.raises(UserError, match="--lpips-alex: AlexNet sees nothing in images of 16 px, 31 px are the least"):
        evaluate.main(argv[1:])
    assert evaluate.main([*argv[1:], "--lpips-alex", "auto"]) == 0


def test_verify_measures_again(place, whole, tmp_path):
    record = tmp_path / "record.json"
    argv = reconstruction(place, "--inception", "none", "--lpips", "none", "--lpips-alex", "none")
    assert evaluate.main([*argv[1:], "--json", str(record)]) == 0
    assert evaluate.main(["verify", str(record)]) == 0
    for change, words in (("metrics", "psnr"), ("inputs", "images_sha256")):
        found = json.loads(record.read_text())
        found[change][words] = found["metrics"]["psnr"] * (1 + 1e-5) if change == "metrics" else "other"
        (tmp_path / "changed.json").write_text(json.dumps(found))
        assert evaluate.main(["verify", str(tmp_path / "changed.json")]) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a readable JSON file"),
        ("[]", "not the record of an evaluation"),
        ('{"format": 1, "command": "generation", "arguments": ["reconstruction"]}', "do not begin with the command"),
        ('{"format": 1, "command": "generation", "arguments": ["generation"], "inputs": {}, "metrics": {}}', "missing"),
        (
            '{"format": 1, "command": "reconstruction", "arguments": ["reconstruction", "--images", "pipe:touch x"],'
            ' "inputs": {}, "metrics": {"psnr": 1}}',
            "would run a shell command",
        ),
        (
            '{"format": 1, "command": "generation", "arguments": ["generation", "--nonsense"], "inputs": {},'
            ' "metrics": {"fid": 1}}',
            "its arguments are not those of",
        ),
    ],
)
def test_records_that_cannot_be_verified(text, words, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        evaluate.main(["verify", str(tmp_path / "x.json")])
    assert "x.json" in str(caught.value)


def test_generation_against_a_reference_and_by_a_classifier(place, capsys):
    """Over two processes and in one, with the sampler's settings in the record."""
    options = ["--reference", f"{place}/train-1.tar", "--inception", str(place / "inception.pth")]
    options += ["--batch-size", "8"]  # so that both processes have images
    options += ["--classifier", f"{place}/train-*.tar", "--classifier-size", "16", "--classifier-steps", "5"]
    records = []
    for ranks in (1, 2):
        path = place / f"generation-{ranks}.json"
        command = generation(place, *options, "--json", str(path))
        done = run_ranks(ranks, *command) if ranks > 1 else run_script(*command)
        assert done.returncode == 0, done.stderr
        records.append(json.loads(path.read_text()))
    one, two = records
    names = [name for name, value in one["metrics"].items() if isinstance(value, dict) and name != "classifier"]
    assert len(names) == 1 and names[0].startswith("train-1.tar@")
    assert one["metrics"][names[0]].keys() == {"fid", "sfid", "precision", "recall"}
    for name, value in one["metrics"][names[0]].items():
        assert two["metrics"][names[0]][name] == pytest.approx(value, rel=1e-6), name
    assert f"fid vs {names[0]}".lower() in done.stdout.lower()
    assert one["metrics"]["classifier"]["generated_images"] == 12
    assert one["metrics"]["classifier"] == two["metrics"]["classifier"]
    assert one["image_count"] == 12 and one["sampler"] == one["samples_made_by"]["sampler"] is not None
    assert one["seed"] == one["samples_made_by"]["seed"] is not None
    assert one["checkpoint"]["transformer"], "the models that made the samples are named"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give --reference for FID"),
        (["--reference", "nothing.npz"], "no file 'nothing.npz'"),
        (["--reference", "x", "--inception", "nothing.pth"], "no Inception weights at 'nothing.pth'"),
        (["--classifier", "x", "--classifier-size", "4"], "--classifier-size must be at least 8"),
    ],
)
def test_mistakes(place, options, words, monkeypatch):
    options = [str(place / "inception.pth") if option == "WEIGHTS" else option for option in options]
    if "nothing.npz" in options:
        options += ["--inception", str(place / "inception.pth")]
    with pytest.raises(UserError) as caught:
        evaluate.main(generation(place, *options)[1:])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_written_is_told_before_the_work(place, tmp_path):
    argv = reconstruction(place, "--tokenizer", "nothing")[1:]  # would be the next mistake
    for option, path, words in (("--json", tmp_path, "it is a folder"), ("--npz", tmp_path / "f" / "x.npz", "written")):
        (tmp_path / "f").write_text("a file, where a folder should be")
        with pytest.raises(UserError, match=f"{option} .*{words}") as caught:
            evaluate.main([*argv, option, str(path)])
        assert "\n" not in str(caught.value)


def test_classes_that_the_classifier_does_not_know(place, tmp_path):
    labels = np.array([0, 1, CLASSES])
    np.savez(tmp_path / "x.npz", np.zeros((3, 16, 16, 3), np.uint8), labels)
    with pytest.raises(UserError, match=rf"x\.npz: class {CLASSES} is none of the {CLASSES} of .*train"):
        evaluate.main(
            generation(place, "--samples", str(tmp_path / "x.npz"), "--classifier", f"{place}/train-*.tar")[1:]
        )


def test_classes_of_a_validation_folder_are_matched_by_name(tmp_path):
    """One that lacks the first class would be numbered otherwise by itself."""
    colours = {"apple": (250, 20, 20), "berry": (20, 20, 250), "cress": (20, 250, 20)}
    for split, names in {"train": [*colours], "val": ["berry", "cress"], "other": ["berry", "plum"]}.items():
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(12):
                image = Image.new("RGB", (16, 16), tuple(v + number for v in colours.get(name, (9, 9, 9))))
                image.save(tmp_path / split / name / f"{number}.png")
    labels = np.arange(12) % 3
    images = np.stack([np.full((16, 16, 3), [*colours.values()][label], np.uint8) for label in labels])
    np.savez(tmp_path / "s.npz", images, labels)
    argv = ["generation", "--samples", str(tmp_path / "s.npz"), "--classifier", str(tmp_path / "train")]
    argv += ["--classifier-size", "16", "--classifier-steps", "40", "--device", "cpu", "--classifier-validation"]
    evaluate.main([*argv, str(tmp_path / "val"), "--json", str(tmp_path / "g.json")])
    found = json.loads((tmp_path / "g.json").read_text())["metrics"]["classifier"]
    assert found["validation_accuracy"] == found["generated_accuracy"] == 1.0
    with pytest.raises(UserError, match=r"--classifier-validation: classes are matched by name with .* 'plum'"):
        evaluate.main([*argv, str(tmp_path / "other")])


def test_a_mistake_in_earnest(place):
    done = run_script(*generation(place))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "error: nothing to compare with" in done.stderr


# --- The classifier ---


@pytest.fixture(scope="module")
def emoji():
    """Real images of the three largest classes."""
    from ibq.data.images import ImageDataset

    parts = []
    for split in ("train", "val"):
        index = open_images(f"tests/data/emoji64/{split}-*.tar")
        images, labels, _ = ImageDataset(index, 32).batch(range(len(index)))
        kept = [int(label) for label in torch.bincount(labels).topk(3).indices] if not parts else kept  # noqa: F821
        chosen = torch.isin(labels, torch.tensor(kept))
        renamed = torch.tensor([kept.index(int(label)) for label in labels[chosen]])
        parts.append(LabelledImages(images=images[chosen], labels=renamed))
    return parts


def test_classifier_tells_real_classes_apart_and_noise_not(emoji):
    train, validation = emoji
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, validation.images.shape, generator=generator, dtype=torch.uint8)
    config = ClassifierConfig(steps=60)
    found = evaluate_with_classifier(
        train, validation, LabelledImages(images=noise, labels=validation.labels), 3, config
    )
    assert found["chance"] == pytest.approx(1 / 3)
    assert found["validation_balanced_accuracy"] > 0.5 > found["generated_balanced_accuracy"]
    assert found["generated_nearest_pixel"] > found["validation_nearest_pixel"]
    assert found["generated_frechet"] > 3 * found["validation_frechet"] > 0


def test_copies_have_no_distance_to_the_nearest_training_image(emoji):
    train, validation = emoji
    copies = LabelledImages(images=train.images[:20], labels=train.labels[:20])
    found = evaluate_with_classifier(train, validation, copies, 3, ClassifierConfig(steps=2))
    assert found["generated_nearest_pixel"] < 1e-6 < found["validation_nearest_pixel"]
    same = evaluate_with_classifier(train, validation, train, 3, ClassifierConfig(steps=2))
    assert abs(same["generated_frechet"]) < 1e-6 < same["validation_frechet"]
    model = train_classifier(train.images, train.labels, 3, ClassifierConfig(steps=2))
    features = [classify(model, part.images)[1].double().numpy() for part in (train, validation)]
    (m1, c1), (m2, c2) = ((rows.mean(0), np.cov(rows, rowvar=False)) for rows in features)
    root = np.sqrt(np.linalg.eigvals(c1 @ c2).real.clip(0)).sum()  # the trace of (C1 C2)^(1/2)
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * root
    assert same["validation_frechet"] == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_the_same_seed_gives_the_same_classifier(emoji):
    train, _ = emoji
    one, two, other = (
        train_classifier(train.images, train.labels, 3, ClassifierConfig(steps=3, seed=seed)) for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)


def test_classes_that_cannot_be_judged(emoji, place):
    train, validation = emoji
    with pytest.raises(UserError, match="a class of the generated images is none of the 2"):
        two = [LabelledImages(images=p.images, labels=p.labels.clamp_max(1)) for p in (train, validation)]
        evaluate_with_classifier(*two, validation, 2, ClassifierConfig(steps=1))
    with pytest.raises(UserError, match="at least 2 classes, found 1"):
        train_classifier(train.images, torch.zeros_like(train.labels), 1)
    images = NpzImages(place / "samples/samples.npz")
    assert images.labels().bincount().tolist() == [12 // CLASSES] * CLASSES
