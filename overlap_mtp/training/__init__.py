"""Training steps, data, checkpoints, and ranks that watch one another."""
