"""Prediction inside the decode worker: hidden states, recorder, data collection."""
