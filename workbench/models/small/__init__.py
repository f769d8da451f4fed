"""The small text-to-image model that comes with the workbench: prompts, reward, artwork, recipe."""
