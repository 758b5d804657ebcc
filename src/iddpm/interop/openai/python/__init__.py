"""The original's Python names, as its scripts and their forks use them. They are frozen: nothing new belongs here."""
