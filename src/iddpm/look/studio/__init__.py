"""A local page on runs: to watch them, to play with their models, and to train."""
