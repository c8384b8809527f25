"""The figures say what was measured: lines at their values, labels apart, names and hues of the whole book."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from toy_figures import texts

from robustvlm_lite import plots
from robustvlm_lite.plots.style import COLORS, ink, looks, luminance, spread
from robustvlm_lite.records import Row
from robustvlm_lite.runtime import UserError, chapters

CURVES = {"CLIP": (0.8, 0.1, 0.0), "TeCoA": (0.7, 0.6, 0.5), "TGA-ZSR": (0.75, 0.62, 0.52)}  # at ε = 0, 1, 2


def rows(attack="pgd-20", seed=0, dataset="toy/gray"):
    made = []
    for method, values in CURVES.items():
        for eps, value in enumerate(values):
            name, metric = (attack, "robust_acc") if eps else ("none", "clean_acc")
            interval = (max(0, value - 0.05), value + 0.05)
            made.append(Row(method, dataset, name, float(eps), metric, 250, value, interval, extra={"seed": seed}))
    return made


def curve(ax, method, attack_style="-"):
    return next(line for line in ax.lines if line.get_label() == method and line.get_linestyle() == attack_style)


def test_accuracy_curve_has_the_values_the_chance_line_and_every_name():
    (ax,) = plots.accuracy_vs_eps(rows(), chance=0.04).axes
    for method, values in CURVES.items():
        assert curve(ax, method).get_ydata() == pytest.approx([100 * v for v in values])
        assert method in texts(ax) and to_hex(curve(ax, method).get_color()) == COLORS[method].lower()
    chance = next(line for line in ax.lines if line.get_gid() == "chance")
    assert list(chance.get_ydata()) == [4, 4] and "chance" in texts(ax)
    assert ax.get_ylim() == (0, 100) and not ax.get_title()
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "1", "2"]
    assert "n = 250" in ax.get_xlabel() and "1/255" in ax.get_xlabel() and "pgd-20" in ax.get_xlabel()
    assert ax.get_title(loc="left") == "toy/gray"


def test_band_is_the_interval():
    (ax,) = plots.accuracy_vs_eps(rows(), chance=0.04, order=["TeCoA"]).axes
    (band,) = ax.collections
    low, high = band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()
    assert (low, high) == pytest.approx((45, 75))


def test_attacks_differ_by_line_and_methods_by_hue():
    (ax,) = plots.accuracy_vs_eps(rows() + rows("cw-20"), chance=0.04).axes
    assert curve(ax, "TeCoA", "-").get_color() == curve(ax, "TeCoA", "--").get_color()
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["pgd-20", "cw-20"]


def test_one_method_under_two_attacks_is_named_by_attack():
    both = [r for r in rows() + rows("noise") if r.method == "CLIP"]
    (ax,) = plots.accuracy_vs_eps(both, chance=0.04).axes
    assert {"pgd-20", "noise"} <= set(texts(ax)) and "CLIP" not in texts(ax) and ax.get_legend() is None


def test_seeds_are_thin_lines_around_their_mean():
    (ax,) = plots.accuracy_vs_eps(rows(seed=0) + rows(seed=1), chance=0.04).axes
    assert not ax.collections  # the interval of one seed is not that of the mean
    assert sum(line.get_linewidth() < 1 and line.get_gid() is None for line in ax.lines) == 2 * len(CURVES)


def test_curve_refuses_what_it_would_draw_wrongly():
    with pytest.raises(UserError, match="one data set"):
        plots.accuracy_vs_eps(rows() + rows(dataset="toy/other"), chance=0.04)
    with pytest.raises(UserError, match="fraction"):
        plots.accuracy_vs_eps(rows(), chance=4)
    with pytest.raises(UserError, match="none of FARE"):
        plots.accuracy_vs_eps(rows(), chance=0.04, order=["CLIP", "FARE"])
    with pytest.raises(UserError, match="clean rows only"):
        plots.accuracy_vs_eps([r for r in rows() if r.attack == "none"], chance=0.04)


def test_names_beside_the_axes_do_not_collide():
    many = [Row(m, "toy/gray", "pgd-20", 1.0, "robust_acc", 250, 0.4, (0.3, 0.5)) for m in COLORS]
    fig = plots.accuracy_vs_eps(many, chance=0.04)
    FigureCanvasAgg(fig).draw()
    boxes = [t.get_window_extent() for t in fig.axes[0].texts if t.get_text() in COLORS]
    assert len(boxes) == len(COLORS)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    width, height = fig.canvas.get_width_height()
    assert all(box.x1 <= width and 0 <= box.y0 and box.y1 <= height for box in boxes)


def test_spread():
    assert spread([10, 50, 90], 5, 0, 100) == pytest.approx([10, 50, 90])
    assert spread([50, 50], 10, 0, 100) == pytest.approx([45, 55])
    placed = spread([0, 1, 2, 80, 1], 8, 0, 100)
    assert placed.min() >= 0 and min(b - a for a, b in pairwise(sorted(placed))) >= 8 - 1e-9
    assert placed[3] == 80 and np.argsort(placed, kind="stable").tolist() == [0, 1, 4, 2, 3]
    assert spread([], 1, 0, 1).size == 0


def test_hues():
    assert plots.color("CLIP") == "#000000" and plots.color("TGA-ZSR (strict)") == plots.color("TGA-ZSR")
    assert len(set(COLORS.values())) == len(COLORS) and plots.color("mine") not in list(COLORS.values())[2:]
    for hue in COLORS.values():
        assert 1.05 / (luminance(ink(hue)) + 0.05) >= 4.5
    assert ink("#000000") == "#000000"


def test_no_two_names_of_a_figure_look_alike():
    names = ["TGA-ZSR", "TGA-ZSR (released)", "TGA-ZSR (paper)", "ce", "ar", "CLIP"]
    drawn = looks(names)
    assert len({(k["color"], k["marker"], k.get("markerfacecolor")) for k in drawn.values()}) == len(names)
    assert drawn["ce"]["color"] != drawn["TGA-ZSR"]["color"] == drawn["TGA-ZSR (paper)"]["color"]
    assert len(looks(str(i) for i in range(20))) == 20  # more than there are looks


@pytest.mark.parametrize("chapter", ["05_capt", "06_cba_fapt"])
def test_each_method_on_prompts_has_its_own_hue_in_every_figure_of_its_chapter(chapter):
    """Whatever else is drawn: bars ask for the hue of a name, curves for the looks of all names of a figure."""
    methods = list(dict.fromkeys(m for sizes in chapters()[chapter]["profiles"].values() for m in sizes["methods"]))
    hues = {m: plots.color(m) for m in methods}
    one_each = [hues[m] for m in methods if m != "AVP"]  # of which AdvVP is a form
    assert len(set(one_each)) == len(one_each) and set(hues.values()) <= set(COLORS.values()), hues
    for some in (methods, methods[::-1], methods[2:]):
        drawn = looks(some)
        assert all(drawn[m]["color"] == hues[m] for m in some)
        assert len({(k["color"], k["marker"], k.get("markerfacecolor")) for k in drawn.values()}) == len(some)
    assert plots.color("HEP") == plots.color("CLIP") and plots.color("CAPT, A1") == plots.color("CAPT") != plots.color("mine")


def test_readers_own_matplotlib_settings_neither_matter_nor_change():
    import matplotlib

    with matplotlib.rc_context({"font.size": 30, "figure.facecolor": "black"}):
        fig = plots.convergence({"CLIP": [0.0, 1.0, 2.0]}, quantity="loss")
        assert matplotlib.rcParams["font.size"] == 30
    assert fig.get_facecolor() == (1, 1, 1, 1) and fig.axes[0].xaxis.label.get_size() == 9


def test_paired_differences_have_a_zero_line_and_filled_markers_where_sure():
    fig = plots.paired_bars({"CLIP": (-0.3, -0.35, -0.25), "TeCoA": (0.01, -0.02, 0.04)}, reference="TGA-ZSR")
    (ax,) = fig.axes
    assert any(line.get_gid() == "zero" and list(line.get_xdata()) == [0, 0] for line in ax.lines)
    markers = [line for line in ax.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in markers] == pytest.approx([-30, 1])
    filled = [to_hex(line.get_markerfacecolor()) != "#ffffff" for line in markers]
    assert filled == [True, False] and "TGA-ZSR" in ax.get_xlabel()
    assert [t.get_text() for t in ax.get_yticklabels()] == ["CLIP", "TeCoA"]
    with pytest.raises(UserError, match="as fractions, got -30"):
        plots.paired_bars({"CLIP": (-30, -35, -25)}, reference="TGA-ZSR")
    with pytest.raises(UserError, match="at least one"):
        plots.paired_bars({}, reference="CLIP")


def test_cost_points_lie_where_they_were_measured():
    fig = plots.cost_scatter({"CLIP": (0.1, 0.0), "FARE": (0.3, 0.4, 0.35, 0.45)}, cost="seconds per step")
    (ax,) = fig.axes
    points = [
        (line.get_label(), *line.get_xdata(), *line.get_ydata()) for line in ax.lines if line.get_label() in COLORS
    ]
    assert points == [("CLIP", 0.1, 0.0), ("FARE", 0.3, 40.0)]
    assert texts(ax) == ["CLIP", "FARE"] and ax.get_xlabel() == "seconds per step" and ax.get_ylim() == (0, 100)
    with pytest.raises(UserError, match="costs above zero"):
        plots.cost_scatter({"CLIP": (0.0, 0.4)}, cost="seconds", log=True)


def test_convergence_over_steps():
    curves = {"CLIP": ([0, 10, 20], [0.8, 0.2, 0.1]), "TeCoA": [0.8, 0.7]}
    (ax,) = plots.convergence(curves, quantity="q", percent=True).axes
    assert ax.get_ylim() == (0, 100) and ax.get_xlabel() == "attack steps"
    assert list(ax.lines[0].get_xdata()) == [0, 10, 20] and ax.lines[0].get_ydata()[-1] == pytest.approx(10)
    with pytest.raises(UserError, match="TeCoA: expected a value for each step, got 1 for 2"):
        plots.convergence({"TeCoA": ([0, 1], [0.5])}, quantity="q")


def test_grid_shows_every_number_in_its_place():
    values = {(0.0, 0.0): 0.1, (0.0, 0.05): 0.2, (0.08, 0.05): 0.42}
    (ax,) = plots.ablation_grid(values, rows="α", columns="β", mark=(0.08, 0.05)).axes
    shown = {t.get_position(): t.get_text() for t in ax.texts}
    assert shown == {(0, 0): "10.0", (1, 0): "20.0", (1, 1): "42.0"}  # (column, row); the missing pair stays empty
    assert ax.get_xlabel() == "β" and ax.get_ylabel() == "α" and len(ax.patches) == 1
    with pytest.raises(UserError, match="as fractions, got 42"):
        plots.ablation_grid({(0, 0): 42.0}, rows="α", columns="β")
    with pytest.raises(UserError, match="mark"):
        plots.ablation_grid(values, rows="α", columns="β", mark=(1, 1))


def test_convergence_with_names_and_on_a_logarithmic_axis():
    (ax,) = plots.convergence({"CLIP": [0.0, 1.0, 2.0]}, quantity="q", names=["in", "block 1", "out"]).axes
    assert [t.get_text() for t in ax.get_xticklabels()] == ["in", "block 1", "out"]
    (ax,) = plots.convergence({"CLIP": ([1, 8, 64], [0.0, 1.0, 2.0])}, quantity="q", log=True).axes
    assert ax.get_xscale() == "log"


def test_confusions_count_and_the_rest_is_other():
    labels, answers = [0, 0, 0, 1, 1, 2, 3, 3], [0, 1, 3, 1, 0, 2, 3, 3]
    (ax,) = plots.confusion_grid(
        labels, answers, ["cat", "dog", "ring", "a very long name of a star"], most=2, title="toy"
    ).axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["cat", "dog"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["cat", "dog", "other"]
    found = {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in ax.texts}
    assert found == {(0, 0): "1", (0, 1): "1", (0, 2): "1", (1, 0): "1", (1, 1): "1"}
    with pytest.raises(UserError, match="an answer for each label"):
        plots.confusion_grid([0, 1], [0], ["cat", "dog"])


def test_pairs_stand_at_their_words_and_marked_ones_are_framed():
    values = {("red", "star"): 1.0, ("red", "ring"): 0.5, ("blue", "ring"): 0.0}
    (ax,) = plots.pair_grid(values, marked=[("blue", "ring")]).axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["red", "blue"]
    assert {(t.get_position(), t.get_text()) for t in ax.texts} == {((0, 0), "100"), ((1, 0), "50"), ((1, 1), "0")}
    assert len(ax.patches) == 1
    with pytest.raises(UserError, match="fractions"):
        plots.pair_grid({("red", "star"): 40})


def test_similarities_frame_the_nearest_text_of_each_image():
    images, cosines = torch.rand(2, 3, 8, 8), torch.tensor([[0.5, -0.25, 0.1], [0.0, 0.3, 0.9]])
    *pictures, ax = plots.similarities(images, ["cat", "dog", "grand piano"], cosines).axes
    assert len(pictures) == 2 and [t.get_text() for t in ax.texts] == [".50", ".00", "−.25", ".30", ".10", ".90"]
    assert [round(p.get_x() + 0.46) for p in ax.patches] == [0, 1] and [
        round(p.get_y() + 0.45) for p in ax.patches
    ] == [0, 2]
    with pytest.raises(UserError, match=r"cosines \[2, 3\]"):
        plots.similarities(images, ["cat", "dog", "ring"], cosines.T)


def test_mosaics_keep_every_tile_apart():
    tiles = torch.zeros(4, 3, 2, 2)
    tiles[3] = 0.5
    (ax,) = plots.mosaics({"patches": tiles}).axes
    sheet = ax.get_images()[0].get_array()
    assert sheet.shape == (5, 5, 3) and sheet[2].min() == 1 and sheet[:, 2].min() == 1 and (sheet[3:, 3:] == 0.5).all()
    shown = plots.stretched(torch.tensor([-2.0, 0.0, 1.0]).view(1, 3, 1, 1))
    assert shown.flatten().tolist() == [0, 0.5, 0.75]
