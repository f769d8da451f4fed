"""What every package may use: errors, text, files and caches, paths, locks, secrets, processes, statistics.

It imports no other package of the workbench, and it holds nothing that only one package uses.
"""
