"""What is kept of a run: metrics, decision log, recordings."""
