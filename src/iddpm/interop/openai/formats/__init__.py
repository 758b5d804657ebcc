"""The original's files and flags: read into this project's own, and written back."""
