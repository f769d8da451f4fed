"""`workbench COMMAND`, or `python -m workbench COMMAND`: every command under one name.

`workbench sweep` is `python -m workbench.sweep`: each command is a module of its own, imported only when it is called
or when the list of all commands is shown.
"""

from importlib import import_module

import click

from workbench.common.version import __version__

#: What the list of commands shows, in this order. Every module beside this one is in it.
SECTIONS = {
    "Train and compare": ("sweep", "train", "claims", "report", "study"),
    "Real models and data": ("encode", "evaluate", "prefer", "label", "rounds", "export_lora", "push", "throughput"),
    "The workbench itself": ("bench", "profile", "scale", "pretrain"),
}


class Commands(click.Group):
    """The modules of the workbench that can be run, each with a click command called `main`."""

    def list_commands(self, context: click.Context) -> list[str]:
        """All commands' names."""
        return [name for names in SECTIONS.values() for name in names]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The command of that name, or nothing where there is none."""
        return (
            import_module(f"workbench.{name.replace('-', '_')}").main if name in self.list_commands(context) else None
        )

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands, each with the first sentence of its help."""
        for title, names in SECTIONS.items():
            with formatter.section(title):
                commands = {name: self.get_command(context, name) for name in names}
                rows = [(name, found.get_short_help_str(limit=500)) for name, found in commands.items() if found]
                formatter.write_dl(rows)


@click.command(cls=Commands, context_settings={"max_content_width": 120})
@click.version_option(__version__, prog_name="workbench")
def main() -> None:
    """Train, sweep and understand preference optimisation of text-to-image diffusion models.

    Start with `workbench sweep`, which needs no other file, then `workbench report`. `workbench COMMAND --help` says
    more about each.
    """


if __name__ == "__main__":
    main()
