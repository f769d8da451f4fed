"""What `python -m workbench.bench` and `scale` measure: figures, each a median with its spread and, for most, a goal.

A file a benchmark; `groups` names them, `suite` runs them, `table` keeps what they measured.
Commands alone import this package,
and it may import all others.
"""
