"""Progress of what says itself how far it is."""

from __future__ import annotations

from poise.runs import progress
from poise.runs.progress import parts


def test_parts_are_shown_with_an_estimate_and_anew_for_the_next(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with parts("prompt") as tell:
        for _ in range(2):
            for done in range(5):
                tell(done, 4)
                now[0] += 1.5
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["prompt: 2/4, about 3 s left", "prompt: 4/4, about 0 s left"] * 2


def test_quiet_parts_say_nothing(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with parts("prompt", quiet=True) as tell:
        tell(1, 2)
    assert capsys.readouterr().err == ""
