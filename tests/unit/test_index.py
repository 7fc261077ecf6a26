"""What a shard's index makes of names, links, repeated keys, several archives and what is no plain tar file."""

import bz2
import gzip
import io
import lzma
import subprocess
import tarfile

import pytest
import webdataset

from ibq.config import UserError
from ibq.data.index import NO_LABEL, index_shard

PICTURE = b"any bytes"
CUT = "no picture: a key ends at the first dot"


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def link(tar: tarfile.TarFile, name: str, target: str, kind: bytes = tarfile.LNKTYPE) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    tar.addfile(member)


def shard(path, *members):
    """A tar file of (name, bytes), or (name, target, kind) of links."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            (add if len(member) == 2 else link)(tar, *member)
    return path


def found(path) -> list[tuple[str, bytes, int, str]]:
    """(key, bytes of the picture, label, problem) of each sample."""
    index, content = index_shard(path, checksums=True), path.read_bytes()
    pieces = [content[at : at + size] for at, size in zip(index.offsets, index.sizes, strict=True)]
    problems = [index.problems.get(number, "") for number in range(len(index.keys))]
    return list(zip(index.keys, pieces, index.labels, problems, strict=True))


def test_a_key_that_comes_again_is_another_sample(tmp_path):
    """As webdataset reads it."""
    members = [
        (name, data) for label in (b"0", b"1", b"2") for name, data in (("a.png", b"p" + label), ("a.cls", label))
    ]
    members = [
        *members[:2],
        ("x.png", b"x"),
        ("x.cls", b"7"),
        *members[2:4],
        ("y.png", b"y"),
        ("y.cls", b"8"),
        *members[4:],
    ]
    path = shard(tmp_path / "s.tar", *members)
    theirs = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    wanted = [(sample["__key__"], sample["png"], int(sample["cls"])) for sample in theirs]
    assert [(key, data, label) for key, data, label, problem in found(path) if not problem] == wanted
    assert [key for key, *_ in wanted] == ["a", "x", "a", "y", "a"]


def test_other_files_stand_between_keys_too(tmp_path):
    """As in webdataset, for which a file of any kind is of a sample."""
    pair = ("a.png", b"p"), ("a.cls", b"1")
    path = shard(tmp_path / "s.tar", *pair, ("x.txt", b""), *pair)
    theirs = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    assert [sample["__key__"] for sample in theirs if "png" in sample] == ["a", "a"]
    assert found(path) == [("a", b"p", 1, "")] * 2
    assert len(found(shard(tmp_path / "t.tar", *pair, ("a.txt", b""), ("._x.txt", b""), *pair))) == 2
    assert all(row[3].startswith("several members") for row in found(tmp_path / "t.tar"))


def test_labels_far_from_their_pictures(tmp_path):
    """Where a key names one picture and one label, they belong together wherever they are."""
    path = shard(tmp_path / "s.tar", ("a.png", b"A"), ("b.png", b"B"), ("b.cls", b"4"), ("a.cls", b"3"))
    assert found(path) == [("a", b"A", 3, ""), ("b", b"B", 4, "")]


@pytest.mark.parametrize("second", ["a.jpg", "a.png"])
def test_several_of_one_key_side_by_side(second, tmp_path):
    """webdataset refuses the one, and makes one sample of the other: nobody can tell what is meant."""
    path = shard(tmp_path / "s.tar", ("a.png", b"1"), (second, b"2"), ("a.cls", b"3"), ("b.png", b"B"), ("b.cls", b"4"))
    *bad, good = found(path)
    assert good == ("b", b"B", 4, "") and [key for key, *_ in bad] == ["a", "a"]
    assert all(f"several members of one key stand together (a.png, {second}, a.cls)" in problem for *_, problem in bad)


def test_links_are_followed_within_the_shard(tmp_path):
    path = shard(
        tmp_path / "s.tar",
        ("pool/one.png", b"picture"),
        ("pool/label", b"5"),
        ("a.png", "./pool/one.png", tarfile.LNKTYPE),
        ("a.cls", "pool/label", tarfile.LNKTYPE),
        ("deep/b.png", "../a.png", tarfile.SYMTYPE),
        ("deep/b.cls", "../pool/label", tarfile.SYMTYPE),
        ("c.png", "nowhere.png", tarfile.LNKTYPE),
        ("c.cls", b"1"),
        ("d.png", b"D"),
        ("d.cls", "nowhere", tarfile.LNKTYPE),
        ("e.png", "f.png", tarfile.SYMTYPE),
        ("f.png", "e.png", tarfile.SYMTYPE),
    )
    samples = {key: rest for key, *rest in found(path)}
    assert samples["a"] == [b"picture", 5, ""] and samples["deep/b"] == [b"picture", 5, ""]
    assert samples["c"][2] == "c.png is a link to nowhere.png, which the shard does not hold"
    assert samples["d"][2] == "the label: d.cls is a link to nowhere, which the shard does not hold"
    assert "is a link to" in samples["e"][2] and "is a link to" in samples["f"][2]
    assert samples["pool/one"][0] == b"picture" and len(samples) == 7
    index = index_shard(path, checksums=True)
    assert (
        len({index.crc32[number] for number, key in enumerate(index.keys) if key in ("a", "deep/b", "pool/one")}) == 1
    )


def test_a_link_names_the_nearest_member_before_it(tmp_path):
    """Archives that follow each other may use the same names; GNU tar links a file given twice to itself."""
    for n in "12":
        members = [("pool", n.encode()), (f"a{n}.png", "pool", tarfile.LNKTYPE), (f"b{n}.png", "pool", tarfile.SYMTYPE)]
        shard(tmp_path / f"{n}.tar", *members)
    both = tmp_path / "both.tar"
    both.write_bytes(b"".join((tmp_path / f"{n}.tar").read_bytes() for n in "12"))
    assert [row[:2] for row in found(both)] == [("a1", b"1"), ("b1", b"1"), ("a2", b"2"), ("b2", b"2")]
    again = shard(tmp_path / "again.tar", ("a.png", b"A"), ("b.png", b"B"), ("a.png", "a.png", tarfile.LNKTYPE))
    assert [row[:2] for row in found(again)] == [("a", b"A"), ("b", b"B"), ("a", b"A")]
    ahead = shard(tmp_path / "ahead.tar", ("a.png", "x", tarfile.SYMTYPE), ("x", b"1"), ("x", b"2"))
    assert found(ahead) == [("a", b"1", NO_LABEL, "")]


def test_gnu_tar_links_files_that_are_linked(tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURE)
    (tmp_path / "b.png").hardlink_to(tmp_path / "a.png")
    for name in "ab":
        (tmp_path / f"{name}.cls").write_text("3")
    subprocess.run(["tar", "cf", "s.tar", "a.png", "a.cls", "b.png", "b.cls"], cwd=tmp_path, check=True)
    assert found(tmp_path / "s.tar") == [(name, PICTURE, 3, "") for name in "ab"]


def test_a_sparse_member_is_named(tmp_path):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(2**20)
        file.seek(2**19)
        file.write(b"x" * 5000)
    (tmp_path / "a.cls").write_text("0")
    subprocess.run(["tar", "--sparse", "-cf", "s.tar", "a.png", "a.cls"], cwd=tmp_path, check=True)
    with tarfile.open(tmp_path / "s.tar") as tar:
        assert tar.getmember("a.png").issparse()
    ((key, _, _, problem),) = found(tmp_path / "s.tar")
    assert key == "a" and problem.startswith("a sparse file, which can't be read in place")


def test_archives_one_after_the_other_are_all_read(tmp_path):
    for name in "ab":
        shard(tmp_path / f"{name}.tar", (f"{name}.png", name.encode()), (f"{name}.cls", b"2"))
    both = tmp_path / "both.tar"
    both.write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes())
    assert found(both) == [("a", b"a", 2, ""), ("b", b"b", 2, "")]
    both.write_bytes((tmp_path / "a.tar").read_bytes() + b"#" * 700)
    first, last = found(both)
    assert first == ("a", b"a", 2, "") and last[0] == "(end)" and "what is no tar member follows" in last[3]


def test_names_of_webdatasets_own_are_passed_over(tmp_path):
    """As webdataset does: a folder or a member at the top whose name begins and ends with two underscores."""
    names = ("__meta__/x.png", "__info__", "a/__meta__/y.png", "__z.png")
    path = shard(tmp_path / "s.tar", *((name, PICTURE) for name in names))
    with open(path, "rb") as file:
        theirs = [sample["fname"] for sample in webdataset.tariterators.tar_file_iterator(file)]
    assert theirs == ["a/__meta__/y.png", "__z.png"]
    assert [f"{key}.png" for key, *_ in found(path)] == theirs


def test_names_with_dots_are_told(tmp_path):
    """A key ends at the first dot; a further field of a sample that has its picture is none of ours."""
    path = shard(
        tmp_path / "s.tar",
        *(("img_22.05.png", b"1"), ("img_22.06.png", b"2"), ("img_23.1.png", b"3"), ("img_23.cls", b"3")),
        *(("whole.png", b"4"), ("whole.seg.png", b"5"), ("whole.cls", b"6"), ("._whole.png", b"7")),
    )
    samples = found(path)
    assert [key for key, *_ in samples] == ["img_22", "img_22", "img_23", "whole"]
    assert all(problem.startswith(CUT) and "rename it" in problem for *_, problem in samples[:3])
    assert "img_22.05.png is field '05.png' of 'img_22'" in samples[0][3]
    assert samples[3] == ("whole", b"4", 6, "")


def test_every_picture_of_no_use_is_counted(tmp_path):
    members = [
        ("a.bmp", b"1"),
        ("b.TIF", b"2"),
        ("b.cls", b"0"),
        ("c..png", b"3"),
        ("whole.png", b"4"),
        ("whole.gif", b"5"),
    ]
    members += [("d.05.png", b"6"), ("d.06.png", b"7"), ("d.cls", b"0")]
    samples = found(shard(tmp_path / "s.tar", *members))
    assert [key for key, *_ in samples] == ["a", "b", "c", "whole", "d", "d"]
    problems = [problem for *_, problem in samples]
    assert problems[:2] == [f"{kind} files are not read, only JPEG, PNG and WebP" for kind in (".bmp", ".tif")]
    assert problems[3] == "" and all(problem.startswith(CUT) for problem in (problems[2], *problems[4:]))


def test_a_cut_in_a_further_picture_of_a_sample_is_told(tmp_path):
    path = shard(tmp_path / "s.tar", ("a.png", b"p"), ("a.cls", b"1"), ("a.tif", b"x" * 2000))
    with open(path, "r+b") as file:
        file.truncate(5 * 512 + 1000)
    first, last = found(path)
    assert first == ("a", b"p", 1, "") and last[0] == "(end)" and "cut off" in last[3]


def test_names_in_capitals(tmp_path):
    path = shard(tmp_path / "s.tar", ("0.PNG", b"p"), ("0.CLS", b"1"), ("1.JFIF", b"j"), ("1.cls", b"2"))
    assert found(path) == [("0", b"p", 1, ""), ("1", b"j", 2, "")]


@pytest.mark.parametrize(
    ("kind", "compress", "command"),
    [("gzip", gzip.compress, "gunzip"), ("bzip2", bz2.compress, "bunzip2"), ("xz", lzma.compress, "unxz")],
)
@pytest.mark.parametrize("name", ["s.tar", "s.tar.z"])
def test_compressed_shards_say_what_they_are(kind, compress, command, name, tmp_path):
    plain = shard(tmp_path / "plain.tar", ("a.png", b"p"), ("a.cls", b"1"))
    path = tmp_path / name
    path.write_bytes(compress(plain.read_bytes()))
    with pytest.raises(UserError, match=rf"compressed \({kind}\).*{command} < {name} > unpacked.tar"):
        index_shard(path, checksums=False)


def test_a_picture_without_a_label(tmp_path):
    assert found(shard(tmp_path / "s.tar", ("a.png", b"p"))) == [("a", b"p", NO_LABEL, "")]
    assert found(shard(tmp_path / "t.tar", ("a.cls", b"1")))[0][3] == "no picture"
