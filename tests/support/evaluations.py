"""The command that evaluates, on the tiny models of a test's working folder, and what it left behind."""

import polars as pl
from click.testing import CliRunner

from workbench import tracking
from workbench.evaluate import main
from workbench.models.small.prompts import split
from workbench.tracking import store

PROMPTS = [str(p) for p in split()["test"][:5]]
QUICK = ("--steps", "2", "--seeds", "2", "--prompts", "mine=prompts.txt")
BOTH = ("--model", "ours=other", "--model", "pretrained=tiny")


def evaluate(*arguments, code=0):
    done = CliRunner().invoke(main, [*QUICK, *arguments])
    assert done.exit_code == code, (done.output, done.exception)
    assert "Traceback" not in done.output
    return done.output


def evaluations():
    client = tracking.connect()
    number = store.experiment(client).experiment_id
    return client.search_runs([number], "tags.`workbench.kind` = 'evaluation'")


def contents(folder):
    """Images and scores, whatever the shards' metadata."""
    return pl.read_parquet(folder / "data" / "**" / "*.parquet")
