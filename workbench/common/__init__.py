"""What every package may use: errors and text, files and caches, paths, locks, secrets, processes, statistics."""
