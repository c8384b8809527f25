"""What a notebook calls: start refuses, figures carry their text, glued values are plain, the card is last."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from toy_run import CHAPTER, filled

from robustvlm_lite import book, cards, runtime
from robustvlm_lite.book import run as run_module
from robustvlm_lite.cards import load_card
from robustvlm_lite.runtime import UserError, asset, sha256

TORCH = torch.__version__.split("+")[0]
ALT = "A line that falls from high to low as the budget grows"


# --- start

REFUSED = {
    "chapter": ({"chapter": "04_tga"}, "unknown chapter '04_tga'; did you mean '04_tga_zsr'"),
    "profile": ({"profile": "smal"}, "unknown profile"),
    "seed type": ({"seed": 1.5}, "seed: expected a whole number"),
    "seed flag": ({"seed": True}, "seed: expected a whole number"),
    "seed range": ({"seed": -1}, "seed"),
    "near miss of an option": ({"profil": "tiny"}, "unknown parameter 'profil'; did you mean 'profile'"),
    "near miss of a parameter": ({"eps255": 1.0}, "did you mean 'eps_255'"),
    "zero budget": ({"eps_255": 0.0}, r"eps_255: expected a number in \(0, 64\], got 0.0"),
    "NaN budget": ({"eps_255": float("nan")}, "eps_255: expected a number"),
    "text budget": ({"eps_255": "1"}, "eps_255: expected a number"),
    "absurd budget": ({"eps_255": 1000}, "eps_255: expected a number"),
    "device": ({"device": "gpu0"}, "expected a torch device"),
    "cuda": ({"device": "cuda"}, "'cuda' was asked for"),
    "option type": ({"data_root": 3}, "data_root: expected text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_start_refuses_in_one_line_and_writes_nothing(name, begin, tmp_path):
    options, message = REFUSED[name]
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=message) as error:
        if "chapter" in options:
            book.start(options["chapter"], out=str(tmp_path / "run"))
        else:
            begin(**options)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_start_refuses_an_output_folder_that_cannot_be_made(begin, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*choose another out="):
        begin(out=str(tmp_path / "file" / "run"))


def test_start_asks_for_the_data_and_weights_of_the_real_chapter(tmp_path):
    with pytest.raises(UserError, match="found none at"):
        book.start(CHAPTER, data_root=str(tmp_path / "absent"), device="cpu", out=str(tmp_path / "run"))
    with pytest.raises(UserError, match="found none at"):
        book.start(CHAPTER, pretrained=str(tmp_path / "absent.pt"), device="cpu", out=str(tmp_path / "run"))


def test_start_says_where_it_runs_in_three_lines(begin, tmp_path, capsys):
    run = begin(eps_255=2.0, seed=3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "profile tiny" in lines[0] and f"cpu, threads: {torch.get_num_threads()}" in lines[0]
    assert f"torch {TORCH}" in lines[1] and str(tmp_path / "run") in lines[2]
    assert run.parameters == {"eps_255": 2.0} and run.card.seed == 3 and run.sizes.model == "toy"
    assert run.store.root == tmp_path / "run" / "cells"


def test_a_parameter_of_zero_takes_the_value_of_the_profile(begin):
    known = runtime.chapters()[CHAPTER]["profiles"]["tiny"]
    known["eps_255"] = 1.0
    assert begin(eps_255=0.0).parameters == {"eps_255": 1.0} and begin(eps_255=4.0).parameters == {"eps_255": 4.0}


def test_without_out_results_go_to_a_temporary_folder_that_is_not_named_on_the_page(begin, capsys, claims):
    run = begin(out="")
    assert run.out.is_dir() and not run.kept
    printed = capsys.readouterr().out
    assert str(run.out) not in printed and str(run.out) not in book.footer(run)


def test_seeds_reach_third_party_generators(begin):
    begin(seed=5)
    first = (torch.rand(1).item(), np.random.rand())
    begin(seed=5)
    assert first == (torch.rand(1).item(), np.random.rand())


def test_a_card_names_a_registered_model_and_its_weights_but_no_place_on_the_disk(begin, tmp_path):
    (tmp_path / "w.pt").write_bytes(b"weights")
    for pretrained, named, path in (
        ("nano", {"pretrained": "nano"}, asset("clip", "nano.safetensors")),
        (str(tmp_path / "w.pt"), {}, tmp_path / "w.pt"),
    ):
        card = begin(pretrained=pretrained).card.as_dict()
        assert {k: v for k, v in card["parameters"].items() if k == "pretrained"} == named
        assert card["provenance"]["weights_sha256"] == sha256(path)


def test_run_loads_model_once_and_data_at_its_size(begin, monkeypatch):
    asked = []

    def load_clip(name, **options):
        asked.append((name, options))
        return SimpleNamespace(image_size=32)

    monkeypatch.setattr(run_module, "load_clip", load_clip)
    monkeypatch.setattr(run_module.data, "load", lambda name, split, **kw: (name, split, kw))
    run = begin(seed=4, pretrained="tag", data_root="there")
    assert run.load_clip() is run.load_clip()
    assert asked == [("toy", {"pretrained": "tag", "device": "cpu"})]
    begin(pretrained="nano").load_clip()
    assert asked[1:] == [("nano", {"pretrained": "", "device": "cpu"})], "a registered name replaces the profile's model"
    expected = ("photos/web", "test", {"data_root": "there", "size": 32, "n": 8, "seed": 4})
    assert run.load("photos/web", n=8) == expected
    assert run.load("photos/web", "train")[2]["seed"] == 0, "training images are the same for every seed"


# --- the end of a run


def test_finish_decides_the_claims_and_writes_the_card_last(begin, claims, monkeypatch):
    run, written, whole = filled(begin(eps_255=1.0)), [], cards.write_whole
    monkeypatch.setattr(cards, "write_whole", lambda path, write: written.append(path.name) or whole(path, write))
    path = run.finish()
    assert path == run.out / "card.json" and written == ["examples.parquet", "card.json"]
    card = load_card(path)
    assert [(c["id"], c["verdict"]) for c in card["claims"]] == [("TGA-C1", "reproduced")]
    assert card["parameters"] == {"eps_255": 1.0}
    assert load_card(run.finish())["claims"] == card["claims"]  # a last cell that is run twice


def test_footer_finishes_and_tells_how_to_repeat(begin, claims, tmp_path):
    run = filled(begin(eps_255=1.0, seed=2, data_root="my data"))
    html = book.footer(run)
    assert (tmp_path / "run" / "card.json").exists() and 'id="rvl-card"' in html
    command = "robustvlm run 04_tga_zsr --profile tiny --seed 2 -p data_root &#x27;my data&#x27; -p eps_255 1"
    assert f"<code>{command}</code>" in html
    for part in ("commit", f"torch {TORCH}", "cpu", 'title="' + "w" * 64, "wall time", "card.json"):
        assert part in html
    assert len(repr(html)) < 80  # what a plain terminal shows


def test_a_figure_that_cannot_be_saved_is_one_line(begin):
    run = begin()
    (run.out / "figures").write_text("in the way")
    with pytest.raises(UserError, match="cannot write .*figures"):
        book.show(picture(), "curve", alt=ALT)


# --- figures


def picture(width=3.4):
    fig = Figure(figsize=(width, 1))
    fig.add_subplot().plot([0, 1])
    return fig


def shown(monkeypatch, *args, **kwargs):
    """The HTML that `book.show` displays."""
    seen = []
    monkeypatch.setattr(run_module, "display", seen.append)
    book.show(*args, **kwargs)
    return seen[0]


def test_alternative_text_and_caption_land_escaped_in_the_html(monkeypatch, begin):
    run = begin()
    html = shown(monkeypatch, picture(), "curve", alt=f'{ALT} "<b>"', caption="ε < 1 & more")
    assert f'alt="{ALT} &quot;&lt;b&gt;&quot;"' in html and "<b>" not in html
    assert "<figcaption>ε &lt; 1 &amp; more</figcaption>" in html and 'class="rvl-figure"' in html
    png = (run.out / "figures" / "curve.png").read_bytes()
    assert png.startswith(b"\x89PNG") and int.from_bytes(png[16:20]) == 510  # 3.4 in at 150 dpi
    assert "width:326px" in html


def test_several_figures_each_have_their_text_and_file(monkeypatch, begin):
    run = begin()
    html = shown(monkeypatch, [picture(), picture()], "two", alt=ALT, caption="c")
    assert re.findall('alt="([^"]*)"', html) == [f"{ALT} (part 1 of 2)", f"{ALT} (part 2 of 2)"]
    assert sorted(p.name for p in (run.out / "figures").iterdir()) == ["two-1.png", "two-2.png"]


def test_same_figure_same_bytes(monkeypatch):
    assert shown(monkeypatch, picture(), "a", alt=ALT) == shown(monkeypatch, picture(), "a", alt=ALT)


def test_a_pyplot_figure_is_closed(monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    fig, ax = pyplot.subplots()
    shown(monkeypatch, fig, "a", alt=ALT)
    assert not pyplot.fignum_exists(fig.number)


def test_show_refuses_a_missing_text_and_a_path(monkeypatch):
    for alt in ("", "   ", "figure"):
        with pytest.raises(UserError, match="says what figure 'a' shows"):
            book.show(picture(), "a", alt=alt)
    with pytest.raises(UserError, match="file name"):
        book.show(picture(), "../a", alt=ALT)


def test_outside_a_notebook_show_prints_one_line(capsys, monkeypatch):
    monkeypatch.setattr(run_module, "_current", None)
    book.show(picture(), "curve", alt=ALT)
    assert capsys.readouterr().out == f"[figure curve: {ALT}]\n"


def test_glued_values_are_plain(begin):
    run = begin()
    book.glue("acc", torch.tensor(0.5))
    book.glue("n", np.int64(3))
    book.glue("name", "TeCoA")
    assert run.glued == {"acc": 0.5, "n": 3, "name": "TeCoA"} and type(run.glued["acc"]) is float
