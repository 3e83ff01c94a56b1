"""Records of a run: metrics, decision log, recordings."""
