"""tools/encode_shards.py: codes of every view, the same whatever the ranks, workers and interruptions."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from support.processes import run_ranks, run_script
from support.training import CLASSES, picture, png, write_best, write_images, write_shard

import ibq
from ibq.config import exit_on_user_error
from ibq.data.codes import CodeDataset
from ibq.data.transforms import AugmentConfig, random_square, square, to_unit_range
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.quantizers import IBQConfig
from ibq.training.checkpoint import weights_hash

COUNT, ROWS, BATCH, SIZE = 40, 7, 3, 16


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def save_tokenizer(folder, seed=0, num_codes=32, change=lambda model: None):
    torch.manual_seed(seed)
    config = TokenizerConfig(
        resolution=SIZE,
        channels=32,
        channel_multipliers=(1, 1, 1),
        res_blocks=1,
        attention_resolutions=(),
        latent_channels=16,
        quantizer=IBQConfig(num_codes=num_codes, dim=4),
    )
    model = Tokenizer(config)
    with torch.no_grad():
        change(model)
    write_best(folder / "best", model)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tokenizer, another one, and 40 images in two shards."""
    folder = tmp_path_factory.mktemp("encode")
    save_tokenizer(folder / "tokenizer")
    save_tokenizer(folder / "other", seed=1)
    write_images(folder / "images", COUNT)
    return folder


def command(place, output, *more, tokenizer="tokenizer", images="images/train-*.tar"):
    options = {"--tokenizer": place / tokenizer, "--images": place / images, "--output": output, "--device": "cpu"}
    small = ["--workers", "0", "--batch-size", str(BATCH), "--rows-per-shard", str(ROWS)]
    return [str(word) for pair in options.items() for word in pair] + small + list(more)


@pytest.fixture
def encode(place, capsys):
    """Run the tool in this process, on one thread; its exit code and what it said."""
    import tools.encode_shards

    def run(output, *more, where=place, **settings):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with pytest.raises(SystemExit) as end:
                exit_on_user_error(lambda: tools.encode_shards.main(command(where, output, *more, **settings)))
        finally:
            torch.set_flush_denormal(False)
            torch.set_num_threads(threads)
        return end.value.code, capsys.readouterr().err

    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def untouched(folder):
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()}


def codes_of(tokenizer, pixels):
    """Codes [N, tokens] of pictures, in the batches that the tool makes of each shard."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = []
    for first in range(0, len(pixels), ROWS):
        shard = pixels[first : first + ROWS]
        for i in range(0, len(shard), BATCH):
            images = torch.from_numpy(np.stack(shard[i : i + BATCH])).permute(0, 3, 1, 2)
            found.append(tokenizer.encode(to_unit_range(images)).flatten(1).numpy())
    torch.set_num_threads(threads)
    return np.concatenate(found)


# --- What the codes are ---


@pytest.mark.parametrize("workers", ["0", "2"])
def test_codes_are_the_tokenizers(place, tmp_path, encode, workers):
    options = ["--views", "3", "--flip", "--max-zoom", "1.5", "--seed", "5", "--workers", workers]
    assert encode(tmp_path / "codes", *options)[0] == 0
    tokenizer = ibq.load_tokenizer(place / "tokenizer", device="cpu")
    codes = CodeDataset(tmp_path / "codes")
    assert len(codes) == 3 * COUNT
    assert codes.meta.rows == [7, 7, 7, 7, 7, 5] * 3 and codes.meta.views == 3
    assert codes.meta.num_codes == 32 and codes.meta.grid == (4, 4) and codes.meta.classes == ["0", "1", "2"]
    assert codes.meta.tokenizer == weights_hash(tokenizer.state_dict())
    assert codes.labels().tolist() == [i % CLASSES for i in range(COUNT)] * 3
    views = [[square(picture(i), SIZE) for i in range(COUNT)]]
    for view in (1, 2):
        augment = AugmentConfig(flip=True, max_zoom=1.5)
        rngs = [np.random.default_rng([5 + view, 0, i]) for i in range(COUNT)]
        views.append([random_square(picture(i), SIZE, augment, rngs[i]) for i in range(COUNT)])
    for view, pixels in enumerate(views):
        found, expected = codes.codes(slice(view * COUNT, (view + 1) * COUNT)), codes_of(tokenizer, pixels)
        assert np.array_equal(found, expected), view
    # The comparison would notice a wrong view or a wrong image.
    assert len({row.tobytes() for row in codes.codes()}) > 2.5 * COUNT


def test_ten_crop(place, tmp_path, encode):
    """Pictures of 40 x 32 pixels at twofold zoom: crops of 16 pixels, which nothing has to be resized for."""
    pictures = [np.asarray(picture(i, 40).crop((0, 0, 40, 32))) for i in range(COUNT // 4)]
    members = {}
    for i, pixels in enumerate(pictures):
        members |= {f"{i:04d}.png": png(Image.fromarray(pixels)), f"{i:04d}.cls": b"1"}
    write_shard(tmp_path / "wide.tar", members)
    options = ["--ten-crop", "--max-zoom", "2"]
    assert encode(tmp_path / "codes", *options, images=tmp_path / "wide.tar")[0] == 0
    codes, tokenizer = CodeDataset(tmp_path / "codes"), ibq.load_tokenizer(place / "tokenizer", device="cpu")
    assert codes.meta.views == 10 and len(codes) == 10 * len(pictures)
    corners = [(8, 12), (0, 0), (0, 24), (16, 0), (16, 24)]  # top and left
    crops = [[pixels[top : top + 16, left : left + 16] for pixels in pictures] for top, left in corners]
    crops += [[pixels[:, ::-1].copy() for pixels in view] for view in crops]
    found = codes.codes().reshape(10, len(pictures), -1)
    for view, pixels in enumerate(crops):
        assert np.array_equal(found[view], codes_of(tokenizer, pixels)), view
    assert len({view.tobytes() for view in found}) == 10


@pytest.mark.parametrize(("num_codes", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_the_last_code_fits_its_type(place, tmp_path, encode, num_codes, dtype):
    def two_codes_win(model):
        model.quantizer.codebook[-1] *= 1e4
        model.quantizer.codebook[-2] = -model.quantizer.codebook[-1]

    save_tokenizer(tmp_path / "large", num_codes=num_codes, change=two_codes_win)
    assert encode(tmp_path / "codes", tokenizer=tmp_path / "large")[0] == 0
    assert np.load(tmp_path / "codes" / "codes-00000.npy").dtype == dtype
    assert np.load(tmp_path / "codes" / "labels-00000.npy").dtype == np.uint32
    codes = CodeDataset(tmp_path / "codes").codes()
    assert codes.dtype == dtype and {num_codes - 2, num_codes - 1} <= set(np.unique(codes).tolist())
    tokenizer = ibq.load_tokenizer(tmp_path / "large", device="cpu")
    assert np.array_equal(codes, codes_of(tokenizer, [square(picture(i), SIZE) for i in range(COUNT)]))


def test_rows_over_shard_borders(tmp_path, encode):
    assert encode(tmp_path / "codes", "--views", "2")[0] == 0
    codes = CodeDataset(tmp_path / "codes")
    parts = [np.load(tmp_path / "codes" / f"codes-{number:05d}.npy") for number in range(12)]
    assert [len(part) for part in parts] == [7, 7, 7, 7, 7, 5] * 2
    whole = np.concatenate(parts)
    rows = [79, 6, 7, 40, 39, 0, 7, 34, 35]
    assert np.array_equal(codes.codes(rows), whole[rows])
    assert np.array_equal(codes.codes(slice(5, 50, 3)), whole[5:50:3])
    assert all(codes[row][0].flatten().tolist() == whole[row].tolist() for row in (6, 7, 39, 40, 79))


# --- Whatever the ranks and interruptions ---

TWO_VIEWS = ("--views", "2", "--flip")
SCRIPT = "tools/encode_shards.py"


def test_two_ranks_write_the_same_files(place, tmp_path, encode):
    assert encode(tmp_path / "alone", *TWO_VIEWS)[0] == 0
    result = run_ranks(2, SCRIPT, *command(place, tmp_path / "together", *TWO_VIEWS))
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")
    # Rank 0 has done its own six shards of the twelve, not all: 4 x 7 + 0 x 5 images ...
    assert "42/42" in result.stderr and "rank 0 of 2" in result.stderr, result.stderr
    before = untouched(tmp_path / "together")
    refused = run_ranks(2, SCRIPT, *command(place, tmp_path / "together", *TWO_VIEWS, "--seed", "1"))
    assert refused.returncode != 0 and refused.stderr.count("error: ") == 1, refused.stderr
    assert untouched(tmp_path / "together") == before


KILLER = """
import os, signal, sys
import numpy as np
calls, last, save = [0], int(sys.argv.pop(1)), np.save

def kill_in_the_middle(file, array, **settings):
    calls[0] += 1
    if calls[0] == last:
        file.write(b"half a file")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(file, array, **settings)

np.save = kill_in_the_middle
from tools.encode_shards import main
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on(place, tmp_path, encode):
    assert encode(tmp_path / "undisturbed", *TWO_VIEWS)[0] == 0
    folder = tmp_path / "codes"
    # Killed in the codes of the third shard, and again in its labels.
    for last, files, halves in ((5, 4, 1), (2, 5, 2)):
        result = run_script("-c", KILLER, str(last), *command(place, folder, *TWO_VIEWS))
        assert result.returncode == -9, result.stderr
        assert len(list(folder.glob("[cl]*.npy"))) == files and len(list(folder.glob(".tmp-*"))) == halves
        assert not (folder / "meta.json").exists()
    before = untouched(folder)
    assert encode(folder, *TWO_VIEWS)[0] == 0
    after = untouched(folder)
    assert contents(folder) == contents(tmp_path / "undisturbed")
    whole = ["plan.json", *(f"{kind}-{number:05d}.npy" for kind in ("codes", "labels") for number in (0, 1))]
    assert {name: after[name] for name in whole} == {name: before[name] for name in whole}
    assert after["codes-00002.npy"][:2] != before["codes-00002.npy"][:2]  # its labels were not there


def test_a_run_that_was_killed_in_its_description_goes_on(tmp_path, encode):
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / ".tmp-7-plan.json").write_text('{"format"')
    assert encode(tmp_path / "codes")[0] == 0
    assert encode(tmp_path / "expected")[0] == 0
    assert contents(tmp_path / "codes") == contents(tmp_path / "expected")


def test_a_finished_folder_stays_as_it_is(tmp_path, encode):
    assert encode(tmp_path / "codes")[0] == 0
    before = untouched(tmp_path / "codes")
    code, said = encode(tmp_path / "codes", "--max-bad-fraction", "0.5")
    assert code == 0 and "finished" in said
    assert untouched(tmp_path / "codes") == before


def test_a_lost_shard_is_written_again(tmp_path, encode):
    folder = tmp_path / "codes"
    assert encode(folder)[0] == 0
    expected, before = contents(folder), untouched(folder)
    (folder / "codes-00003.npy").unlink()
    assert encode(folder)[0] == 0
    assert contents(folder) == expected
    assert untouched(folder)["codes-00002.npy"] == before["codes-00002.npy"]


OTHERS = {
    "tokenizer": ({"tokenizer": "other"}, []),
    "images": ({"images": "images/*.tar"}, []),
    "seed": ({}, ["--seed", "1"]),
    "views": ({}, ["--views", "3"]),
    "flip": ({}, []),
    "max_zoom": ({}, ["--max-zoom", "1.2"]),
    "rows_per_shard": ({}, ["--rows-per-shard", "8"]),
    "precision": ({}, ["--precision", "bf16"]),
    "ten_crop": ({}, ["--ten-crop"]),
}


@pytest.fixture(scope="module")
def finished(place):
    return place / "finished"


@pytest.mark.parametrize("name", OTHERS)
def test_other_codes_in_the_same_folder_are_refused(finished, encode, name):
    if not finished.exists():
        assert encode(finished, *TWO_VIEWS)[0] == 0
    before = untouched(finished)
    settings, options = OTHERS[name]
    base = [] if name == "ten_crop" else ["--views", "2"] if name == "flip" else TWO_VIEWS
    code, said = encode(finished, *base, *options, **settings)
    assert code == 2
    assert said.count("\n") == 1 and said.startswith("error: ") and "--fresh" in said and f"{name}: " in said
    assert untouched(finished) == before


def test_another_number_of_classes_is_refused(tmp_path, encode):
    """Labels that were written before could be out of range."""
    write_images(tmp_path / "images", COUNT)
    options = {"images": tmp_path / "images" / "train-*.tar"}
    assert encode(tmp_path / "codes", **options)[0] == 0
    before = untouched(tmp_path / "codes")
    (tmp_path / "images" / "classes.json").write_text('["a", "b", "c", "d"]')
    code, said = encode(tmp_path / "codes", **options)
    assert code == 2 and "classes: 3, now 4" in said
    assert untouched(tmp_path / "codes") == before


def test_fresh_removes_its_own_files_alone(tmp_path, encode):
    folder = tmp_path / "codes"
    assert encode(tmp_path / "expected", "--seed", "1")[0] == 0
    assert encode(folder, *TWO_VIEWS)[0] == 0
    others = {"notes.txt": b"mine", "codes-mine.npy": b"mine", "labels.npy": b"mine", ".tmp-notes": b"mine"}
    for name, data in others.items():
        (folder / name).write_bytes(data)
    (folder / ".tmp-7-codes-00001.npy").write_bytes(b"half a file")
    assert encode(folder, "--seed", "1", "--fresh")[0] == 0
    assert contents(folder) == contents(tmp_path / "expected") | others


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plan.json", '{"data": {"train": "images"}}'),
        ("plan.json", "[1, 2]"),
        ("plan.json", "{"),
        ("meta.json", "{}"),
        ("labels-00000.npy", "labels"),
    ],
)
def test_a_folder_with_other_things_is_refused(tmp_path, encode, name, text):
    folder = tmp_path / "codes"
    folder.mkdir()
    (folder / name).write_text(text)
    before = untouched(folder)
    code, said = encode(folder)
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and "--fresh" in said
    assert untouched(folder) == before


# --- Images that can't be used ---


def write_damaged(path, count, damaged):
    members = {}
    for i in range(count):
        members[f"{i:04d}.png"] = png(picture(i))[: 90 if i in damaged else None]
        members[f"{i:04d}.cls"] = str(i % CLASSES).encode()
    write_shard(path, members)


def test_damaged_images_are_left_out_of_every_view(place, tmp_path, encode):
    write_damaged(tmp_path / "shard.tar", 30, {3, 9, *range(14, 21)})  # the third chunk is lost as a whole
    options = ["--views", "2", "--max-bad-fraction", "0.4"]
    code, said = encode(tmp_path / "codes", *options, images=tmp_path / "shard.tar")
    assert code == 0
    named = [line for line in said.splitlines() if "left out: image" in line]
    assert len(named) == 9 and "'0003'" in named[0] and "shard.tar" in named[0] and "'0009'" in named[1]
    codes = CodeDataset(tmp_path / "codes")
    assert codes.meta.rows == [6, 6, 0, 7, 2] * 2
    assert codes.meta.made_by["image_count"] == 30 and codes.meta.made_by["images_left_out"] == 9
    kept = [i for i in range(30) if i not in (3, 9) and not 14 <= i < 21]
    assert codes.labels().tolist() == [i % CLASSES for i in kept] * 2
    tokenizer = ibq.load_tokenizer(place / "tokenizer", device="cpu")
    for row, i in enumerate(kept):
        images = torch.from_numpy(np.stack([square(picture(i), SIZE)])).permute(0, 3, 1, 2)
        expected = tokenizer.encode(to_unit_range(images)).flatten()
        # A batch without a damaged image has another shape, where near ties may round otherwise.
        assert (codes[row][0].flatten() == expected).float().mean() >= 0.9, i


def test_too_many_damaged_images(tmp_path, encode):
    write_damaged(tmp_path / "shard.tar", 30, {3, 25})
    code, said = encode(tmp_path / "codes", images=tmp_path / "shard.tar")
    assert code == 2
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert "2 of 30" in line and "'0025'" in line and "shard.tar" in line and "--max-bad-fraction" in line
    assert not (tmp_path / "codes" / "meta.json").exists()
    before = untouched(tmp_path / "codes")
    code, said = encode(tmp_path / "codes", "--max-bad-fraction", "0.07", images=tmp_path / "shard.tar")
    assert code == 0
    assert CodeDataset(tmp_path / "codes").meta.rows == [6, 7, 7, 6, 2]
    after = untouched(tmp_path / "codes")
    assert len(before) > 1 and {name: after[name] for name in before} == before
    # Nothing is encoded the second time: the count comes from the shards.
    (tmp_path / "codes" / "meta.json").unlink()
    code, said = encode(tmp_path / "codes", images=tmp_path / "shard.tar")
    assert code == 2 and "2 of 30" in said


def test_many_damaged_images_are_not_all_named(tmp_path, encode):
    write_damaged(tmp_path / "shard.tar", 30, range(25))
    code, said = encode(tmp_path / "codes", "--max-bad-fraction", "1", images=tmp_path / "shard.tar")
    assert code == 0 and said.count("left out: image") == 20 and "'0019'" in said and "'0020'" not in said
    write_damaged(tmp_path / "all.tar", 8, range(8))
    code, said = encode(tmp_path / "none", "--max-bad-fraction", "1", images=tmp_path / "all.tar")
    assert code == 2 and "8 of 8" in said


def test_an_index_that_tells_of_too_many_problems(tmp_path, encode):
    write_shard(tmp_path / "shard.tar", {"a.png": png(picture(0)), "a.cls": b"0", "b.png": png(picture(1))})
    code, said = encode(tmp_path / "codes", images=tmp_path / "shard.tar")
    assert code == 2 and said.count("\n") == 1
    assert "1 of 2" in said and "'b'" in said and "b.cls" in said and "--max-bad-fraction" in said
    assert not (tmp_path / "codes").exists()
    assert encode(tmp_path / "codes", "--max-bad-fraction", "0.5", images=tmp_path / "shard.tar")[0] == 0
    assert len(CodeDataset(tmp_path / "codes")) == 1


def test_views_that_saw_other_images(tmp_path, encode):
    """A picture that can be read for the first view and not for the second, and later again."""
    shard, folder = tmp_path / "shard.tar", tmp_path / "codes"
    write_damaged(shard, 30, ())
    options = {"images": shard}
    assert encode(folder, *TWO_VIEWS, **options)[0] == 0
    expected, whole, before = contents(folder), shard.read_bytes(), untouched(folder)
    at = whole.index(png(picture(8)))
    damaged = whole[: at + 40] + bytes(60) + whole[at + 100 :]
    shard.write_bytes(damaged)
    for name in ("codes-00006.npy", "labels-00006.npy"):  # second view, second chunk: images 7 to 13
        (folder / name).unlink()
    code, said = encode(folder, *TWO_VIEWS, **options)
    assert code == 2 and "'0008'" not in said  # it was there in the first view
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert "same command" in line and "--fresh" in line
    left = untouched(folder)
    assert not {f"{kind}-0000{i}.npy" for kind in ("codes", "labels") for i in (1, 6)} & left.keys()
    assert "meta.json" not in left and left.items() <= before.items() and len(left) == 2 * 8 + 1
    shard.write_bytes(whole)
    assert encode(folder, *TWO_VIEWS, **options)[0] == 0
    assert contents(folder) == expected


# --- Options ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--views", "0"], ["--views", "at least 1"]),
        (["--rows-per-shard", "0"], ["--rows-per-shard", "at least 1"]),
        (["--seed", "-1"], ["--seed", "at least 0"]),
        (["--max-zoom", "0.5"], ["--max-zoom", "at least 1"]),
        (["--max-zoom", "nan"], ["--max-zoom", "at least 1"]),
        (["--max-bad-fraction", "1.5"], ["--max-bad-fraction", "[0, 1]"]),
        (["--batch-size", "0"], ["--batch-size", "at least 1"]),
        (["--ten-crop", "--views", "2"], ["--ten-crop", "--views"]),
        (["--ten-crop", "--flip"], ["--ten-crop", "--flip"]),
    ],
)
def test_impossible_options(tmp_path, encode, options, words):
    code, said = encode(tmp_path / "codes", *options)
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert all(word in said for word in words)
    assert not (tmp_path / "codes").exists()


def test_output_that_cannot_be_written(tmp_path, encode):
    (tmp_path / "file").write_bytes(b"mine")
    code, said = encode(tmp_path / "file")
    assert code == 2 and said.count("\n") == 1 and "give a folder" in said
    code, said = encode(tmp_path / "file" / "below")
    assert code == 2 and said.count("\n") == 1 and "--output" in said
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_the_description_says_what_was_done(tmp_path, encode):
    assert encode(tmp_path / "codes", *TWO_VIEWS, "--seed", "3", "--max-zoom", "1.25")[0] == 0
    description = json.loads((tmp_path / "codes" / "plan.json").read_text())
    meta = CodeDataset(tmp_path / "codes").meta
    assert description.items() <= meta.made_by.items() and meta.made_by["images_left_out"] == 0
    assert meta.made_by["ibq"] == ibq.__version__ and meta.made_by["torch"] == str(torch.__version__)
    wanted = {"views": 2, "flip": True, "max_zoom": 1.25, "ten_crop": False, "seed": 3, "rows_per_shard": ROWS}
    wanted |= {"precision": "fp32", "resolution": SIZE, "image_count": COUNT, "tokenizer": meta.tokenizer}
    assert wanted.items() <= description.items()
    assert not [name for name in os.listdir(tmp_path / "codes") if name.startswith(".tmp-")]
