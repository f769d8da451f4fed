import pytest
from click.testing import CliRunner

from workbench.common.command_line import command, one_process


@pytest.mark.parametrize(
    ("variable", "value"), [("TQDM_MININTERVAL", "soon"), ("TQDM_NCOLS", "wide"), ("WORLD_SIZE", "many")]
)
def test_a_variable_that_is_no_number_ends_a_command_with_one_line(variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)
    done = CliRunner().invoke(command(one_process), [])
    assert done.exit_code == 2 and done.output.startswith(f"Error: {variable} = '{value}': expected a "), done.output
    assert done.output.count("\n") == 1
