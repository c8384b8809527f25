"""The sentences of a class list as token ids, with places kept free for the context."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..clip import ZeroShotCLIP
from ..runtime import UserError
from .spec import PromptSpec


class ClassWords(nn.Module):
    """Token ids of one sentence a class; they move with the model and are no part of its state.

    ids [C, L]: start, context, class name, end; 0 behind the end, cut to the longest sentence (a causal text tower never
    looks further). slots [C, n_text]: where the context tokens stand. end [C]: position of the end token. shared: how many
    leading positions are the same for all classes, at least 1 and never the end.
    """

    def __init__(self, ids: Tensor, slots: Tensor, end: Tensor, shared: int):
        super().__init__()
        self.shared = shared
        for name, value in (("ids", ids), ("slots", slots), ("end", end)):
            self.register_buffer(name, value, persistent=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def content(self) -> Tensor:
        """[C, L] bool: context and class name, without start, end and what lies behind."""
        positions = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (positions > 0) & (positions < self.end[:, None])


def class_words(clip: ZeroShotCLIP, spec: PromptSpec, class_names: Sequence[str]) -> ClassWords:
    """Tokenizes `class_names`. Raises UserError for an empty list, a blank name or a sentence beyond CLIP's context."""
    if not class_names or isinstance(class_names, str) or not all(name.strip() for name in class_names):
        raise UserError(f"expected a list of class names, got {class_names!r}; give each class a name")
    context, behind = context_ids(clip, spec), _sentence(spec)[1]
    cut = {"end": len(context), "middle": len(context) // 2, "front": 0}[spec.class_position]
    encode, start, stop = clip.tokenizer.encode, clip.tokenizer.sot_token_id, clip.tokenizer.eot_token_id
    rows, slots = [], []
    for name in class_names:
        if spec.class_position == "end":  # name and what follows in one go, as the tokenizer reads a whole sentence
            named, rest = encode(name + behind), []
        else:
            named, rest = encode(name), encode(behind)
        rows.append([start, *context[:cut], *named, *context[cut:], *rest, stop])
        slots.append([1 + i + (len(named) if i >= cut else 0) for i in range(spec.n_text)])
        if len(rows[-1]) > clip.model.context_length:
            raise UserError(
                f"expected at most {clip.model.context_length} tokens, start and end included, got {len(rows[-1])} for class "
                f"{name!r}; shorten the name, the template or n_text"
            )
    end = torch.tensor([len(row) - 1 for row in rows])
    ids = torch.zeros(len(rows), int(end.max()) + 1, dtype=torch.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    same = int((ids == ids[0]).all(dim=0).int().cumprod(0).sum())
    alike = spec.class_position == "end" and not spec.class_specific  # else the contexts differ or lie elsewhere
    shared = min(same, int(end.min())) if alike else 1
    return ClassWords(ids, torch.tensor(slots, dtype=torch.int64), end, shared).to(clip.device)


def context_ids(clip: ZeroShotCLIP, spec: PromptSpec) -> list[int]:
    """Token ids of what stands beside the class name; the first n_text of them make room for learned tokens."""
    before = _sentence(spec)[0]
    words = clip.tokenizer.encode(before)
    if not spec.n_text:
        return words
    if spec.start == "normal":
        return [0] * spec.n_text
    if len(words) < spec.n_text:
        raise UserError(
            f"expected at least n_text={spec.n_text} tokens to start from before the class name, got {len(words)} in "
            f"{before!r}; use start='normal' or a longer template"
        )
    return words


def _sentence(spec: PromptSpec) -> tuple[str, str]:
    """What stands before and behind the class name."""
    if spec.quirk_literal_braces:
        return spec.template + " ", "."
    return tuple(spec.template.split("{}"))
