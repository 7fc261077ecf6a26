"""Shards behind URLs: a real server on loopback, real commands, a cache of bounded size, retries."""

import contextlib
import http.server
import json
import multiprocessing
import os
import shutil
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from support import needs
from support.processes import run_script
from support.training import picture, png, write_shard

from ibq.config import UserError
from ibq.data import storage
from ibq.data.images import ImageDataset
from ibq.data.index import index_file, write_shard_index
from ibq.data.shards import ImageDataConfig, open_images
from ibq.data.storage import ShardStore, is_url
from ibq.files import lock
from ibq.training.run_data import image_data

SHARDS, SAMPLES = 6, 8
CPU = torch.device("cpu")


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; `faults` maps a path to what goes wrong with its next requests."""

    daemon_threads = True

    def __init__(self, folder: Path):
        self.folder, self.faults, self.requests = folder, {}, Counter()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def of(self, suffix=".tar"):
        return {path: count for path, count in self.requests.items() if path.endswith(suffix)}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, name = self.server, self.path.lstrip("/")
        server.requests[name] += 1
        fault = server.faults[name].pop(0) if server.faults.get(name) else None
        file = server.folder / name
        if fault == "hang up":
            self.close_connection = True
            return
        if not file.is_file():
            self.send_error(404)
            return
        data = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "cut":
            data = data[: len(data) // 2]
        elif fault == "garble":
            data = data[:600] + bytes(100) + data[700:]
        self.wfile.write(data)
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    needs.require("curl")  # by which webdataset reads URLs
    folder = tmp_path / "remote"
    folder.mkdir()
    for shard in range(SHARDS):
        members = {}
        for i in range(shard * SAMPLES, (shard + 1) * SAMPLES):
            members |= {f"{i:04d}.png": png(picture(i, 32)), f"{i:04d}.cls": str(i % 3).encode()}
        write_shard(folder / f"train-{shard}.tar", members)
    (folder / "classes.json").write_text('["x", "y", "z"]')
    server = Server(folder)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT_SECONDS", 0.01)


def config(tmp_path, place, **settings):
    return ImageDataConfig(train=place, cache_folder=str(tmp_path / "cache"), workers=0, streams=2, **settings)


def place_of(server):
    return f"{server.url}/train-{{0..{SHARDS - 1}}}.tar"


def index_all(server):
    for path in server.folder.glob("*.tar"):
        write_shard_index(path)


def assert_pictures(index, store=None):
    dataset = ImageDataset(index, 32, store=store)
    for i in range(len(index)):
        image, label = dataset[i]
        assert torch.equal(image.permute(1, 2, 0), torch.tensor(list(picture(i, 32).tobytes())).view(32, 32, 3))
        assert label == i % 3


def cached_bytes(tmp_path):
    return sum(path.stat().st_size for path in (tmp_path / "cache/shards").glob("*.tar"))


def test_what_is_a_url():
    assert all(map(is_url, ("pipe:cat x.tar", "s3://b/x.tar", "https://h/x.tar", "HTTP://h/x")))
    assert not any(map(is_url, ("x.tar", "/a/b/*.tar", "a:b/x.tar", "./pipe/x.tar")))


def test_an_index_beside_the_urls_is_used(server, tmp_path):
    index_all(server)
    chosen = config(tmp_path, place_of(server))
    index = open_images(chosen.train, chosen)
    assert len(index) == SHARDS * SAMPLES and index.classes == ["x", "y", "z"]
    assert not server.of(), "nothing is fetched before it is read"
    assert_pictures(index, chosen.store([index]))
    assert set(server.of().values()) == {1}
    local = open_images(str(server.folder / "train-*.tar"))
    assert index.fingerprint() == local.fingerprint(), "the same set, wherever it lies"


def test_without_an_index_the_shards_are_indexed_first_and_once(server, tmp_path):
    chosen = config(tmp_path, place_of(server))
    index = open_images(chosen.train, chosen)
    assert set(server.of().values()) == {1}
    assert_pictures(index, chosen.store([index]))
    again = open_images(chosen.train, chosen)
    assert set(server.of().values()) == {1} and again.fingerprint() == index.fingerprint()


def test_the_cache_never_holds_more_than_it_may(server, tmp_path):
    index_all(server)
    size = max(path.stat().st_size for path in server.folder.glob("*.tar"))
    chosen = config(tmp_path, place_of(server), cache_gib=2.5 * size / 2**30)
    index = open_images(chosen.train, chosen)
    dataset = ImageDataset(index, 32, store=chosen.store([index]))
    for i in range(len(index)):
        dataset[i]
        assert 0 < cached_bytes(tmp_path) <= 2.5 * size
    assert set(server.of().values()) == {1}
    dataset[SAMPLES * (SHARDS - 1)]  # the last used is still there
    assert set(server.of().values()) == {1}
    dataset[0]  # the first has made room
    assert server.of()["train-0.tar"] == 2


def test_a_cache_that_holds_no_shard(server, tmp_path):
    index_all(server)
    chosen = config(tmp_path, place_of(server), cache_gib=1000 / 2**30)
    index = open_images(chosen.train, chosen)
    with pytest.raises(UserError, match=r"data\.cache_gib"):
        ImageDataset(index, 32, store=chosen.store([index]))[0]


def read_everything(place, folder):
    chosen = ImageDataConfig(train=place, cache_folder=folder, workers=0)
    index = open_images(place, chosen)
    dataset = ImageDataset(index, 32, store=chosen.store([index]))
    for i in range(len(index)):
        dataset[i]


def test_processes_of_a_machine_fetch_a_shard_once(server, tmp_path):
    index_all(server)
    context = multiprocessing.get_context("fork")
    arguments = place_of(server), str(tmp_path / "cache")
    processes = [context.Process(target=read_everything, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert set(server.of().values()) == {1}
    assert not list((tmp_path / "cache/shards").glob("*.part"))


def test_the_cache_is_bounded_also_for_several_processes(server, tmp_path):
    """Each reads all shards in an order of its own, all at once; looked at while none of them makes room."""
    index_all(server)
    size = max(path.stat().st_size for path in server.folder.glob("*.tar"))
    limit = 3.2 * size
    context = multiprocessing.get_context("fork")
    arguments = place_of(server), str(tmp_path / "cache"), limit / 2**30
    processes = [context.Process(target=read_shards_in_turn, args=(*arguments, n)) for n in range(4)]
    cache, most = tmp_path / "cache/shards", 0
    cache.mkdir(parents=True)
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        sizes = []
        with open(cache / "room.lock", "w") as file:
            lock(file, wait=True)
            for path in [*cache.glob("*.tar"), *cache.glob("*.part")]:
                with contextlib.suppress(FileNotFoundError):  # renamed, as it is whole now
                    sizes.append(path.stat().st_blocks * 512)
        most = max(most, sum(sizes))
    assert [process.exitcode for process in processes] == [0] * 4
    assert size < most <= limit


def test_what_a_killed_process_was_fetching_is_cleared_away(server, tmp_path):
    index_all(server)
    size = max(path.stat().st_size for path in server.folder.glob("*.tar"))
    chosen = config(tmp_path, place_of(server), cache_gib=1.2 * size / 2**30)
    (tmp_path / "cache/shards").mkdir(parents=True)
    left = tmp_path / "cache/shards/0123.part"
    left.write_bytes(bytes(size))
    index = open_images(chosen.train, chosen)
    assert ImageDataset(index, 32, store=chosen.store([index]))[0][1] == 0
    assert not left.exists()


def read_shards_in_turn(place, folder, gib, start):
    chosen = ImageDataConfig(train=place, cache_folder=folder, cache_gib=gib, workers=0)
    dataset = ImageDataset(index := open_images(place, chosen), 32, store=chosen.store([index]))
    for turn in range(3 * SHARDS):
        dataset[(start + turn) % SHARDS * SAMPLES]


@pytest.mark.parametrize("fault", ["hang up", "cut", "garble"])
def test_a_fault_of_the_network_is_tried_again(server, tmp_path, fault):
    index_all(server)
    chosen = config(tmp_path, place_of(server))
    index = open_images(chosen.train, chosen)
    server.faults["train-2.tar"] = [fault] * 2
    assert_pictures(index, chosen.store([index]))
    assert server.of()["train-2.tar"] == 3
    # Once more than it may: the shard is given up, named, and left alone for a while.
    shutil.rmtree(tmp_path / "cache/shards")
    server.faults["train-2.tar"] = [fault] * 9
    dataset = ImageDataset(index, 32, store=ShardStore(cache=tmp_path / "cache/shards", retries=1, checks=index.checks))
    for number in (2 * SAMPLES, 2 * SAMPLES + 1):
        with pytest.raises(ValueError, match=r"train-2\.tar.*cannot be read"):
            dataset[number]
    assert server.of()["train-2.tar"] == 3 + 2
    assert dataset[0][1] == 0
    assert not list((tmp_path / "cache/shards").glob("*.part"))


def test_a_shard_that_comes_back_is_read_again(server, tmp_path, monkeypatch):
    index_all(server)
    chosen = config(tmp_path, place_of(server), retries=0)
    index = open_images(chosen.train, chosen)
    dataset = ImageDataset(index, 32, store=chosen.store([index]))
    shutil.move(server.folder / "train-1.tar", tmp_path / "aside.tar")
    clock = [1_000.0]
    monkeypatch.setattr(storage.time, "monotonic", lambda: clock[0])
    with pytest.raises(ValueError, match="cannot be read"):
        dataset[SAMPLES]
    shutil.move(tmp_path / "aside.tar", server.folder / "train-1.tar")
    with pytest.raises(ValueError, match="cannot be read"):
        dataset[SAMPLES]
    clock[0] += storage.LOST_SECONDS
    assert dataset[SAMPLES][1] == SAMPLES % 3


def test_pipes(server, tmp_path):
    place = f"pipe:cat {server.folder}/train-{{0..{SHARDS - 1}}}.tar"
    chosen = config(tmp_path, place)
    index = open_images(place, chosen)
    assert len(index.shards) == SHARDS
    assert_pictures(index, chosen.store([index]))
    failing = config(tmp_path, "pipe:cat /absent.tar 2>/dev/null", retries=0)
    with pytest.raises(UserError, match=r"cannot fetch pipe:cat /absent\.tar"):
        open_images(failing.train, failing)


def test_s3_goes_through_the_aws_command(server, tmp_path, monkeypatch):
    """The command itself is not to be had here; what is called, and that its output is the shard, is."""
    tools = tmp_path / "bin"
    tools.mkdir()
    command = tools / "aws"
    command.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexec cat "{server.folder}/$(basename "$4")"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    place = f"s3://bucket/a b/train-{{0..{SHARDS - 1}}}.tar"
    for path in server.folder.glob("*.tar"):
        write_shard_index(path)
    chosen = config(tmp_path, place)
    index = open_images(place, chosen)
    assert index.classes == ["x", "y", "z"]
    assert_pictures(index, chosen.store([index]))
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "s3 cp --only-show-errors s3://bucket/a b/train-0.tar -" in calls
    assert len(calls) == 2 * SHARDS + 1  # indexes, shards, classes


def test_an_unknown_kind_of_url(tmp_path):
    chosen = config(tmp_path, "nfs3://host/x.tar", retries=0)
    with pytest.raises(UserError, match=r"nfs3://host/x\.tar"):
        open_images(chosen.train, chosen)


# --- Unindexed, in order ---


def in_order(server, tmp_path):
    write_shard(tmp_path / "val.tar", {"v.png": png(picture(900)), "v.cls": b"0"})
    chosen = config(tmp_path, place_of(server), validation=str(tmp_path / "val.tar"), unindexed="in_order")
    return image_data(chosen, 32, 0)


def test_unindexed_urls_are_read_in_order_as_they_come(server, tmp_path):
    data = in_order(server, tmp_path)
    assert data.order.size is None and not server.of()
    seen = []
    for world_size in (1, 2):
        for rank in range(world_size):
            data.bind(4, 2, None, CPU)
            data.batching = type(data.batching)(
                batch_size=4, micro_batch=2, streams=2, rank=rank, world_size=world_size
            )
            steps = data.training(0, 2 * SHARDS * SAMPLES // 4, lambda bad: None)
            if rank == 0 and world_size == 1:
                next(steps)
                assert len(server.of()) == 1, "no more is fetched than is wanted"
                steps = data.training(0, 2 * SHARDS * SAMPLES // 4, lambda bad: None)
            seen.append(torch.cat([labels for step in steps for _, labels in step]))
    # A batch holds the streams' turns one after the other: positions 0, 2, 1, 3.
    whole = seen[0].view(-1, 2, 2).transpose(1, 2).flatten()
    assert whole.tolist() == [i % 3 for i in range(SHARDS * SAMPLES)] * 2
    halves = torch.stack([seen[1].view(-1, 2), seen[2].view(-1, 2)], dim=1).flatten()
    assert torch.equal(halves, seen[0])
    assert set(server.of().values()) == {1}


def test_in_order_reading_goes_on_in_the_middle(server, tmp_path):
    data = in_order(server, tmp_path)
    data.bind(4, 4, None, CPU)
    whole = [step[0][0] for step in data.training(0, 30, lambda bad: None)]
    again = in_order(server, tmp_path)
    again.bind(4, 4, None, CPU)
    rest = [step[0][0] for step in again.training(4 * 13, 17, lambda bad: None)]
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[13:], strict=True))


@pytest.mark.slow
def test_a_run_from_urls(server, tmp_path):
    """The whole way, workers and all; in order there is no epoch, so the length must be given in steps."""
    from support.training import TOKENIZER_CONFIG

    write_shard(tmp_path / "val.tar", {"v.png": png(picture(900)), "v.cls": b"0"})
    text = TOKENIZER_CONFIG.replace("DATA/train-*.tar", f"'{place_of(server)}'").replace("DATA/val-*.tar", "VAL")
    text = text.replace("VAL", str(tmp_path / "val.tar")).replace("workers: 0, in_memory: true", "workers: 2")
    (tmp_path / "config.yaml").write_text(text)
    common = [
        "ibq/train_tokenizer.py",
        "--config",
        str(tmp_path / "config.yaml"),
        f"data.cache_folder={tmp_path}/cache",
    ]
    done = run_script(*common, f"output={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "finished"
    shutil.rmtree(tmp_path / "cache")
    in_order = [f"output={tmp_path}/in_order", "data.unindexed=in_order"]
    done = run_script(*common, *in_order)
    assert done.returncode == 0, done.stderr
    refused = run_script(*common, *in_order, "training.max_steps=null", "training.epochs=1")
    assert refused.returncode == 2 and "training.max_steps" in refused.stderr


def test_index_files_stand_beside_their_shards():
    assert index_file("/a/train-00000.tar") == "/a/train-00000.index.json"
    assert index_file("https://h/x/t.tar") == "https://h/x/t.index.json"
