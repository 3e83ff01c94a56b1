"""`python -m ares_dev soak`: an hour of everything at once, and nothing that grows."""
