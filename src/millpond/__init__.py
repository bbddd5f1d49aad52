"""millpond: bounded memory for endless video."""
