"""The embedded laboratory: a procedural world, and the checkpoint that this project trained on it."""
