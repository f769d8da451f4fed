"""The command-line option that lists every setting."""

import click


def _list_settings(context: click.Context, option: click.Parameter, asked: bool) -> None:
    if not asked:
        return
    from workbench.training.config import catalogue

    click.echo("| setting | default | meaning |\n| --- | --- | --- |")
    for row in catalogue():
        click.echo(f"| `{row.name}` | {row.default} | {row.meaning} |")
    context.exit()


settings_option = click.option(
    "--settings", is_flag=True, is_eager=True, expose_value=False, callback=_list_settings,
    help="List every setting with its default and meaning, and exit.",
)  # fmt: skip
