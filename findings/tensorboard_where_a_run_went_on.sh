#!/usr/bin/env bash
# TensorBoard 2.21.0 with its data server 0.7.2: a run that was killed at step 10 and went on from step 6.
#
# Both parts write event files of their own; the second begins with SessionLog.START at step 6, which says that what
# other files tell of step 6 and later is void. Before the kill "loss" was written at every step and "validation" at 5
# and 10; the second part has written "loss" at 6, 7 and 8, and is not at its next validation yet.
#
# Guess: TensorBoard shows what is valid: of "loss" steps 1 to 8, of "validation" step 5 alone; and its two loaders agree.
# Seen:
#
#   loader                         loss      validation
#   Python (--load_fast=false)     1 to 8    5
#   data server (the default)      1 to 8    5 and 10
#
# The data server takes no notice of SessionLog.START. It drops void steps of a tag when that tag itself goes back, so a
# rarely written one keeps a figure of weights that do not exist any more. Fails if this changes.
set -euo pipefail
folder="$(mktemp -d)" && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet tensorboard==2.21.0 tensorboard-data-server==0.7.2 "setuptools<81"
cat >"$folder/look.py" <<'PYTHON'
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

logs = Path(sys.argv[1])


def write(name, events):
    with open(logs / name, "wb") as file:
        writer = RecordWriter(file)
        for event in [Event(file_version="brain.Event:2"), *events]:
            event.wall_time = time.time()
            writer.write(event.SerializeToString())
        writer.flush()


def scalar(tag, step):
    return Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=float(step))]))


def session(step):
    return Event(step=step, session_log=SessionLog(status=SessionLog.START))


first = [event for step in range(1, 11) for event in [scalar("loss", step)] + [scalar("validation", step)] * (step % 5 == 0)]
write("events.out.tfevents.0000000001.host.1.0", [session(1), *first])
write("events.out.tfevents.0000000002.host.2.0", [session(6), *(scalar("loss", step) for step in (6, 7, 8))])


def shown(fast):
    """Tag -> the steps that TensorBoard's page gets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen([*command, f"--load_fast={fast}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        found = {}
        for tag in ("loss", "validation"):
            url = f"http://127.0.0.1:{port}/data/plugin/scalars/scalars?run=.&tag={tag}"
            for _ in range(240):
                try:
                    found[tag] = [step for _, step, _ in json.load(urllib.request.urlopen(url))]
                    break
                except (urllib.error.URLError, OSError):  # not there, or not read yet
                    time.sleep(0.25)
        return found
    finally:
        server.terminate()
        server.wait()


for fast, validation in (("false", [5]), ("true", [5, 10])):
    found = shown(fast)
    print(f"load_fast={fast}: {found}")
    assert found["loss"] == [*range(1, 9)], "changed: steps of a tag that goes back"
    assert found["validation"] == validation, "changed: steps of a tag that does not"
PYTHON
mkdir "$folder/logs"
"$folder/venv/bin/python" "$folder/look.py" "$folder/logs"
echo "as stated"
