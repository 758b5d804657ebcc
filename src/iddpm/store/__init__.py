"""Where things lie, here or on remote storage, and how they get there whole: checkpoints, logs, locks."""
