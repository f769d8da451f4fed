"""What every process of a run saw: `torchrun ... tests/support/ranks.py SETTINGS.json OUT [STEP]` writes OUT/RANK.json.

With STEP it ends without a word after that step, and goes on from its last snapshot when it is called again without.
"""

import json
import os
import sys
from pathlib import Path

from workbench.common import distributed
from workbench.training.config import resolve
from workbench.training.run import execute
from workbench.training.snapshots import Snapshots


class Heard:
    """A listener that remembers."""

    def __init__(self):
        self.metrics, self.tables = {}, {}

    def log(self, step, metrics):
        self.metrics.setdefault(step, {}).update(metrics)

    def image(self, key, step, pixels):
        pass

    def picture(self, file, pixels):
        self.tables[file] = pixels.astype(float).mean()

    def table(self, file, columns):
        self.tables[file] = {name: list(values) for name, values in columns.items()}

    def artifact(self, path, folder=None):
        pass


def main(settings: str, out: str, last: str = "") -> None:
    def on_step(step, news):
        if str(step) == last:
            os._exit(0)

    heard, snapshots = Heard(), Snapshots(Path(out) / "snapshots", interval=2)
    config = resolve(json.loads(Path(settings).read_text()))
    execute(config, heard, save_to=Path(out) / "trained", snapshots=snapshots, on_step=on_step)
    found = {"metrics": heard.metrics, "tables": heard.tables}
    (Path(out) / f"{distributed.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
