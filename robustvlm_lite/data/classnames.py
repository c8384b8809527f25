"""From a data set's own class keys to the names that stand in prompts."""

import re
from collections.abc import Sequence
from pathlib import Path

from ..runtime import UserError
from .registry import Dataset, Use


def plain(key: str) -> str:
    """Lower case, with spaces for `_`, `-` and `/`."""
    return re.sub(r"[_/-]+", " ", key).strip().lower()


def boeing(key: str) -> str:
    """Aircraft whose variant begins with 7 are Boeing's: "737-700" becomes "boeing 737 700"."""
    return plain(f"Boeing {key}" if key.startswith("7") else key)


def no_year(key: str) -> str:
    """ "Audi TT Hatchback 2011" becomes "audi tt hatchback"."""
    return plain(re.sub(r" \d{4}$", "", key))


def numbered(key: str) -> str:
    """Caltech-256 numbers its folders and marks the classes of Caltech-101: "251.airplanes-101" becomes "airplanes"."""
    return plain(re.sub(r"^\d+\.|-101$", "", key))


def wordnet_ids(keys: Sequence[str]) -> list[str]:
    """WordNet ids of ImageNet's classes, whose keys are the ids, labels (the folders of ImageNet-V2) or all descriptions.

    A list of 1,000 descriptions counts as ImageNet-1k's in label order if nearly all agree: copies spell a few differently,
    such as the second of its two cranes.
    """
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    ids, descriptions = info.label_names(), info.label_descriptions()
    if len(keys) == len(ids):
        agree = sum(_same(key) == _same(text) for key, text in zip(keys, descriptions, strict=True))
        if agree >= 0.98 * len(ids):
            return ids
    return [ids[int(key)] if key.isdigit() else key for key in keys]


def lemmas(keys: Sequence[str]) -> list[str]:
    """The first WordNet lemma of each class, as in "tench" for n01440764."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return [plain(info.label_name_to_description(wnid).split(",")[0]) for wnid in wordnet_ids(keys)]


def cleaned(keys: Sequence[str]) -> list[str]:
    """ImageNet's names as OpenAI cleaned them."""
    from timm.data import ImageNetInfo

    from ..clip import imagenet_names

    names = dict(zip(ImageNetInfo().label_names(), imagenet_names(), strict=True))
    return [names[wnid] for wnid in wordnet_ids(keys)]


RULES = {
    "": lambda keys: [plain(key) for key in keys],
    "as_is": list,
    "boeing": lambda keys: [boeing(key) for key in keys],
    "no_year": lambda keys: [no_year(key) for key in keys],
    "numbered": lambda keys: [numbered(key) for key in keys],
    "lemma": lemmas,
    "cleaned": cleaned,
}


def prompt_names(dataset: Dataset, use: Use, keys: Sequence[str], where: Path, named: bool = False) -> tuple[str, ...]:
    """Prompt names [C] of the data's own `keys` [C], in their order; no keys: the registry's list by position.

    named: the keys are prompt names already.

    Raises UserError for a class list of another length, and for a class that the registry does not know.
    """
    keys = keys or tuple(dataset.names)
    if len(keys) != use.classes:
        raise UserError(
            f"expected {use.classes} classes of {dataset.title}, got {len(keys)} in {where}; fetch the files again"
        )
    if named:
        return tuple(keys)
    if dataset.names:
        known = {_same(key): name for key, name in dataset.names.items()}
        unknown = [key for key in keys if _same(key) not in known]
        if unknown:
            raise UserError(f"expected the classes of {dataset.title}, got {unknown[0]!r} in {where}; fetch it again")
        return tuple(known[_same(key)] for key in keys)
    try:
        return tuple(RULES[use.naming](keys))
    except (KeyError, IndexError) as error:
        raise UserError(
            f"expected ImageNet's WordNet ids as classes, got {error} in {where}; name the folders by them"
        ) from None


def _same(key: str) -> str:
    """What two spellings of one class share: "Apple_pie" and "apple pie"."""
    return re.sub(r"[^a-z0-9]", "", key.lower())
