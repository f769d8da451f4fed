"""What `python -m workbench.bench` measures: groups of figures, each a median with its spread and a goal.

A group is a function of `Options` that yields figures as they are there; to add one, write it and name it in GROUPS.
Commands alone import this package, and it may import all others.
"""
