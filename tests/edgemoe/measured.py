"""Engines in processes of their own, whose memory is measured, also in a control group with a limit."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = """
import json, os, re, sys, torch
torch.set_num_threads(1)
import transformers.models.olmoe.modeling_olmoe
from poise.errors import ConfigError
from poise_edgemoe import Engine
given = json.loads(sys.argv[1])
store = given["store"]

def status(key):
    return int(next(x for x in open("/proc/self/status") if x.startswith(key)).split()[1]) * 1024

def measured(engine):
    stats = engine.stats()
    return {"grown": status("VmHWM") - engine.base, "total": engine.budget.total, "base": engine.base,
            "hits": stats["hit_rate"], "seconds": round(stats["seconds"], 1), "chunk": engine.budget.chunk,
            "faults": stats["major_faults"], "gigabytes": round(stats["bytes_read"] / 1e9, 2)}

def prompt(rows, length, topic):  # topics share no words
    low = 3 + topic * 4000
    return torch.randint(low, low + 3900, (rows, length), generator=torch.Generator().manual_seed(topic))

def answer(engine, *of):
    ids = prompt(*of)
    return engine.generate(ids, 8)[:, ids.shape[1]:].tolist()
"""
LIMIT = """
def limit(size):  # beside what is held that no reclaiming gives back
    old = os.path.isfile(given["group"] + "/memory.limit_in_bytes")
    stat = dict(line.split() for line in open(given["group"] + "/memory.stat"))
    held = int(stat["rss" if old else "anon"])
    held += int(open(given["group"] + "/memory.kmem.usage_in_bytes").read()) if old else int(stat["kernel"])
    name = "/memory.limit_in_bytes" if old else "/memory.max"
    open(given["group"] + name, "w").write(str(held + size if size else -1 if old else "max"))
    return held
"""
TALK = """
def talk(memory):
    said, out = [], []
    with Engine.open(store, memory=memory, context=given["context"]) as engine:
        open("/proc/self/clear_refs", "w").write("5")  # the peak so far is that of what went before
        for topic, length in enumerate((given["context"] - 8, given["second"])):
            out += answer(engine, 1, length, topic)
            said.append(measured(engine))
    with Engine.open(store, memory=memory, context=given["batched"], batch=3) as engine:
        open("/proc/self/clear_refs", "w").write("5")
        out += answer(engine, 3, given["batched"] - 8, 1)
        said.append(measured(engine))
    return said, out
"""
FREE = TALK + """
print(json.dumps(talk(given["memory"])[0]))
"""
GROUPED = LIMIT + TALK + """
Engine.open(store, memory=given["memory"], batch=3, context=given["batched"]).close()
held = limit(int(given["memory"][:-2]) * 10**6)
said, out = talk(given["memory"])
limit(0)
print(json.dumps({"said": said, "held": held, "same": talk(None)[1] == out}))
"""
WHOLE = """
try:
    Engine.open(store, total="1MB", context=given["context"])
except ConfigError as error:
    least = int(re.search(r"workable value is ([0-9]+)MB", str(error))[1])
total = f"{least + given['beyond']}MB"
with Engine.open(store, total=total, context=given["context"]) as engine:
    for topic in range(2):
        answer(engine, 1, given["context"] - 8, topic)
    print(json.dumps({"peak": status("VmHWM"), "total of all": total, **measured(engine)}))
"""


def run(script, group=None, **given):
    """Run a script after `BEGIN` in a process of its own, in a group or none; return what it says."""
    given = {**given, "group": group}
    done = process([sys.executable, "-c", BEGIN + script, json.dumps(given, default=str)], group)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def process(command, group=None):
    """Run a command, in a group or none; it enters before it begins, so that all it takes is counted."""
    if group is not None:
        command = ["/bin/sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *command]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@contextlib.contextmanager
def control_group():
    """Make a control group beneath our own whose memory can be limited, page cache included; or skip."""
    folder, limit = _own_group()
    folder = folder / f"poise-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / limit).write_text((folder / limit).read_text())
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        pytest.skip(f"no control group with a limit can be made here: {error}")
    try:
        yield folder
    finally:
        folder.rmdir()


def _own_group():
    """Return our control group's folder, and the file of a group that takes its limit."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            return Path("/sys/fs/cgroup/memory" + path), "memory.limit_in_bytes"
        if not controllers and Path("/sys/fs/cgroup/cgroup.controllers").is_file():
            return Path("/sys/fs/cgroup" + path), "memory.max"
    pytest.skip("this system limits no memory by control groups")
