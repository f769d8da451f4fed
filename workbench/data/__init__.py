"""Preference pairs, from rows of images as people have them to batches as training takes them.

`rows` reads parquet files and hub datasets, `encoding` makes latents and embeddings of them, `store` keeps those on
disk, `pairs` and `streaming` hand out batches. It imports `common`, `method` and `models`, and no data-frame library.
"""
