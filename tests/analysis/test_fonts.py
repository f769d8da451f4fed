import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib import font_manager

from workbench.analysis import fonts


def test_fonts_of_other_scripts_are_fallbacks(monkeypatch):
    with mpl.rc_context():
        monkeypatch.setattr(font_manager, "get_font_names", lambda: ["SimHei", "Noto Sans CJK JP", "Comic Sans MS"])
        fonts.use()
        assert mpl.rcParams["font.family"] == ["sans-serif", "Noto Sans CJK JP", "SimHei"]


def test_letters_that_no_font_has_are_named(tmp_path, caplog):
    figure = plt.figure()
    figure.text(0.5, 0.5, "arm \U000f1234")  # a private letter, which no font has
    with fonts.lacking_named():
        figure.savefig(tmp_path / "x.png")
    plt.close(figure)
    (record,) = caplog.records
    assert "no installed font has \U000f1234: boxes are drawn; install one" in record.getMessage()
