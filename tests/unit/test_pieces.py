"""Parts of parameters, files of them, and putting them together in another layout."""

import hashlib
import json
import random

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ibq.engine.base import ParameterState
from ibq.engine.pieces import Piece, Spans, block, overlaps, part, place, stretch, take, whole
from ibq.engine.state_files import MissingPartError, StateReader, index_file, rank_file, write_index, write_pieces
from ibq.tensor_file import StoredTensors, TensorFile, write_tensors

SHAPE = (12, 10)
FULL = torch.arange(120.0).view(SHAPE)


def rows(first: int, end: int) -> Piece:
    return stretch(SHAPE, first * 10, (end - first) * 10)


def packed(rank: int) -> Piece:
    """Two of each four rows, as packed projections are split over two ranks."""
    return Piece(SHAPE, tuple(Spans((4 * i + 2 * rank) * 10, 20) for i in range(3)))


LAYOUTS = {
    "whole": [whole(SHAPE)],
    "rows of 3 ranks": [rows(0, 4), rows(4, 8), rows(8, 12)],
    "more ranks than rows": [rows(i, i + 1) for i in range(12)] + [stretch(SHAPE, 120, 10)],
    "uneven stretches": [stretch(SHAPE, first, 37) for first in range(0, 120, 37)],
    "columns": [block(SHAPE, (0, 12), (0, 5)), block(SHAPE, (0, 12), (5, 10))],
    "columns, then rows": [block(SHAPE, r, c) for c in ((0, 5), (5, 10)) for r in ((0, 6), (6, 12))],
    "packed rows": [packed(0), packed(1)],
    "packed rows, then stretches": [part(packed(r), first, 25) for r in range(2) for first in (0, 25, 50)],
}


def test_block_and_interval_hold_what_they_say():
    assert torch.equal(take(FULL, block(SHAPE, (2, 5), (3, 7))), FULL[2:5, 3:7].flatten())
    assert torch.equal(take(FULL, block(SHAPE, (2, 5), (0, 10))), FULL[2:5].flatten())
    assert block(SHAPE, (2, 5), (0, 10)).spans == (Spans(20, 30),)
    assert torch.equal(take(FULL, stretch(SHAPE, 115, 10)), FULL.flatten()[115:])
    assert torch.equal(take(FULL, packed(1)), FULL[[2, 3, 6, 7, 10, 11]].flatten())
    assert take(FULL, block(SHAPE, (3, 3), (0, 4))).numel() == 0
    assert whole(SHAPE).is_whole and rows(0, 12).is_whole and not packed(0).is_whole


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_holds_every_element_once(layout):
    built = torch.full(SHAPE, -1.0)
    for piece in LAYOUTS[layout]:
        place(built, piece, take(FULL, piece))
    assert torch.equal(built, FULL)
    assert sum(piece.numel for piece in LAYOUTS[layout]) == FULL.numel()


def test_part_is_a_slice_of_the_held_elements():
    rng = random.Random(0)
    for piece in [piece for layout in LAYOUTS.values() for piece in layout]:
        held = take(FULL, piece)
        for _ in range(40):
            first, numel = rng.randrange(piece.numel + 2), rng.randrange(piece.numel + 5)
            assert torch.equal(take(FULL, part(piece, first, numel)), held[first : first + numel])


def write(folder, pieces: list[Piece], name="net", parts=("weight", "ema")) -> None:
    all_places = []
    for rank, piece in enumerate(pieces):
        if piece.numel:
            state = ParameterState(weight=take(FULL, piece), ema=-take(FULL, piece))
            path = folder / rank_file(name, rank)
            all_places.append(write_pieces(path, {"p": piece}, parts, iter([("p", state)]))[1])
    write_index(folder / index_file(name), all_places, parts, {"kind": "Net", "config": None})


@pytest.mark.parametrize("wanted", LAYOUTS)
@pytest.mark.parametrize("stored", LAYOUTS)
def test_any_layout_reads_any_other(tmp_path, stored, wanted):
    write(tmp_path, LAYOUTS[stored])
    reader = StateReader(tmp_path, "net")
    assert reader.shapes == {"p": SHAPE} and reader.parts == ("weight", "ema")
    for piece in LAYOUTS[wanted]:
        state = reader("p", piece)
        assert torch.equal(state.weight, take(FULL, piece)) and torch.equal(state.ema, -state.weight)
        assert state.moment1 is None
    assert torch.equal(reader.full("weight", "p"), FULL)


def test_elements_that_are_in_no_file_are_noticed(tmp_path):
    write(tmp_path, LAYOUTS["rows of 3 ranks"][:2])
    reader = StateReader(tmp_path, "net")
    assert torch.equal(reader.read("weight", "p", rows(2, 8)), FULL[2:8].flatten())
    with pytest.raises(MissingPartError, match="80 of 120"):
        reader.full("weight", "p")
    with pytest.raises(MissingPartError, match="p with shape"):
        reader.read("weight", "p", whole((10, 12)))


def test_of_a_frozen_parameter_there_is_the_weight_alone(tmp_path):
    """It is the average too, and moments are zero."""
    parts, piece, path = ("weight", "moment1", "moment2", "ema"), whole(SHAPE), tmp_path / rank_file("net", 0)
    states = iter([("p", ParameterState(weight=FULL))])
    files, places = write_pieces(path, {"p": piece}, parts, states, {"p"})
    write_index(tmp_path / index_file("net"), [places], parts, {"kind": "Net", "config": None})
    reader = StateReader(tmp_path, "net")
    state = reader("p", rows(2, 8))
    assert reader.frozen == {"p"} and files[path.name]["bytes"] < 8 * FULL.numel()
    assert torch.equal(state.weight, FULL[2:8].flatten()) and torch.equal(state.ema, state.weight)
    assert not state.moment1.any() and state.moment2.shape == state.weight.shape
    assert torch.equal(reader.full("ema", "p"), FULL)


def test_overlaps_of_runs_with_gaps():
    wanted, stored = (Spans(0, 2, 3, 10),), (Spans(1, 10), Spans(21, 4))
    assert sorted(overlaps(wanted, stored)) == [(1, 0, 1), (2, 9, 1), (5, 10, 1)]


def test_a_scalar_is_a_parameter_too(tmp_path):
    piece = whole(())
    state = ParameterState(weight=torch.tensor(3.5))
    _, places = write_pieces(tmp_path / rank_file("net", 0), {"s": piece}, ("weight",), iter([("s", state)]))
    write_index(tmp_path / index_file("net"), [places], ("weight",), {"kind": "Net", "config": None})
    reader = StateReader(tmp_path, "net")
    assert reader.full("weight", "s") == 3.5


# --- Files that are written tensor by tensor ---


def test_a_tensor_file_is_a_safetensors_file(tmp_path):
    tensors = {
        "a": torch.randn(3, 4),
        "empty": torch.zeros(0, 2),
        "b": torch.randn(5).to(torch.bfloat16),
        "turned": torch.randn(3, 2).t(),
        "n": torch.arange(7),
        "scalar": torch.tensor(2.0, dtype=torch.float64),
    }
    size, digest = write_tensors(tmp_path / "x.safetensors", tensors, {"model": json.dumps({"kind": "Net"})})
    data = (tmp_path / "x.safetensors").read_bytes()
    assert (size, digest) == (len(data), hashlib.sha256(data).hexdigest())
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert json.loads(file.metadata()["model"]) == {"kind": "Net"}


def test_elements_are_read_from_a_tensor_file(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.randn(5).to(torch.bfloat16),
        "n": torch.arange(7),
        "e": torch.zeros(0),
    }
    write_tensors(path, tensors, {"model": "{}"})
    stored = StoredTensors(path)
    for name, tensor in tensors.items():
        for first, end in ((0, tensor.numel()), (1, 3), (2, 2)) if tensor.numel() else ((0, 0),):
            found = stored.elements(name, first, end)
            assert found.dtype == tensor.dtype and torch.equal(found, tensor.flatten()[first:end]), name
    with pytest.raises(OSError, match="holds no c"):
        stored.elements("c", 0, 1)
    with pytest.raises(OSError, match="not hold all of a"):  # but the beginning of what comes next
        stored.elements("a", 10, 13)
    content = path.read_bytes()
    path.write_bytes(content[:-60])
    with pytest.raises(OSError, match="not hold all of n"):
        stored.elements("n", 0, 7)
    with pytest.raises(SafetensorError):
        StoredTensors(path)


def test_a_tensor_file_wants_its_layout_kept(tmp_path):
    file = TensorFile(tmp_path / "x.safetensors", {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))})
    with pytest.raises(AssertionError):
        file.write("b", torch.zeros(2))
    file = TensorFile(tmp_path / "y.safetensors", {"a": (torch.float32, (2,))})
    with pytest.raises(AssertionError, match="not all tensors"):
        file.close()
