"""Checks of ARES itself that only its developers run: chaos, soak, kills, moves, footprint."""
