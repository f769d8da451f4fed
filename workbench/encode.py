"""`python -m workbench.encode`: latents and embeddings of an experiment's preference pairs, once, before training."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from workbench.common.command_line import command, experiment_argument, set_option, silence_transformers
from workbench.training.settings_option import settings_option

if TYPE_CHECKING:
    from workbench.data.encoding import Encoding
    from workbench.data.rows import Rows
    from workbench.models import Backend

#: Rows of Pick-a-Pic v2's training split.
FULL = 959_040


@experiment_argument
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder for the stores; default: the cache, where training looks."
)
@click.option(
    "--split", "splits", type=click.Choice(["train", "validation"]), multiple=True, help="Only this one. Repeatable."
)
@click.option(
    "--batch-size", type=click.IntRange(1), help="Pairs in one call of the autoencoder. Default: by resolution."
)
@click.option("--workers", type=click.IntRange(1), help="Threads that decode images. Default: one a core.")
@click.option(
    "--shard",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="Pairs a shard, at least.",
)
@click.option("--estimate", type=click.IntRange(8), metavar="PAIRS", help="Try so many and say what all would take.")
@set_option
@settings_option
def main(
    experiment: Path | None, output: Path | None, splits: tuple[str, ...], batch_size: int | None, workers: int | None,
    shard: int, estimate: int | None, overrides: tuple[str, ...],
) -> None:  # fmt: skip
    """Encode an experiment's pairs: latents of both images, embeddings of the captions, in safetensors shards.

    Training does the same by itself where it finds nothing; this is for large data, on a machine of its own. Killed, it
    goes on with the shard it was in; finished, it is verified by its checksums. With --output, train from the folders:
    --set data.train=FOLDER --set data.validation=FOLDER.

    \b
    Examples:
      python -m workbench.encode
      python -m workbench.encode experiments/sd15.toml --output /data/pickapic-sd15 --workers 16
      python -m workbench.encode experiments/sd15.toml --estimate 64
    """
    from workbench.data.encoding import encode
    from workbench.data.rows import report
    from workbench.training.experiment_file import load, parse_override
    from workbench.training.preparation import encoding_of, open_backend, rows_of

    config = load(experiment, dict(parse_override(text) for text in overrides))
    silence_transformers()
    wanted = splits or ("train", "validation")
    rows = {split: rows_of(config.data, split) for split in wanted}  # columns first, weights later
    backend = open_backend(config.model)
    if estimate:
        encoding = replace(encoding_of(config.data, wanted[0]), limit=estimate)
        click.echo(_estimate(rows[wanted[0]], backend, encoding, batch_size or 0, workers or 0))
        return
    for split in wanted:
        encoding = encoding_of(config.data, split)
        into = output / split if output else None
        pairs = encode(
            rows[split],
            backend,
            encoding,
            into=into,
            shard=shard,
            batch_size=batch_size or 0,
            workers=workers or 0,
            check=True,
        )
        size = sum(x.nbytes for shard in pairs.shards for x in shard.values())
        click.echo(f"{split}: {len(pairs)} pairs, {size / 1e6:,.1f} MB, digest {pairs.digest[:12]}")
        click.echo(f"  {report(pairs.counts)}")
        if into:
            click.echo(f"  --set data.{split}={into}")


def _estimate(rows: "Rows", backend: "Backend", encoding: "Encoding", batch_size: int, workers: int) -> str:
    """A table: what was measured on a sample, and what the data and the whole of Pick-a-Pic v2 would take."""
    import time

    from workbench.common.markdown import markdown_table
    from workbench.data.encoding import in_memory

    in_memory(rows, backend, replace(encoding, limit=1))  # loads the weights
    start = time.perf_counter()
    pairs = in_memory(rows, backend, encoding, batch_size, workers)
    used = pairs.counts["used"]
    seconds = (time.perf_counter() - start) / used
    (shard,) = pairs.shards
    text = {name: x for name, x in shard.items() if name.startswith("text.")}
    a_caption = sum(x[0].nbytes for x in text.values())
    a_pair = sum(x.nbytes for name, x in shard.items() if name not in text) / used
    # A caption is stored once, however many pairs have it; pairs that are ties or have no label are not stored.
    captions, usable = len(next(iter(text.values()))) / used, used / sum(pairs.counts.values())

    def line(what: str, count: float) -> tuple:
        latents, embeddings = count * a_pair / 1e9, count * captions * a_caption / 1e9
        hours = count * seconds / 3600
        return what, f"{count:,.0f}", *(f"{x:,.0f}" if x > 10 else f"{x:.2g}" for x in (latents, embeddings, hours))

    lines = [line("the sample", used)]
    lines += [line("these data", rows.total * usable)] if rows.total else []
    lines += [line("Pick-a-Pic v2, train", FULL * usable)]
    head = ("", "pairs that count", "latents, GB", "captions, GB at most", "hours")
    note = (
        f"{backend.checkpoint.source}, {backend.resolution} px, {encoding.dtype}, on {backend.device.type}: "
        f"{1e3 * seconds:.1f} ms and {a_pair:,.0f} bytes a pair, {captions:.2f} captions of {a_caption:,} bytes.\n"
        "Captions recur more often in larger data, so theirs is an upper estimate."
    )
    return f"{note}\n\n{markdown_table(head, lines)}"


main = command(main)

if __name__ == "__main__":
    main()
