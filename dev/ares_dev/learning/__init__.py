"""A cluster that starts without a predictor and learns one from its own traffic: what it gains, and when."""
