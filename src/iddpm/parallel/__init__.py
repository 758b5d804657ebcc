"""Many processes: the only room that knows of others."""
