"""Ways to combine the quantiles of several models."""
