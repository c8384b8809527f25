"""What a method learns in front of a frozen CLIP: how many prompt tokens, in which blocks of which tower, tied how."""

from dataclasses import dataclass

from ..clip import ZeroShotCLIP
from ..runtime import UserError, near_miss

COUPLINGS = ("none", "text2vision", "vision2text", "fap")
POSITIONS = ("end", "middle", "front")
STARTS = ("words", "normal")


@dataclass(frozen=True)
class PromptSpec:
    """A set of prompts. `PromptSpec()` has none: it is CLIP with one hand-written template.

    n_text, depth_text: context tokens, and in how many blocks of the text tower, from the first, they stand; depth 1 is
    a context in the input alone (CoOp, Zhou et al. 2022). n_vision, depth_vision: the same of tokens that follow the
    patches. In every block after the first, a prompt's tokens are replaced, not computed on (MaPLe, Khattak et al. 2023).
    coupling: "none", each tower has its own; "text2vision", the image's are linear in the text's (MaPLe); "vision2text",
    the other way round; "fap", the image's first follow from the text's and the text's deeper ones from the image's
    (released code of FAP, Zhou et al. 2024). share_projection: one linear map a direction instead of one a block.
    class_specific: a context for each class. class_position: the class name stands at the "end" of the context, in its
    "middle" or at its "front" (CoOp).
    template: the sentence around the class name. start: the context starts as the template's first "words", the words
    left over stay; or as a "normal" draw that takes the place of all words before the name.
    pixel_pad: width in pixels of a learned frame that is added to the normalized image (AVP of TeCoA, Mao et al. 2023).
    quirk_literal_braces: as released, FAP writes the class name behind the whole template and leaves its {} in the text.
    """

    n_text: int = 0
    depth_text: int = 1
    n_vision: int = 0
    depth_vision: int = 1
    coupling: str = "none"
    share_projection: bool = False
    class_specific: bool = False
    class_position: str = "end"
    template: str = "a photo of a {}."
    start: str = "words"
    pixel_pad: int = 0
    quirk_literal_braces: bool = False

    def __post_init__(self):
        for name, low in (("n_text", 0), ("n_vision", 0), ("depth_text", 1), ("depth_vision", 1), ("pixel_pad", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise UserError(f"{name}: expected a whole number of at least {low}, got {value!r}; choose another")
        for name, known in (("coupling", COUPLINGS), ("class_position", POSITIONS), ("start", STARTS)):
            if getattr(self, name) not in known:
                raise UserError(f"unknown {name} {getattr(self, name)!r}; {near_miss(str(getattr(self, name)), known)}")
        before = self.template.split("{}")[0]
        if self.template.count("{}") != 1 or "{" in self.template.replace("{}", "") or before[-1:].strip():
            raise UserError(
                f"expected a template with one {{}}, first or after a space, got {self.template!r}; mend it"
            )
        self._check_combination()

    def _check_combination(self) -> None:
        for tower in ("text", "vision"):
            n, depth = getattr(self, f"n_{tower}"), getattr(self, f"depth_{tower}")
            if depth > 1 and not n:
                raise UserError(f"expected prompt tokens for depth_{tower}={depth}, got n_{tower}=0; set n_{tower}")
        if self.coupling != "none" and (
            not self.n_text or (self.n_text, self.depth_text) != (self.n_vision, self.depth_vision)
        ):
            raise UserError(
                f"coupling {self.coupling!r} needs as many prompts in both towers, at least 1 and in equally many blocks: "
                f"got {self.n_text} x {self.depth_text} text and {self.n_vision} x {self.depth_vision} vision; set both"
            )
        if self.share_projection and self.coupling == "none":
            raise UserError("share_projection: expected coupled prompts, got coupling 'none'; choose a coupling")
        if self.class_specific and (not self.n_text or self.depth_text > 1 or self.coupling != "none"):
            raise UserError(
                f"class_specific: expected a context in the input alone, got n_text={self.n_text}, depth_text="
                f"{self.depth_text}, coupling {self.coupling!r}; use n_text >= 1, depth_text=1 and coupling 'none'"
            )
        if self.quirk_literal_braces and (self.start != "words" or self.class_position != "end"):
            raise UserError(
                f"quirk_literal_braces: expected a start from words and the class name at the end, got start={self.start!r} "
                f"and class_position={self.class_position!r}; drop the quirk"
            )
        if self.class_position != "end" and self.depth_text > 1:
            raise UserError(
                f"class_position {self.class_position!r}: expected depth_text=1, got {self.depth_text}; deep context "
                "tokens follow the start of the text, use 'end'"
            )

    def check_towers(self, clip: ZeroShotCLIP) -> None:
        """Raises UserError, in one line, if `clip` has no room for these prompts."""
        if self.n_vision and not clip.is_vit:
            raise UserError(
                f"expected a vision transformer for visual prompts, got {clip.name}; set n_vision=0 or choose a ViT backbone"
            )
        text, vision = len(clip.model.transformer.resblocks), 0
        if clip.is_vit:
            vision = len(clip.visual.transformer.resblocks)
        if self.coupling != "none" and self.depth_text > min(text, vision):
            raise UserError(
                f"coupling {self.coupling!r}: expected prompts in at most {min(text, vision)} blocks, because {clip.name} has "
                f"{text} text and {vision} image blocks, got {self.depth_text}; lower both depths"
            )
        for tower, n, depth, blocks in (
            ("text", self.n_text, self.depth_text, text),
            ("vision", self.n_vision, self.depth_vision, vision),
        ):
            if n and depth > blocks:
                raise UserError(
                    f"depth_{tower}: expected at most {blocks}, the blocks of {clip.name}, got {depth}; lower it"
                )
        if self.pixel_pad * 2 >= clip.image_size:
            raise UserError(
                f"pixel_pad: expected less than half of the {clip.image_size} pixels of {clip.name}, got {self.pixel_pad}; "
                "choose a thinner frame"
            )
