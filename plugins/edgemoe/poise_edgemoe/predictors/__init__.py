"""Which experts come next, from recorded routing: tables that are counted, chances that are fitted.

    from poise_edgemoe import predictors
    predictor = predictors.fit([read_trace("trace.csv.gz")])
    Engine.open(store, memory="4GB", prefetch=predictor, policy="predicted")
"""

from __future__ import annotations

from poise_edgemoe.predictors.files import load, save
from poise_edgemoe.predictors.fitting import fit
from poise_edgemoe.predictors.routing import FromRouting

__all__ = ["FromRouting", "fit", "load", "save"]
