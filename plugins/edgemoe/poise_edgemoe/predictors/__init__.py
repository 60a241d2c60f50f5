"""Which experts come next, from recorded routing: tables that are counted, chances that are fitted.

    from poise_edgemoe import predictors
    predictor = predictors.fit([read_trace("trace.csv.gz")])
    Engine.open(store, memory="4GB", prefetch=predictor)
"""

from __future__ import annotations

from poise_edgemoe.predictors.fitting import FromRouting, fit

__all__ = ["FromRouting", "fit"]
