"""Models against models: what to draw, the samples on disk, the reward models and their weights.

It imports what lies below it (`tracking`, `training`, `data`, `models`, `method`, `common`).
"""
