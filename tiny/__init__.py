"""The embedded laboratory: a procedural world, and the checkpoint trained on it from nothing."""
