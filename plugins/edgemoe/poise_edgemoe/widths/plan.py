"""A plan that knows which model it was made for, how its widths are stored, and what was measured of it.

As a mapping, and in its file, it is core's: names of matrices to bits. What else is known lies in a report
beside the file, `plan.report.json`; `convert` looks at it, so that no plan meets another model's experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.errors import ConfigError, FileError
from poise.files import read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from poise_edgemoe.widths.profile_file import Profile

KIND, VERSION = "poise plan", 1


class Plan(dict[str, int]):
    """Names of experts' matrices to bits.

    Parameters
    ----------
    bits : mapping
    profile : Profile
        What it was chosen from.
    report : dict
        Budget, method, what it costs, what was predicted and measured.
    """

    def __init__(self, bits: Mapping[str, int], profile: Profile, report: Mapping[str, Any]) -> None:
        super().__init__(bits)
        options = profile.options
        self.facts = {"identity": profile.model["identity"], "family": profile.model["family"],
                      "dtype": profile.model["dtype"],
                      **{k: options[k] for k in ("scheme", "group", "rounding")}}
        self.moments: Mapping[str, Tensor] = profile.moments
        self.report = dict(report)

    def quantizers(self) -> dict[str, Any]:
        """Return what stores each matrix, for `quantize_model`: bits, or what chooses its scales."""
        from poise_edgemoe.widths.forms import Forms

        f = self.facts
        widths = tuple(sorted({2, 16, *self.values()}))
        forms = Forms(f["scheme"], f["group"], widths, f["rounding"], f["dtype"])
        return {name: bits if forms.exact(bits) or bits == 16 else forms.at(bits, self.moments.get(name))
                for name, bits in self.items()}

    def for_source(self, source: Any, scheme: str, group: int) -> Mapping[str, Any]:
        """Return the plan for a model that is converted.

        Raises
        ------
        ConfigError
            For another model than it was made for, or another scheme.
        """
        from poise_edgemoe.widths.identity import identity_of

        f = self.facts
        if (scheme, group) != (f["scheme"], f["group"]) and any(b != 16 for b in self.values()):
            raise ConfigError(f"the plan is of scheme={f['scheme']} group={f['group']}, not of "
                              f"scheme={scheme} group={group}: give its own")
        names = {w.name for layer in source.layers for one in layer.experts for w in one.values()}
        if odd := sorted(names ^ self.keys()):
            where = "the model lacks" if odd[0] in self else "the plan does not name"
            raise ConfigError(f"the plan is of other experts: {where} {odd[0]}; allocate one for this "
                              f"model")
        if (found := identity_of(source)) != f["identity"]:
            raise ConfigError(f"the plan was made for another model ({f['family']}, identity "
                              f"{f['identity'][:12]}) than this one ({found[:12]}): profile this one")
        return self.quantizers() if f["rounding"] == "weighted" else self

    def save(self, path: Path | str) -> Path:
        """Write the plan, and its report beside it, which comes first."""
        path = Path(path)
        said = {"kind": KIND, "version": VERSION, **self.facts, "report": self.report}
        if f_moments := dict(self.moments):
            from safetensors.torch import save

            from poise.files import write_bytes
            from poise_edgemoe.widths.profile_file import beside

            said["moments"] = beside(path, ".moments.safetensors").name
            tensors = {k: f_moments[k].contiguous() for k in sorted(f_moments)}
            write_bytes(beside(path, ".moments.safetensors"), save(tensors))
        write_json(report_path(path), said)
        write_json(path, dict(self))
        return path


def report_path(path: Path) -> Path:
    """Return where the report of a plan's file lies."""
    return path.with_name(path.name.removesuffix(".json") + ".report.json")


def load_plan(path: Path | str) -> Mapping[str, Any]:
    """Read a plan: with its report if that lies beside it, else as the mapping that it is.

    Raises
    ------
    FileError
        For files that are torn, or no plan.
    ConfigError
        For a file without a mapping.
    """
    path = Path(path)
    plan = read_json(path)
    if not isinstance(plan, Mapping):
        raise ConfigError(f"{path} holds no plan: it is to map names or patterns to bits")
    if not report_path(path).is_file():
        return plan
    said = read_json(report_path(path))
    if not isinstance(said, dict) or said.get("kind") != KIND or said.get("version") != VERSION:
        raise FileError(f"{report_path(path)} is no report of a plan of version {VERSION}: allocate again, "
                        f"or remove it to have the plan unchecked")
    return _bound(plan, said, path)


def _bound(plan: Mapping[str, Any], said: dict[str, Any], path: Path) -> Plan:
    from poise_edgemoe.widths.profile_file import read_moments

    facts = {k: said.get(k) for k in ("identity", "family", "dtype", "scheme", "group", "rounding")}
    kinds = {k: int if k == "group" else str for k in facts}
    if odd := [k for k, kind in kinds.items() if not isinstance(facts[k], kind)]:
        raise FileError(f"{report_path(path)} is torn: {odd[0]} is {facts[odd[0]]!r}")
    if odd := [k for k, b in plan.items() if isinstance(b, bool) or not isinstance(b, int)]:
        raise ConfigError(f"{path}: {odd[0]} has {plan[odd[0]]!r}, which is no number of bits; remove the "
                          f"report beside it to have another kind of plan")
    made = Plan.__new__(Plan)
    dict.__init__(made, plan)
    made.facts, made.report = facts, dict(said.get("report", {}))
    made.moments = read_moments(path, said.get("moments"))
    return made
