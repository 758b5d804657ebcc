"""How good a model is: its bound in bits per dimension, and its samples against real images."""
