"""Learn the small byte-pair vocabulary of the bundled CLIPs from the project's own captions.

    python data_scripts/learn_bpe.py --data-root DIR

Writes robustvlm_lite/assets/clip/bpe.txt.gz in the format of CLIP's own merges file, so that open_clip's
tokenizer class reads it. Common words become one token; rarer class names are two or three.
"""

import argparse
import collections
import gzip
import io
import json
from pathlib import Path

import regex

from robustvlm_lite import scenes
from robustvlm_lite.data import PACKS
from robustvlm_lite.runtime import asset

WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")  # as in CLIP's tokenizer
# Words that readers will put into prompts of their own; class names and templates bring the rest.
EVERYDAY = (
    "not is are was this that there it its of on in at by with and or the an one two three four five many few no what which color shape "
    "how where image picture photo background object objects animal plant vehicle building thing close up black gray dark bright good bad "
    "low resolution jpeg corrupted clean cropped rendering toy tattoo painting drawing art sketch cartoon texture surface type kind food "
    "pet dog cat bird fish flower tree car truck person man woman child face hand head wild old new young big"
).split()


def words(data_root: Path) -> collections.Counter:
    """Word counts: templates often, each class name once."""
    count = collections.Counter({w: 20 for w in EVERYDAY})
    for name, pack in PACKS.items():
        for template in pack.templates:
            count.update({w: 50 for w in WORD.findall(template.replace("{}", "").lower())})
        group, short = name.split("/")
        folder = data_root / short if group == "small" else asset("photos", short)
        description = json.loads((folder / "classes.json").read_text())
        for text in description["names"] + description.get("superclasses", []):
            count.update(WORD.findall(text.lower()))
    for text in scenes.caption_vocabulary():
        count.update({w: 50 for w in set(WORD.findall(text.lower()))})
    return count


def learn(count: collections.Counter, n_merges: int) -> list[tuple[str, str]]:
    """Greedy byte-pair merges (Sennrich et al. 2016), ties broken by spelling."""
    pieces = {w: (*w[:-1], w[-1] + "</w>") for w in count}
    merges = []
    while len(merges) < n_merges:
        pairs = collections.Counter()
        for w, p in pieces.items():
            for pair in zip(p, p[1:], strict=False):
                pairs[pair] += count[w]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for w, p in pieces.items():
            merged, i = [], 0
            while i < len(p):
                if p[i : i + 2] == best:
                    merged.append(p[i] + p[i + 1])
                    i += 2
                else:
                    merged.append(p[i])
                    i += 1
            pieces[w] = tuple(merged)
    single = sum(len(p) == 1 for p in pieces.values())
    print(
        f"{len(merges)} merges: {single} of {len(pieces)} words are one token, the longest has {max(map(len, pieces.values()))}"
    )
    return merges


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, help="folder that holds caltech101/, cifar10/, …")
    parser.add_argument("--merges", type=int, default=2000)
    args = parser.parse_args()
    merges = learn(words(args.data_root), args.merges)
    text = "\n".join(["#robustvlm_lite: learned from the book's captions", *(" ".join(m) for m in merges)])
    asset("clip").mkdir(parents=True, exist_ok=True)
    packed = io.BytesIO()
    with gzip.GzipFile(
        fileobj=packed, mode="wb", mtime=0
    ) as f:  # no trailing newline: the reader would take it for a merge
        f.write(text.encode())
    asset("clip", "bpe.txt.gz").write_bytes(packed.getvalue())


if __name__ == "__main__":
    main()
