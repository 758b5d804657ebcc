"""Training: the loop, what it remembers, what it needs."""
