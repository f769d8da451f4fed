"""What somebody else has put into a folder stays there."""

import pytest

from workbench.common.errors import UserError
from workbench.common.files import is_partial, partial_file
from workbench.common.outputs import output_file, require_own, written_in
from workbench.common.validation import writable_folder


def write(path, text):
    with output_file(path) as partial:
        partial.write_text(text)


def test_our_own_files_are_written_anew_and_others_stay(tmp_path):
    write(tmp_path / "a.md", "1")
    write(tmp_path / "a.md", "2")
    (tmp_path / "b.md").write_text("years of work")
    require_own(tmp_path, "a.md", "new.md")
    with pytest.raises(UserError, match=r"b\.md: is there, and not among the files .* move it, or choose another fold"):
        write(tmp_path / "b.md", "3")
    with pytest.raises(UserError, match=r"b\.md: is there"):
        require_own(tmp_path, "a.md", "b.md")
    assert (tmp_path / "a.md").read_text() == "2" and (tmp_path / "b.md").read_text() == "years of work"
    assert written_in(tmp_path) == [tmp_path / "a.md"]


def test_a_link_is_not_followed_to_somebody_elses_file(tmp_path):
    (tmp_path / "a.md").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"a\.md: is there"):
        write(tmp_path / "a.md", "1")
    assert not (tmp_path / "elsewhere").exists()


def test_what_fails_leaves_the_file_before(tmp_path):
    write(tmp_path / "a.md", "1")
    with pytest.raises(RuntimeError), output_file(tmp_path / "a.md") as partial:
        partial.write_text("ha")
        raise RuntimeError
    assert (tmp_path / "a.md").read_text() == "1" and len(list(tmp_path.iterdir())) == 2


def test_looking_whether_a_folder_is_writable_leaves_its_files(tmp_path):
    (tmp_path / ".probe").write_text("years of work")
    writable_folder("--out", tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["years of work"]


def test_only_names_that_we_give_are_partial_files(tmp_path):
    with partial_file(tmp_path / "pairs-00000.safetensors") as ours:
        assert is_partial(ours)
    assert not is_partial(tmp_path / "film.mkv.partial")
