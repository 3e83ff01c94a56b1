"""`ares check`: whether the instances of a cluster fit together, move requests exactly, and what a move costs there."""
