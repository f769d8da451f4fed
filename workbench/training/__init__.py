"""One run: configuration, the loop, what is measured while it trains, snapshots, and how it is all put together."""
