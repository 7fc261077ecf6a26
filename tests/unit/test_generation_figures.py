"""FID and its relatives: the statistics against the golden data, the features against torch-fidelity's own."""

import io
import math
import zipfile

import numpy as np
import pytest
import torch
from support.golden import assert_close, golden_json, golden_tensors

from ibq.config import UserError
from ibq.evaluation import features as inception
from ibq.evaluation.distances import (
    Gaussian,
    Moments,
    frechet_distance,
    inception_score,
    nearest,
    precision_recall,
    radii,
)
from ibq.evaluation.generation import evaluate_generation, extract
from ibq.evaluation.image_sets import PixelHash, open_set

TENSORS, GOLDEN = golden_tensors("evaluator"), golden_json("evaluator")["values"]
POOL = {name: TENSORS[f"pool/{name}"] for name in ("ref", "sample")}


@pytest.fixture(autouse=True)
def one_thread():
    """Decompositions of 2,048 dimensions by several threads on a busy machine wait for each other for minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gaussian_of(features) -> Gaussian:
    moments = Moments(features.shape[1])
    for rows in torch.as_tensor(features).split(100):
        moments.add(rows)
    return moments.gaussian()


def fid(kind: str, count: int | None = None) -> float:
    return frechet_distance(*(gaussian_of(TENSORS[f"{kind}/{name}"][:count]) for name in ("ref", "sample")))


# --- Statistics ---


def test_golden_mean_and_covariance():
    for name in ("ref", "sample"):
        found = gaussian_of(POOL[name])
        assert_close(torch.tensor(found.mean), TENSORS[f"pool/{name}_mu"].double(), 1e-6, f"{name} mean")
        assert_close(torch.tensor(found.covariance), TENSORS[f"pool/{name}_sigma"], 1e-6, f"{name} covariance")


@pytest.mark.parametrize(("kind", "value"), [("pool", "fid"), ("spatial", "sfid")])
def test_golden_frechet_distance(kind, value):
    assert fid(kind) == pytest.approx(GOLDEN[f"{value}_float64_statistics"], rel=1e-9)
    assert fid(kind) == pytest.approx(GOLDEN[value], rel=1e-6)


def test_golden_frechet_distance_of_fewer_samples_than_dimensions():
    singular = GOLDEN["fid_singular"]
    assert fid("pool", singular["n"]) == pytest.approx(singular["value"], rel=1e-6)


def test_golden_frechet_distance_notices_a_covariance_divided_by_n():
    biased = [gaussian_of(POOL[name]) for name in ("ref", "sample")]
    count = len(POOL["ref"])
    biased = [Gaussian(mean=g.mean, covariance=g.covariance * (count - 1) / count) for g in biased]
    assert frechet_distance(*biased) != pytest.approx(GOLDEN["fid"], rel=1e-4)


def test_frechet_distance_is_symmetric_and_zero_to_itself():
    first, second = (gaussian_of(POOL[name]) for name in ("ref", "sample"))
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-12)
    assert abs(frechet_distance(first, first)) < 1e-10


def test_frechet_distance_of_diagonal_gaussians_by_hand():
    first = Gaussian(mean=np.array([1.0, 0.0]), covariance=np.diag([4.0, 0.0]))
    second = Gaussian(mean=np.array([0.0, 0.0]), covariance=np.diag([1.0, 9.0]))
    assert frechet_distance(first, second) == pytest.approx(1 + (2 - 1) ** 2 + 9)


@pytest.mark.parametrize("wrong", [np.zeros(3), np.array([np.nan, 0.0])])
def test_frechet_distance_of_what_cannot_be_compared(wrong):
    good = Gaussian(mean=np.zeros(2), covariance=np.eye(2))
    with pytest.raises(ValueError, match=r"^mean: "):
        frechet_distance(good, Gaussian(mean=wrong, covariance=np.eye(2)))


@pytest.mark.parametrize("parts", [1000, 1, 7, 150])
def test_moments_are_the_same_in_any_parts(parts):
    rows = POOL["ref"]
    whole, running = gaussian_of(rows), Moments(rows.shape[1])
    for part in rows.split(parts):
        running.add(part)
    assert_close(torch.tensor(running.gaussian().covariance), torch.tensor(whole.covariance), 1e-14, "covariance")
    first, second = Moments(rows.shape[1]), Moments(rows.shape[1])
    first.add(rows[:100])
    second.add(rows[100:])
    first.merge(second)
    assert_close(torch.tensor(first.gaussian().covariance), torch.tensor(whole.covariance), 1e-14, "merged")


@pytest.mark.parametrize("split", GOLDEN["inception_score"])
def test_golden_inception_score(split):
    found = inception_score(TENSORS["softmax/sample"], int(split.removeprefix("split_")))
    assert found == pytest.approx(GOLDEN["inception_score"][split], rel=1e-6)


def test_inception_score_by_hand():
    assert inception_score(torch.eye(4)) == pytest.approx(4)
    assert inception_score(torch.full((3, 4), 0.25)) == pytest.approx(1)


def test_golden_precision_and_recall_exact():
    found, expected = precision_recall(POOL["ref"], POOL["sample"]), GOLDEN["precision_recall_exact_float64"]
    assert (found.precision, found.recall) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-12)
    swapped = precision_recall(POOL["sample"], POOL["ref"])
    assert (swapped.recall, swapped.precision) == (found.precision, found.recall)


def test_golden_precision_and_recall_with_adms_rounding():
    found, expected = precision_recall(POOL["ref"], POOL["sample"], distances="adm"), GOLDEN["precision_recall"]
    assert (found.precision, found.recall) == pytest.approx((expected["precision"], expected["recall"]), abs=0.01)
    for name in ("ref", "sample"):
        golden = TENSORS[f"pr/radii_{name}"].flatten().double()
        largest = float(POOL[name].square().sum(dim=1).max())
        unit = 2.0 ** (math.floor(math.log2(largest)) - 10)  # of float16, for the squared norms that are summed
        assert_close(radii(POOL[name], distances="adm"), golden, 2 * unit, f"radii of {name}")
    large = precision_recall(100 * POOL["ref"], 100 * POOL["sample"], distances="adm")  # overflows float16
    expected = GOLDEN["precision_recall_features_x100"]
    assert (large.precision, large.recall) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-12)


def test_golden_manifolds():
    found = precision_recall(100 * POOL["ref"], 100 * POOL["sample"], distances="adm")
    for mine, name in ((found.sample_inside, "sample_in_ref"), (found.reference_inside, "ref_in_sample")):
        golden = TENSORS[f"pr/{name}_manifold"].flatten().bool()
        assert (mine != golden).double().mean() <= 0.01, name


def test_precision_and_recall_in_pieces(monkeypatch):
    whole = precision_recall(POOL["ref"], POOL["sample"])
    monkeypatch.setattr("ibq.evaluation.distances.TILE", {"exact": 41, "adm": 41})
    pieces = precision_recall(POOL["ref"], POOL["sample"])
    assert torch.equal(whole.sample_inside, pieces.sample_inside)
    assert torch.equal(whole.reference_inside, pieces.reference_inside)


def test_precision_and_recall_of_too_few():
    with pytest.raises(ValueError, match=r"^reference: precision and recall need more than 3 images, got 3"):
        precision_recall(POOL["ref"][:3], POOL["sample"])


def test_nearest_by_hand():
    distance, number = nearest(torch.tensor([[0.0, 0.0], [5.0, 5.0]]), torch.tensor([[3.0, 4.0], [5.0, 5.0]]))
    assert distance.tolist() == [5.0, 0.0] and number.tolist() == [0, 1]


# --- Features ---


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights, with BatchNorm statistics and biases that are not the initial ones, as a file."""
    torch.manual_seed(0)
    state = inception.Inception().state_dict()
    for name, value in state.items():
        if name.endswith("running_mean"):
            value.normal_(0, 0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif name.endswith("weight") and value.dim() > 1:  # keeps activations of one size through the layers
            value.normal_(0, (2 / value[0].numel()) ** 0.5)
        elif name.endswith("bias"):
            value.normal_(0, 0.1)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def network(weights):
    return inception.load_inception(str(weights))


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.integers(0, 256, (11, 3, 6, 5), dtype=np.uint8))
    return torch.nn.functional.interpolate(coarse.float(), size=(48, 40), mode="bicubic").clamp(0, 255).byte()


def test_features_are_those_of_torch_fidelity(network, weights, pictures):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights))
    theirs.eval()
    seen = {}
    pictures = pictures[:5]
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, out: seen.update(spatial=out))
    with torch.no_grad():
        pool, logits = theirs(pictures)
        mine = network(pictures)
    assert_close(mine.pool, pool, 1e-6 * float(pool.abs().max()), "pool features")
    assert float(pool.std(dim=0).mean()) > 1e-3 * float(pool.abs().max()), "the pictures look all the same"
    spatial = seen["spatial"][:, :7].permute(0, 2, 3, 1).reshape(len(pictures), -1)
    assert_close(mine.spatial, spatial, 1e-6 * float(spatial.abs().max()), "spatial features")
    assert mine.spatial.shape[1] == inception.SPATIAL_DIM == 2023
    assert_close(network.probabilities(mine.pool), logits.double().softmax(dim=1), 1e-5, "probabilities")


def test_features_do_not_depend_on_their_company(network, pictures):
    together = network.block_features(pictures[:8])
    alone = network.block_features(pictures[3:4])
    assert torch.equal(together.pool[3:4], alone.pool) and torch.equal(together.spatial[3:4], alone.spatial)


def test_a_file_is_held_to_the_hash_in_its_name(weights, tmp_path):
    wrong = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    wrong.write_bytes(weights.read_bytes())
    with pytest.raises(UserError, match=r"its SHA-256 begins .*: damaged"):
        inception.load_inception(str(wrong))


def test_weights_that_are_none(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    for name in ("evil.pth", "other.pth", "broken.pth"):
        with pytest.raises(UserError, match=f"{name}: not .*Inception") as caught:
            inception.load_inception(str(tmp_path / name))
        assert "weights_only" not in str(caught.value) and "option" not in str(caught.value), (
            "how to run the code in it"
        )
    assert not (tmp_path / "written").exists()
    monkeypatch.setenv(inception.ENVIRONMENT, str(tmp_path / "missing.pth"))
    with pytest.raises(UserError, match=r"no Inception weights at .*missing.pth.*; give a copy of"):
        inception.load_inception()


def test_weights_that_cannot_be_downloaded(tmp_path, monkeypatch):
    monkeypatch.delenv(inception.ENVIRONMENT, raising=False)
    monkeypatch.setattr(inception, "URL", "http://127.0.0.1:9/weights.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"could not be downloaded .*--inception FILE") as caught:
        inception.load_inception()
    assert "\n" not in str(caught.value)


# --- Sets of images ---


def save(path, images, **more):
    np.savez(path, images.permute(0, 2, 3, 1).numpy(), **more)
    return open_set(str(path))


def test_the_same_images_as_file_and_folder(network, pictures, tmp_path):
    from PIL import Image

    file = save(tmp_path / "x.npz", pictures)
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, image in enumerate(pictures.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    first = extract(network, file, batch_size=3)
    second = extract(network, open_set(str(folder)), batch_size=64)
    assert first.count == second.count == 11 and torch.equal(first.pool, second.pool)
    for one, other in ((first.spatial_gaussian, second.spatial_gaussian), (first.pool_gaussian, second.pool_gaussian)):
        assert np.abs(one.covariance - other.covariance).max() <= 1e-12 * np.abs(one.covariance).max()


def test_a_report_names_the_reference_of_every_distance(network, pictures, tmp_path):
    one, other = save(tmp_path / "one.npz", pictures[:8]), save(tmp_path / "other.npz", pictures[:8].flip(2))
    report = evaluate_generation(network, one, [other])
    name = f"other.npz@{other.sha256()[:8]}"
    assert list(report.references) == [name] and report.references[name]["images"] == 8
    assert report.metrics.keys() == {"inception_score", name}
    assert report.metrics[name].keys() == {"fid", "sfid", "precision", "recall"}
    assert report.metrics[name]["fid"] > 0 and report.metrics[name]["sfid"] > 0
    assert any("singular" in note for note in report.notes)


def test_stored_statistics_are_taken_as_they_are(network, pictures, tmp_path, monkeypatch):
    compared = []

    def distance(first, second):
        compared.append((first, second))
        return 1.0

    monkeypatch.setattr("ibq.evaluation.generation.frechet_distance", distance)
    pictures = pictures[:8]  # that the network sees at once
    own = extract(network, save(tmp_path / "images.npz", pictures))
    statistics = {"mu": own.pool_gaussian.mean.astype(np.float32), "sigma": 2 * own.pool_gaussian.covariance}
    np.savez(tmp_path / "stats.npz", **statistics)
    images = save(tmp_path / "samples.npz", pictures.flip(3))
    references = open_set(str(tmp_path / "stats.npz")), save(tmp_path / "mixed.npz", pictures, **statistics)
    report = evaluate_generation(network, images, references)
    stored, mixed = (value for value in report.metrics.values() if isinstance(value, dict))
    assert stored == {"fid": 1.0} and mixed.keys() == {"fid", "sfid", "precision", "recall"}
    assert any("no sFID" in note for note in report.notes) and any("holds no images" in note for note in report.notes)
    assert [facts["statistics"] for facts in report.references.values()] == ["stored in the file"] * 2
    for _, reference in compared[:2]:
        assert np.array_equal(reference.mean, statistics["mu"].astype(np.float64))
        assert np.array_equal(reference.covariance, statistics["sigma"])
    assert np.array_equal(compared[2][1].mean, own.spatial_gaussian.mean), "what the file lacks is computed"


BAD_FILES = {
    "floats": ({"arr_0": np.zeros((4, 8, 8, 3), np.float32)}, "arr_0 is float32"),
    "channels first": ({"arr_0": np.zeros((4, 3, 8, 8), np.uint8)}, "not uint8 [N, H, W, 3]"),
    "one image": ({"arr_0": np.zeros((8, 8, 3), np.uint8)}, "not uint8 [N, H, W, 3]"),
    "no images": ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "holds no images"),
    "objects": ({"arr_0": np.array([{}, 1], dtype=object)}, "pickled Python objects, which are never loaded"),
    "nothing": ({"x": np.zeros(3)}, "neither images (arr_0) nor statistics"),
    "short mean": ({"mu": np.zeros(5), "sigma": np.eye(5)}, "mu is float64 [5], not finite floats [2048]"),
    "half": ({"mu": np.zeros(2048)}, "one of mu and sigma without the other"),
    "not finite": ({"mu": np.full(2048, np.nan), "sigma": np.eye(2048)}, "not finite floats"),
    "labels": ({"arr_0": np.zeros((4, 8, 8, 3), np.uint8), "arr_1": np.zeros(3, int)}, "not a class number for each"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_of_another_form(name, tmp_path):
    arrays, words = BAD_FILES[name]
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError) as caught:
        images = open_set(str(path))
        images.statistics()
        images.labels()
    assert str(path) in str(caught.value) and words in str(caught.value) and "\n" not in str(caught.value)


def test_a_header_that_says_more_than_there_is(tmp_path):
    """Memory for as many images as it says is never asked for."""
    header = io.BytesIO()
    shape = (10**12, 256, 256, 3)
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + b"123")
    with pytest.raises(
        UserError, match=r"x\.npz: not a readable \.npz file \(arr_0 has [0-9,]+ bytes, its header says"
    ):
        open_set(str(tmp_path / "x.npz"))


def test_files_that_are_no_sets(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=r"x\.npy: neither an \.npz file nor a tar shard; write it again with"):
        open_set(str(tmp_path / "x.npy"))


@pytest.mark.parametrize("damage", ["cut", "flipped", "not a file", "missing", "a folder"])
def test_damaged_files(damage, pictures, tmp_path):
    path = tmp_path / "x.npz"
    save(path, pictures)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "not a file":
        path.write_bytes(b"hello")
    else:
        path.unlink()
    if damage == "a folder":
        path.mkdir()
    with pytest.raises(UserError, match=r"x\.npz") as caught:
        list(open_set(str(path)).blocks(4))
    assert "\n" not in str(caught.value)


def test_images_of_several_sizes_need_a_size(tmp_path):
    from PIL import Image

    for number, side in enumerate((16, 16, 24)):
        Image.new("RGB", (side, side), (number, 0, 0)).save(tmp_path / f"{number}.png")
    with pytest.raises(UserError, match=r"image '2\.png' has 24 x 24 pixels, the first one 16 x 16; --size N"):
        list(open_set(str(tmp_path)).blocks(8))
    (block,) = open_set(str(tmp_path), 8).blocks(8)
    assert block.shape == (3, 3, 8, 8)


def test_one_image_is_too_few(network, pictures, tmp_path):
    with pytest.raises(UserError, match="1 images are too few for statistics; give at least 2"):
        extract(network, save(tmp_path / "x.npz", pictures[:1]))


def test_pixel_hash_is_of_the_set(pictures):
    def digest(*parts):
        found = PixelHash()
        for part in parts:
            found.add(part)
        return found.hexdigest()

    assert digest(pictures) == digest(pictures[6:], pictures[:6])
    changed = pictures.clone()
    changed[5, 1, 7, 7] ^= 1
    assert digest(changed) != digest(pictures) != digest(pictures[1:])
