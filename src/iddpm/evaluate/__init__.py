"""How good a model is: its samples against real images, and its likelihood; every figure with what decides it."""
