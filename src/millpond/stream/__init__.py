"""One stream through one model: ingest, the runner, turns, generation, recent frames."""
