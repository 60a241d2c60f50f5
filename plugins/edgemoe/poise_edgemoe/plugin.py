"""Entries of the edgemoe plugin."""

from __future__ import annotations


def register(registry) -> None:
    """Add the small mixture-of-experts model, stores, two experiments, and `poise moe`."""
    components = "poise_edgemoe.components"
    registry.add(
        "model", "byte_moe", f"{components}:ByteMoE",
        "byte-level Mixtral, trained on speeches in about a minute, then cached",
        tasks=("causal_lm",),
        example={"layers": 2, "experts": 4, "hidden": 32, "steps": 2, "length": 32},
    )
    registry.add(
        "model", "edgemoe_store", f"{components}:EdgeMoEStore",
        "a mixture-of-experts model whose experts are read from disk, under a memory limit",
        tasks=("serving",), paper="arXiv 2308.14352 section III",
        example={"byte_moe": {"layers": 2, "experts": 4, "hidden": 32, "steps": 2, "length": 32},
                 "bits": 32, "context": 64, "batch": 2},
    )
    registry.add(
        "model", "edgemoe_streamed", "poise_edgemoe.tuning.components:EdgeMoEStreamed",
        "a mixture-of-experts model for adapters to train on, its experts read from disk layer by layer",
        tasks=("causal_lm",), paper="arXiv 2308.14352 section I",
        example={"byte_moe": {"layers": 2, "experts": 4, "hidden": 32, "steps": 2, "length": 32}},
    )
    registry.add(
        "recipe", "edgemoe_generate", f"{components}:EdgeMoEGenerate",
        "text under a memory limit: the time of every token, hits, bytes, memory, held-out loss",
        tasks=("serving", "causal_lm"), paper="arXiv 2308.14352 section III",
    )
    registry.add(
        "recipe", "edgemoe_tune_and_serve", "poise_edgemoe.tuning.components:EdgeMoETuneAndServe",
        "tune, convert, serve: held-out loss before, after and from the store, with bytes",
        tasks=("causal_lm",), paper="arXiv 2308.14352 section III",
    )
    registry.add(
        "recipe", "edgemoe_bits", f"{components}:EdgeMoEBits",
        "held-out loss and bytes of experts at 16, 8, 4, 2 bits and in mixed plans",
        tasks=("causal_lm",), paper="arXiv 2308.14352 section III-B",
    )
    registry.add(
        "recipe", "edgemoe_paper", "poise_edgemoe.paper.components:EdgeMoEPaper",
        "the paper's comparison: baselines, EdgeMoE as in the paper, ours, under memory limits",
        tasks=("causal_lm",), paper="arXiv 2308.14352 section IV",
    )
    commands = "poise_edgemoe.commands"
    registry.add(
        "command", "moe", {
            "convert": f"{commands}:Convert", "inspect": f"{commands}:Inspect", "plan": f"{commands}:Plan",
            "generate": f"{commands}:Generate", "bench": f"{commands}:Bench",
            "profile": f"{commands}:Profile", "allocate": f"{commands}:Allocate",
            "fit": "poise_edgemoe.fit_command:Fit"},
        "mixture-of-experts models on disk, under a memory limit",
    )
