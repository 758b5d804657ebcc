"""Drawing for others over HTTP: who may ask, what waits to be drawn, and the addresses."""
