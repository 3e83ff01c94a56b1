"""`python -m ares_dev soak`: mixed load for hours, to find leaks and lost requests."""
