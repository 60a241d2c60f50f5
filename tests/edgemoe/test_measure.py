"""What `poise moe bench` measures of a store adds up, and a recording is not measured."""

from __future__ import annotations

import re

import pytest
from moe_models import saved

from poise.cli.main import main
from poise.errors import ConfigError
from poise_edgemoe import convert
from poise_edgemoe.measure import Line, measure, table


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    source = saved(folder / "model", "qwen3_moe", num_experts=8, num_hidden_layers=3, eos_token_id=None,
                   hidden_size=64, moe_intermediate_size=64)
    return str(convert(source, folder / "store", bits=4))


def rows(said):
    """Return the numbers of each line by size and way."""
    found = {}
    for line in said.splitlines()[3:]:
        size, way, *numbers = re.sub(r" %", "%", line).split()
        found[size, way] = [float(n.rstrip("%")) for n in numbers]
    return found


def test_a_token_is_kernels_waiting_and_overhead_and_the_oracle_never_misses(store, tmp_path):
    said = rows(measure(store, [], "A speech.", 10, 64, str(tmp_path / "time.png")))
    ways = ["none", "lookahead", "oracle", "IO-QEXP", "STI"]
    assert list(said) == [(f"{s}%", w) for s in (25, 50, 75) for w in ways] + [("100%", "none")]
    for speed, token, kernels, waiting, overhead, hits, megabytes, t_c, t_io, roofline in said.values():
        assert abs(kernels + waiting + overhead - token) < 0.2 and min(kernels, waiting, overhead) >= 0
        assert abs(speed * token - 1000) < 0.05 * 1000 + speed * 0.05 and 0 <= hits <= 100
        assert t_c > 0 and roofline > 0 and (megabytes >= 0 and t_io >= 0)
    assert said["25%", "oracle"][5] > said["25%", "none"][5] and said["100%", "none"][6] == 0
    assert all(said[f"{s}%", "STI"][5] == 0 for s in (25, 50, 75))
    assert (tmp_path / "time.png").read_bytes()[:4] == b"\x89PNG"


def test_the_table_says_what_a_line_holds():
    one = Line("900MB", "none", 40.0, 25.0, 10.0, 50.0, 6.0, 2.0, 30.0)
    assert (one.reading, one.roofline) == (3.0, 30.0)
    assert table([one]).splitlines()[-1].split() == [
        "900MB", "none", "25.0", "40.0", "25.0", "10.0", "5.0", "50.0", "6.0", "30.0", "3.0", "75", "%"]


def test_limits_and_recordings_that_cannot_be_measured(store, tmp_path, capsys):
    recording = tmp_path / "a.route.csv.gz"
    recording.write_bytes(b"")
    with pytest.raises(ConfigError, match="can only be simulated, with --simulate"):
        measure(str(recording), [], None, None, None, None)
    with pytest.raises(ConfigError, match="--max-new-tokens 1 leaves nothing to measure: give 2 or more"):
        measure(store, [], None, 1, 64, None)
    switch = convert(saved(tmp_path / "switch", "switch_transformers"), tmp_path / "store", bits=32)
    with pytest.raises(ConfigError, match="is an encoder-decoder"):
        measure(str(switch), [], None, 4, 64, None)
    with pytest.raises(ConfigError, match="memory=1kB is too small"):
        measure(store, ["1kB"], None, 4, 64, None)
    for flags, said in ((["--frequencies-out", "f.json"], "-out has no effect without --simulate"),
                        (["--out", "a.pdf"], "is no picture")):
        assert main(["moe", "bench", store, *flags]) != 0
        assert said in capsys.readouterr().err
