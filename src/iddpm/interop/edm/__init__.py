"""Weights of EDM (Karras et al. 2022), from the pickles in which they were published."""
