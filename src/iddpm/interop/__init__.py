"""Other projects' files, commands and names, on top of this one's."""
