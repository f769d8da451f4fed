"""The small text-to-image model that comes with the workbench: prompts, reward, artwork, how it is trained.

`assets/` holds its checkpoint, its pairs and the networks of its reward; docs/small-model.md explains them.
"""
