"""The command-line option that lists every setting."""

import click


def _list_settings(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    from workbench.training.catalogue import as_markdown

    click.echo(as_markdown(), nl=False)
    context.exit()


settings_option = click.option(
    "--settings", is_flag=True, is_eager=True, expose_value=False, callback=_list_settings,
    help="List every setting with its default and meaning, and exit.",
)  # fmt: skip
