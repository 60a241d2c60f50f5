"""Base models: regressors that predict several quantiles."""
