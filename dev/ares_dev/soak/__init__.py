"""`ares bench soak`: an hour of everything at once, and nothing that grows."""
