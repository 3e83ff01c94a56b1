"""One request from its arrival to its last token: placement, hand-over, pre-copy, recovery."""
