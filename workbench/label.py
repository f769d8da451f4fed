"""`python -m workbench.label`: compare images of two sources by eye, and keep the answers as preference pairs."""

from contextlib import suppress
from pathlib import Path

import click

from workbench.common.command_line import command, one_process
from workbench.common.validation import LARGEST


@click.argument("left")
@click.argument("right")
@click.option(
    "--prompts", default="", metavar="FILE",
    help="The pictures' prompts, one a line, in the order of their names, 2 before 10. Samples have their own.",
)  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder of the answers, as parquet.")
@click.option(
    "--seed",
    type=click.IntRange(0, LARGEST),
    default=0,
    show_default=True,
    help="Of the order of the pairs and their sides.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8600, show_default=True, help="0 = any that is free.")
def main(left: str, right: str, prompts: str, output: Path, seed: int, port: int) -> None:
    """Show pairs of images on a page of this machine's browser, and keep which is preferred.

    LEFT and RIGHT are folders of pictures of the same names (LEFT/001.png and RIGHT/001.png are a pair), or what
    `python -m workbench.evaluate` kept of two models: SAMPLES/data/PROMPTS/MODEL, matched by prompt and seed, where
    SAMPLES was its --output. The page does not say which is which: the sides are shuffled.

    Each answer is on disk before the next pair is shown. Stop it with Ctrl-C whenever you like: the same command goes
    on. OUTPUT is read by data.train=OUTPUT; ties and pairs that were passed over are left out of training.

    \b
    Examples:
      python -m workbench.label before/ after/ --prompts prompts.txt --output labels
      python -m workbench.label samples/data/test/ours samples/data/test/pretrained --output labels
      python -m workbench.train --set data.train=labels --set data.validation=labels
    """
    one_process()
    from workbench.common.errors import UserError
    from workbench.common.locks import try_lock
    from workbench.common.ports import HOST
    from workbench.evaluation import label_page, labelling

    questions = labelling.plan(left, right, prompts, seed)
    about = {"left": str(Path(left).resolve()), "right": str(Path(right).resolve()), "seed": seed}
    with try_lock(output) as mine:
        if not mine:
            raise UserError(f"--output {output}: is being labelled by another command")
        labels = labelling.Labels(output, questions, about)
        with label_page.server(labels, port) as server:
            done = sum(one.key in labels.answered for one in questions)
            click.echo(f"{len(questions)} pairs, {done} answered. Open http://{HOST}:{server.server_port}")
            click.echo("Stop with Ctrl-C; every answer is kept.")
            with suppress(KeyboardInterrupt):  # the usual end of it
                server.serve_forever()
    counts = ", ".join(f"{name} {count}" for name, count in labelling.tally(labels, (left, right)).items())
    sides = labelling.sides(labels)
    preferred = f" The left image was preferred in {sides:.0%} of the decided pairs." if sides is not None else ""
    click.echo(f"\n{counts}.{preferred}")
    click.echo(f"Folder: {output}")


main = command(main)

if __name__ == "__main__":
    main()
