"""The style of a chapter as functions: each takes a notebook and returns what is wrong with it, one line a finding."""

import ast
import re
import statistics

PAPER_CHAPTERS = ("04_tga_zsr", "05_capt", "06_cba_fapt", "07_a_tpt", "08_prsl")
FOUNDATIONS = ("01_clip", "02_attacks", "03_sound_evaluation", "09_side_by_side", "10_small_clip")
PAPER_BUDGET = {"code cells": (20, 26), "words": (2500, 4500), "figures": (6, 9)}
LOOK_UP = ("11_prompt_choices",)  # tables to look things up in, with what they need to be read
LOOK_UP_BUDGET = {"code cells": (10, 30), "words": (800, 2500), "figures": (4, 9)}
# A foundations chapter builds from small functions, each with its check: more cells, fewer words.
FOUNDATIONS_BUDGET = {"code cells": (20, 48), "words": (2000, 4000), "figures": (5, 9)}
MEDIAN_LINES, P90_LINES, MAX_LINES = 8, 20, 40
PARAGRAPH_WORDS, MAX_PARAMETERS, ALT_CHARACTERS = 60, 8, 15
PUBLISHED = re.compile(r"\bpublished\b|\(paper\b|\{cite", re.I)
PERCENTAGE = re.compile(r"\d+(?:\.\d+)?\s*(?:%|per\s?cent|(?:percentage )?points?\b)", re.I)
LEVEL = re.compile(
    r"\b9\d(?:\.\d)?\s*%(?=\s+(?:\w+\s+)?(?:interval|confidence|level))", re.I
)  # "95 % interval" is no result
FRACTION = re.compile(r"\b0\.\d{2,}\b")
NUMBER = r"(?:\d+(?:\.\d+)?|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)"
COUNT = re.compile(
    rf"\b{NUMBER} (?:out )?of (?:the |all )?{NUMBER} (?:claims?|verdicts?|checks?|images?|photographs?|scenes?)", re.I
)
SPEED = re.compile(rf"\b{NUMBER}(?: times|×| ×) (?:as|faster|slower|cheaper|dearer|more|less|fewer)\b", re.I)
DURATION = re.compile(rf"\b({NUMBER}) (second|minute|hour)s?\b", re.I)
MEASURED = re.compile(r"accura|robust|correct|success|overlap|\bIoU\b", re.I)


def code(nb) -> list[str]:
    return [c.source for c in nb.cells if c.cell_type == "code"]


def markdown(nb) -> list[str]:
    return [c.source for c in nb.cells if c.cell_type == "markdown"]


def tagged(nb, tag: str) -> list[str]:
    return [c.source for c in nb.cells if tag in c.metadata.get("tags", [])]


def prose(text: str) -> str:
    """Text without what is no prose: fenced code, directives' options, math, inline code and roles, link targets."""
    text = re.sub(r"^(`{3,}|~{3,}).*?^\1`*\s*$", "", text, flags=re.M | re.S)
    text = re.sub(r"\$\$.*?\$\$", "", text, flags=re.S)
    text = re.sub(r"\$[^$\n]+\$|(\{[\w:-]+\})?`[^`\n]*`", "", text)
    text = re.sub(r"^:{3,}.*$|^:[\w-]+:.*$|<!--.*?-->", "", text, flags=re.M)
    return re.sub(r"\]\([^)\s]*\)|https?://\S+", "]", text)


def blocks(text: str) -> list[str]:
    return [b for b in re.split(r"\n\s*\n", text) if b.strip()]


def _results(text: str) -> list[str]:
    text = LEVEL.sub("", prose(text))
    found = [hit for pattern in (PERCENTAGE, COUNT, SPEED) for hit in pattern.findall(text)]
    for sentence in re.split(r"(?<=[.!?])\s", text):
        found += FRACTION.findall(sentence) if MEASURED.search(sentence) else []
    return [f.strip() for f in found]


def _table_results(rows: list[list[str]]) -> list[str]:
    """Results in a table, outside the rows and columns marked as published. The header says what a cell measures."""
    header = rows[0]
    found = []
    for row in rows[1:]:
        for title, cell in zip(header, row, strict=False):
            if not PUBLISHED.search(" ".join([title, *row])):
                found += [f for f in _results(f"{cell} ({title})") if f.split()[0] in cell]
    return found


def typed_numbers(text: str) -> list[str]:
    """Percentages, accuracies, counts and speed-ups that somebody typed, outside what is marked as published or cited."""
    found = []
    for block in blocks(re.sub(r"^(`{3,}).*?^\1\s*$", "", text, flags=re.M | re.S)):
        lines = block.strip().splitlines()
        if all(line.lstrip().startswith("|") for line in lines):
            found += _table_results(
                [[c.strip() for c in re.split(r"(?<!\\)\|", line.strip().strip("|"))] for line in lines]
            )
        elif not PUBLISHED.search(block):
            found += _results(block)
    return [
        f"typed result {f!r}: glue it from a card, or mark the paragraph, row or column as published" for f in found
    ]


def typed_times(text: str, minutes: dict[str, set[int]]) -> list[str]:
    """Durations in a text, unless their paragraph or row names a chapter and a profile of it takes that long.

    minutes: chapter -> minutes of its profiles, from profiles.yml, which a test holds to the cards.
    """
    found = []
    for line in _sentences_and_rows(text):
        known = {str(m) for name, known in minutes.items() if name in line for m in known}
        found += [
            f"typed duration {hit.group()!r}: leave it to the status page, or to the line of a chapter of profiles.yml"
            for hit in DURATION.finditer(line)
            if hit[1] not in known or hit[2].lower() != "minute"
        ]
    return found


def _sentences_and_rows(text: str) -> list[str]:
    """Paragraphs in one line each and rows of tables, outside fenced code."""
    kept = blocks(re.sub(r"^(`{3,}|~{3,}).*?^\1`*\s*$", "", text, flags=re.M | re.S))
    return [line for b in kept for line in (b.splitlines() if b.lstrip().startswith("|") else [" ".join(b.split())])]


def long_paragraphs(text: str) -> list[str]:
    found = []
    for block in blocks(prose(text)):
        if re.match(r"\s*[|#<]", block):
            continue
        for item in re.split(r"^\s*(?:[-*]|\d+\.)\s", block, flags=re.M):
            if (n := len(item.split())) > PARAGRAPH_WORDS:
                found.append(f"{n} words in one paragraph, at most {PARAGRAPH_WORDS}: {' '.join(item.split()[:6])} …")
    return found


def british(text: str) -> list[str]:
    return [
        f"{w!r}: American spelling"
        for w in re.findall(r"\bdefences?\b|\bcolours?\b|\bnormalisation\b", prose(text), re.I)
    ]


def cell_lines(nb) -> list[str]:
    """Length of code cells in lines that are not blank."""
    lengths = [sum(bool(line.strip()) for line in source.splitlines()) for source in code(nb)]
    if not lengths:
        return ["no code cell"]
    found = [f"a code cell of {n} lines, at most {MAX_LINES}" for n in lengths if n > MAX_LINES]
    p90 = sorted(lengths)[max(0, -(-9 * len(lengths) // 10) - 1)]
    if (median := statistics.median(lengths)) > MEDIAN_LINES:
        found.append(f"median code cell of {median:g} lines, at most {MEDIAN_LINES}")
    return found + ([f"90th percentile of code cells is {p90} lines, at most {P90_LINES}"] if p90 > P90_LINES else [])


def budgets(nb, budget=PAPER_BUDGET) -> list[str]:
    """Size of a chapter against its kind's budget."""
    words = sum(len(prose(text).split()) for text in markdown(nb))
    sizes = {"code cells": len(code(nb)), "words": words, "figures": len(_shows(nb))}
    return [
        f"{sizes[what]} {what}, between {low} and {high} wanted"
        for what, (low, high) in budget.items()
        if not low <= sizes[what] <= high
    ]


def _calls(source: str) -> list[ast.Call]:
    plain = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines())
    return [node for node in ast.walk(ast.parse(plain)) if isinstance(node, ast.Call)]


def _name(call: ast.Call) -> str:
    return ast.unparse(call.func)


def _shows(nb) -> list[ast.Call]:
    return [call for source in code(nb) for call in _calls(source) if _name(call) in ("book.show", "show")]


def figures(nb) -> list[str]:
    """Every figure goes through book.show with an alternative text and a caption; pictures in the text have a text too."""
    found = []
    for call in _shows(nb):
        given = {k.arg: k.value for k in call.keywords}
        for field in ("alt", "caption"):
            value = given.get(field)
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                if len(value.value.strip()) < ALT_CHARACTERS:
                    found.append(f"{field} {value.value!r} says too little")
            elif not isinstance(value, ast.JoinedStr):
                found.append(f"{ast.unparse(call)[:60]}: {field}= must be written at the call")
    for source in code(nb):
        found += [
            f"{_name(c)}(): use book.show(fig, name, alt=..., caption=...)"
            for c in _calls(source)
            if re.search(r"(?<!book)\.show$", _name(c))
        ]
    return found + [problem for text in markdown(nb) for problem in pictures(text)]


def pictures(text: str) -> list[str]:
    """Pictures of a text, in any of its forms, without an alternative text."""
    found = [f"{image}: no alternative text" for image in re.findall(r"!\[\s*\]\([^)]*\)", text)]
    found += [f"{image}: no alternative text" for image in re.findall(r"<img(?![^>]*\balt=[\"'][^\"'])[^>]*>", text)]
    for directive in re.findall(r"(?:`{3,}|:{3,})\{(?:figure|image)\}.*?(?:`{3,}|:{3,})", text, flags=re.S):
        found += [] if re.search(r":alt:\s*\S", directive) else [f"{directive.splitlines()[0]}: no :alt:"]
    return found


def badges(nb, stem: str, repository: str) -> list[str]:
    """A kernel is named, else the book shows no Colab button; the first cell has the title and the badge row."""
    if nb.metadata.get("kernelspec", {}).get("name") != "python3":
        return ["the head of the .py names no kernelspec python3"]
    first = nb.cells[0]
    if first.cell_type != "markdown" or not first.source.startswith("# "):
        return ["the first cell is no title"]
    slug = repository.removeprefix("https://github.com/")
    wanted = {
        "Colab": re.escape(f"https://colab.research.google.com/github/{slug}/blob/main/notebooks/{stem}.ipynb"),
        "source": re.escape(f"{repository}/blob/main/notebooks/{stem}.py"),
        "result card": re.escape(f"{repository}/") + r"\S+book/cards",
        "time on a CPU": r"\bCPU\b",
    }
    wanted |= (
        {"paper": r"https://(arxiv\.org|doi\.org|openreview\.net|proceedings\.)"} if stem in PAPER_CHAPTERS else {}
    )
    return [f"badge row: no {what}" for what, pattern in wanted.items() if not re.search(pattern, first.source)]


def footer(nb) -> list[str]:
    """The last code cell prints the provenance."""
    cells = code(nb)
    ends = bool(cells) and any(_name(call) in ("book.footer", "footer") for call in _calls(cells[-1]))
    return [] if ends else ["the last code cell does not call book.footer(...)"]


def parameters(nb) -> list[str]:
    """One parameters cell: at most eight names, each with a comment."""
    cells = tagged(nb, "parameters")
    if len(cells) != 1:
        return [f"{len(cells)} cells tagged parameters, expected one"]
    lines = [line for line in cells[0].splitlines() if re.match(r"\w+\s*(:[^=]+)?=", line)]
    found = [f"{len(lines)} parameters, at most {MAX_PARAMETERS}"] if len(lines) > MAX_PARAMETERS else []
    return found + [f"parameter without a comment: {line}" for line in lines if "#" not in line]


def empty_checked_cells(nb) -> list[str]:
    """nbval compares tagged cells with their saved output, and passes one that has none."""
    cells = [c for c in nb.cells if "nbval-check-output" in c.metadata.get("tags", [])]
    return [
        f"tagged nbval-check-output but no output is saved: {c.source.splitlines()[0]}"
        for c in cells
        if not c.get("outputs")
    ]
