"""Two processes train what one does, all forms in one model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FORMS = ("bone", "mini", "bat", "bat_row", "bat_left")

WORKER = Path(__file__).with_name("bone_worker.py")


@pytest.mark.slow  # by default those of compander train in two processes
def test_two_processes_train_what_one_does():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(
        [str(WORKER.parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER)],
        capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(done.stdout.count(f"{name} equal") == 2 for name in FORMS), done.stdout
