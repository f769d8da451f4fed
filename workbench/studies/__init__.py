"""Many runs: studies and their workers, attempts at trials, recovery after kills, search spaces, tuning, results.

The only package that imports Optuna. It tracks every attempt through `tracking` and trains by `training`; an attempt
ends in a fixed order, so that a kill at any moment leaves nothing lost and nothing doubled.
"""
