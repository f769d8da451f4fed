"""One run: its settings, the loop, what is measured while it trains, and its snapshots.

`config` checks the settings, `preparation` loads what many runs share, `build` turns settings into functions and
models, `loop` trains, `measurements` says what is measured when, and `run` reads the loop, logs and takes snapshots.
What a run logs goes to a `listener`; MLflow is one, and is not known here. It imports `data`, `models`, `method` and
`common`.
"""
