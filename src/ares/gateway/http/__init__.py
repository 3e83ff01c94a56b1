"""HTTP: routes, access, limits, errors, the dashboard."""
