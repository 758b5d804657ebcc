"""What a user types after `iddpm`, one file each: its flags, and the program it calls."""
