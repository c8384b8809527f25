"""Tables escape what came from data and tell the truth: n, intervals, bold only where it is sure, verdicts by rule."""

import re
from types import SimpleNamespace

import pytest
from toy_run import CHAPTER, filled, row

from robustvlm_lite import book
from robustvlm_lite.cards import load_card
from robustvlm_lite.runtime import UserError
from robustvlm_lite.stats import wilson


def cells(html, line):
    """Texts of one line of a table; 0 is the head."""
    return [re.sub("<[^>]+>", "", c) for c in re.findall(r"<t[hd].*?</t[hd]>", re.findall("<tr>.*?</tr>", html)[line])]


def test_table_escapes_and_formats():
    html = book.table(
        [{"name": "<script>", "n": 12345, "value": 0.12345, "loss": -1.5}, {"name": "b", "n": 1, "ok": True}],
        caption="a < b",
        published=["value"],
        best=[(0, "n")],
        formats={"value": ".1f"},
    )
    assert "<script>" not in html and "&lt;script&gt;" in html and "a &lt; b" in html
    assert cells(html, 0) == ["name", "n", "value", "loss", "ok"]
    assert cells(html, 1) == ["&lt;script&gt;", "12,345", "0.1", "−1.50", "–"] and cells(html, 2)[-1] == "yes"
    assert '<th scope="col" class="published">value' in html and '<td class="published num">0.1</td>' in html
    assert '<td class="best num"><strong>12,345</strong></td>' in html and html.count("<strong>") == 1
    assert isinstance(book.table([{"a": float("nan")}], caption="c"), book.Html)


def test_numbers_of_a_column_share_their_decimals():
    html = book.table([{"a": 4.9, "b": 0.0, "c": 1234.5}, {"a": 64.42, "b": 0.0123, "c": 2}], caption="c")
    assert cells(html, 1) == ["4.9", "0.0000", "1,234"] and cells(html, 2) == ["64.4", "0.0123", "2"]
    assert cells(book.table([{"a": 0.0}], caption="c"), 1) == ["0.0"]


def test_table_refuses():
    with pytest.raises(UserError, match="at most 7 columns, got 8"):
        book.table([{str(i): i for i in range(8)}], caption="wide")
    with pytest.raises(UserError, match="no row"):
        book.table([], caption="empty")
    with pytest.raises(UserError, match="got 'b'"):
        book.table([{"a": 1}], caption="c", published=["b"])


COLUMNS = {"clean": {"attack": "none"}, "PGD": {"attack": "pgd-20", "eps_255": 1.0}}


def accuracies(first, second):
    clean = [row(m, [1, 1, 1, 0] * 5, attack="none", eps_255=0.0, metric="clean_acc") for m in ("CLIP", "TeCoA")]
    return [*clean, row("CLIP", first), row("TeCoA", second)]


def test_accuracy_table_gives_interval_n_and_attack():
    html = book.accuracy_table(accuracies([0] * 20, [1] * 10 + [0] * 10), columns=COLUMNS, caption="Seen.")
    low, high = wilson(10, 20)
    assert cells(html, 0) == ["method", "clean", "PGD"]
    assert cells(html, 2) == ["TeCoA", cells(html, 1)[1], f"50.0\u00a0({100 * low:.1f}\u2060–\u2060{100 * high:.1f})"]
    caption = re.search("<figcaption>(.*?)</figcaption>", html)[1]
    for part in ("Seen. n = 20", "pgd-20 at ε = 1/255 (20 steps of 0.25 ε)", 'href="#rvl-card"'):
        assert part in caption


def test_ensembles_name_their_parts():
    ensemble = row("CLIP", [1, 0] * 10, attack="autoattack-10", components=["apgd-ce-10", "square-500"])
    worst = row("CLIP", [1, 0] * 10, attack="worst", metric="robust_acc_worst", attacks=["pgd-20", "cw-20"])
    columns = {"AA": {"attack": "autoattack-10"}, "worst": {"attack": "worst"}}
    html = book.accuracy_table([ensemble, worst], columns=columns, caption="c")
    assert "autoattack-10 at ε = 1/255 (apgd-ce-10, then square-500)" in html
    assert "worst at ε = 1/255 (per image the strongest of pgd-20, cw-20)" in html


def test_bold_only_where_the_paired_interval_excludes_zero():
    clear = book.accuracy_table(accuracies([0] * 20, [1] * 10 + [0] * 10), columns=COLUMNS, caption="c")
    assert re.findall("<strong>(.*?)</strong>", clear) == [cells(clear, 2)[2]]  # clean is a tie
    close = book.accuracy_table(accuracies([0] * 11 + [1] * 9, [1] * 10 + [0] * 10), columns=COLUMNS, caption="c")
    assert "<strong>" not in close


def test_published_numbers_stand_apart_in_gray():
    html = book.accuracy_table(
        accuracies([0] * 20, [1] * 20), columns=COLUMNS, caption="c", published={"paper, PGD-100": {"TeCoA": 28.06}}
    )
    assert cells(html, 1)[3] == "–" and cells(html, 2)[3] == "28.1" and '<td class="published num">28.1</td>' in html


def test_accuracy_table_refuses_an_ambiguous_or_empty_column():
    rows = [*accuracies([0] * 20, [1] * 20), row("CLIP", [1] * 20, metric="robust_acc_8bit")]
    with pytest.raises(UserError, match="column 'PGD': 2 rows of CLIP fit .*robust_acc_8bit"):
        book.accuracy_table(rows, columns=COLUMNS, caption="c")
    with pytest.raises(UserError, match="no row fits"):
        book.accuracy_table(rows, columns={"x": {"attack": "square"}}, caption="c")


def test_claims_table_with_and_without_a_verdict(begin, claims):
    before = book.claims_table(CHAPTER)
    assert cells(before, 0) == ["claim", "what the paper states", "where", "published"]
    assert cells(before, 1) == ["TGA-C1", "TeCoA &lt;beats&gt; CLIP &amp; more", "Table 1", "+23.16"]
    assert 'class="rvl-table claims"' in before and 'class="published"' in before
    run = filled(begin(eps_255=1.0))
    live = book.claims_table(CHAPTER, run.card)
    assert (
        '<span class="verdict verdict-reproduced">reproduced</span>' in live
        and "points" in cells(live, 1)[5]
        and cells(live, 0)[1] == "verdict"
    )
    read = book.claims_table(CHAPTER, load_card(run.finish()))
    assert "examples of a tiny run" in read and cells(read, 1) == cells(live, 1)
    nothing = book.claims_table(CHAPTER, begin().card)
    assert "verdict-not_tested" in nothing and cells(nothing, 1)[1] == "not tested"


def test_claims_table_of_an_unknown_chapter(claims):
    with pytest.raises(UserError, match="expected claims of chapter"):
        book.claims_table("05_capt")


def test_sanity_table_shows_failures_in_words():
    checks = [SimpleNamespace(name="gradient", passed=True, value="0.4", why="It flows.")]
    checks += [SimpleNamespace(name="<large ε>", passed=False, value="12 %", why="It stays above chance.")]
    html = book.sanity_table(checks)
    assert "1 of 2 checks hold" in html and cells(html, 2)[:3] == ["&lt;large ε&gt;", "✗ fails", "12 %"]
    assert '<span class="failed">' in html and '<span class="passed">' in html


def test_a_difference_in_words_follows_its_interval():
    told = [book.compared(diff) for diff in ((0.1, 0.02, 0.2), (-0.1, -0.2, -0.01), (0.1, 0.0, 0.2), (0.0, -0.1, 0.1))]
    assert told == ["more than", "less than", "not measurably more or less than", "not measurably more or less than"]


def test_rates_table_shows_every_rate_and_no_weights():
    runs = [
        {"method": "TeCoA", "lr": 5e-4, "clean": 0.8, "robust": 0.5},
        {"method": "TeCoA", "lr": 1e-3, "clean": 0.7, "robust": 0.4},
        {"method": "FARE", "lr": 1e-3, "clean": 0.9, "robust": 0.3},
        {"method": "TGA-ZSR", "lr": 5e-4, "alpha": 0.0, "beta": 0.0, "clean": 0.1, "robust": 0.1},
    ]
    html = book.rates_table({"runs": runs, "n": 600})
    assert cells(html, 0) == ["method", "rate 0.0005", "rate 0.001"]
    assert cells(html, 1) == ["TeCoA", "80.0\u00a0/\u00a050.0", "70.0\u00a0/\u00a040.0"]
    assert cells(html, 2)[2] == "90.0\u00a0/\u00a030.0" and "n = 600" in html and "TGA-ZSR" not in html


def test_sets_table_puts_chance_beside_each_accuracy():
    rows = [row("CLIP", [1] * 15 + [0] * 5, attack="none", eps_255=0.0, metric="clean_acc")]
    html = book.sets_table(rows, {"toy/gray": 8}, caption="Known.")
    low, high = (100 * v for v in wilson(15, 20))
    assert cells(html, 1) == ["toy/gray", "8", "20", "12.5", f"75.0\u00a0({low:.1f}\u2060–\u2060{high:.1f})"]


def test_sets_table_has_a_column_for_each_budget():
    made = [row("CLIP", [1] * 15 + [0] * 5, attack="none", eps_255=0.0, metric="clean_acc")]
    made += [row("CLIP", [1] * k + [0] * (20 - k), eps_255=eps) for eps, k in ((1.0, 10), (2.5, 0))]
    html = book.sets_table(made, {"toy/gray": 8}, caption="Left.")
    assert cells(html, 0) == ["data set", "classes", "images", "chance", "clean", "ε = 1/255", "ε = 2.5/255"]
    assert [cell.split("\u00a0")[0] for cell in cells(html, 1)[3:]] == ["12.5", "75.0", "50.0", "0.0"]
    assert "pgd-20 at ε = 1, 2.5/255 (20 steps of 0.25 ε)" in html


def test_paired_table_compares_with_the_first_line():
    right, half = (
        row(m, c, attack="none", eps_255=0.0, metric="clean_acc")
        for m, c in (("as intended", [1] * 20), ("wrong", [1, 0] * 10))
    )
    html = book.paired_table([right, half], right, caption="Mistakes.")
    assert cells(html, 1)[2] == "–" and cells(html, 2)[0] == "wrong"
    assert re.fullmatch(r"−50.0\u00a0\(−\d\d.\d to −\d\d.\d\)", cells(html, 2)[2]) and "n = 20" in html


def test_paired_table_by_attack_with_more_columns():
    weak, strong = row("CLIP", [1] * 20, attack="pgd-20"), row("CLIP", [1, 0] * 10, attack="worst")
    html = book.paired_table([weak, strong], weak, by="attack", more={"steps": lambda r: r.extra["n_steps"]}, caption="c")
    assert cells(html, 0) == ["attack", "accuracy", "points", "steps"]
    assert cells(html, 1)[::3] == ["pgd-20", "20"] and cells(html, 2)[0] == "worst"
    assert "paired difference to pgd-20" in html


def test_points_are_percent_with_true_minus_signs():
    assert book.points((0.123, -0.0456, 0.3)) == "+12.3\u00a0(−4.6 to +30.0)"


def test_provenance_names_each_hash_once():
    parts = {"CLIP": "a" * 64, "logits × 4": "a" * 64, "logits × 16": "a" * 64, "TeCoA <1>": "b" * 64, "file": "f" * 64}
    whole = {name: "0" * 12 for name in ("commit", "package", "torch", "device", "data_sha256", "code_sha256", "started")}
    stamp = whole | {"dirty": False, "wall_s": 1.0, "weights_sha256": "f" * 64, "weights": parts}
    card = {"chapter": "x", "profile": "tiny", "provenance": stamp}
    html = str(book.tables.provenance_table(card, out="runs", command="robustvlm run x"))
    weights = re.sub(r"<[^>]+>", "", html.split("weights", 1)[1].split("</tr>")[0])
    assert weights == f"{'f' * 12}, CLIP and 2 more {'a' * 12}, TeCoA &lt;1&gt; {'b' * 12}"
    assert html.count("a" * 64) == 1, "the whole hash on hover"
