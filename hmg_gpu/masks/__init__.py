"""HMG Sec. 3: points to masks, and masks corrected by a network's predictions.

pmg.py and update.py are the paper's two steps as functions on tensors. A *maker* makes the initial masks of a set, a
*rule* corrects them: each is a small frozen dataclass, and every command and MaskUpdater take every one of them. To add
one, write a file in makers/ or rules/ and a line in one of these two dicts.
"""

from __future__ import annotations

from typing import Any

from hmg_gpu.common.errors import InputError
from hmg_gpu.masks.makers.by_hand import ByHand
from hmg_gpu.masks.makers.com import Com
from hmg_gpu.masks.makers.folder import Folder
from hmg_gpu.masks.makers.learned import Learned
from hmg_gpu.masks.makers.lelcm import Lelcm as LelcmMaker
from hmg_gpu.masks.makers.maker import Maker
from hmg_gpu.masks.makers.mclc import Mclc, P2bMclc
from hmg_gpu.masks.makers.pal import Pal as PalMaker
from hmg_gpu.masks.makers.pmg import Pmg
from hmg_gpu.masks.makers.points import Points
from hmg_gpu.masks.makers.sam import Sam
from hmg_gpu.masks.rules.evolving import to_masks
from hmg_gpu.masks.rules.lelcm import Lelcm
from hmg_gpu.masks.rules.lesps import Lesps
from hmg_gpu.masks.rules.pal import Pal
from hmg_gpu.masks.rules.rule import Evidence, Rule, State
from hmg_gpu.masks.rules.soft import Soft
from hmg_gpu.masks.rules.union import Union

MAKERS: dict[str, type[Maker]] = {
    "pmg": Pmg,  # the paper's (Sec. 3.1)
    "learned": Learned,  # by a student that learns from PMG's masks
    "folder": Folder,  # of any system, read from files
    "points": Points,  # the points themselves, where LESPS starts from
    "pal": PalMaker,  # closed edges, where PAL starts from
    "lelcm": LelcmMaker,  # LELCM's first labels
    "com": Com,  # COM's level set
    "sam": Sam,  # Segment Anything, prompted by the points
    "mclc": Mclc,  # clustering under noise (ICCV 2023)
    "p2b-mclc": P2bMclc,  # the same in P2B's boxes
}
RULES: dict[str, type[Rule]] = {
    "union": Union,  # the paper's: FAF, then MDR (Sec. 3.2)
    "soft": Soft,  # by the probabilities of both
    "lesps": Lesps,  # label evolution of LESPS
    "pal": Pal,  # of PAL, with images that wait
    "lelcm": Lelcm,  # of LELCM, by local contrast
}
MASKS_HELP = (
    "pmg; learned: by a student taught by PMG; learned:FILE: trained before; folder:PATH: any NAME.png; points: one "
    "pixel each; mclc, p2b-mclc: clustering; pal: closed edges; lelcm: LELCM's first labels; com: COM's level set; "
    "sam:PATH: SAM's weights in a folder"
)
AUTO = "auto"  # the rule that suits the maker
RULES_HELP = (
    "how predictions correct the masks: union (the paper); soft: by probabilities; lesps, pal, lelcm: labels that "
    "evolve, which wants many updates; auto: soft over learned masks, else union"
)

__all__ = [
    "AUTO",
    "MAKERS",
    "MASKS_HELP",
    "RULES",
    "RULES_HELP",
    "ByHand",
    "Com",
    "Evidence",
    "Folder",
    "Learned",
    "Lelcm",
    "LelcmMaker",
    "Lesps",
    "Maker",
    "Mclc",
    "P2bMclc",
    "Pal",
    "PalMaker",
    "Pmg",
    "Points",
    "Rule",
    "Sam",
    "Soft",
    "State",
    "Union",
    "make_maker",
    "make_rule",
    "to_masks",
]


def make_maker(text: str | Maker, **given: Any) -> Maker:
    """A maker from its name, as ``--masks`` takes it.

    Args:
        text: NAME, or NAME:ARGUMENT such as ``learned:student.safetensors``, ``folder:masks_com``,
            ``pmg:extent=10,alpha=0.2``; or a maker, which comes back as it is.
        given: values for fields of the maker, as far as it has them: ``pmg``, ``seed``, ``extent`` ...

    Raises:
        InputError: no such maker, or not with this argument.

    Example:
        >>> make_maker("pmg:extent=10")
        Pmg(extent=10, half_width=4, alpha=0.15, directional=True)
    """
    if isinstance(text, Maker):
        return text
    name, _, argument = text.partition(":")
    if name not in MAKERS:
        raise InputError(f"masks {text!r}: expected one of {', '.join(MAKERS)}, or NAME:ARGUMENT")
    pmg = given.get("pmg")
    if isinstance(pmg, Pmg):
        given = {key: getattr(pmg, key) for key in pmg.settings()} | given
    return MAKERS[name].from_text(argument, **given)


def make_rule(text: str | Rule, *, radius: int = 30, maker: Maker | None = None) -> Rule:
    """A rule from its name, as ``--rule`` takes it; a rule comes back as it is.

    Args:
        radius: r of FAF in pixels.
        maker: of the masks that it corrects; "auto" is the rule that suits them.

    Raises:
        InputError: no such rule, or a setting out of its range.

    Example:
        >>> make_rule("union", radius=20)
        Union(radius=20)
        >>> make_rule("auto", maker=make_maker("learned")).name
        'soft'
    """
    if isinstance(text, Rule):
        return text
    if text == AUTO:
        text = Maker.rule if maker is None else maker.rule
    if text not in RULES:
        raise InputError(f"rule {text!r}: expected one of {', '.join((AUTO, *RULES))}")
    return RULES[text](radius=radius)
