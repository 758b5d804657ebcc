"""Folders of diffusers (Hugging Face, 0.42), written from a run and read into one; diffusers itself is not needed for it."""
