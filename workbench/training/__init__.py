"""One run: its settings, the loop, what is measured while it trains, and its snapshots.

`config` checks the settings, `preparation` loads what many runs share, `run` puts everything together, `loop` trains.
What a run logs goes to a `listener`; MLflow is one, and is not known here. It imports `data`, `models`, `method` and
`common`.
"""
