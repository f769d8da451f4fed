"""Models against models: what to draw and to score, samples on disk, reward models and their weights."""
