"""Where images come from, as names and bytes."""
