"""Several processes of one gateway behind one address (`ares gateway --processes`)."""
