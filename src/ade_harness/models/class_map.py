"""From a network's output channels to the data set's classes: a wrong map is the usual reason for an mIoU near zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ade_harness.config.model import NO_CLASS_NAMES
from ade_harness.data.labels import MAX_CLASSES, Classes, usual_dataset
from ade_harness.errors import HarnessError
from ade_harness.kernels.constants import constant


@dataclass(frozen=True)
class ClassMap:
    """Which channels take part in the argmax, and which class each of them is."""

    kept: tuple[int, ...] | None
    """Channels in the argmax; None keeps all."""
    class_of: tuple[int, ...]
    """0..C-1, of each kept channel."""
    note: str | None = None
    """What the user should know about it."""

    def select(self, scores: Tensor) -> Tensor:
        """Drop the channels that are left out; scores [C, h, w]."""
        return scores if self.kept is None else scores[constant(self.kept, scores.device, torch.int64)]

    def classes_of(self, channels: Tensor) -> Tensor:
        """Map an integer map of kept channels [H, W] to classes uint8 [H, W]."""
        if self.is_identity:
            return channels
        return constant(self.class_of, channels.device, torch.uint8)[channels.long()]

    @property
    def is_identity(self) -> bool:
        """Whether channel n is class n, of all channels; of fewer channels than there are classes too."""
        number = len(self.class_of)
        if self.kept is not None or number > MAX_CLASSES:
            return False
        return self.class_of == tuple(range(number))


def resolve_class_map(
    channels: int, class_map: Sequence[int | None] | None, names: Sequence[str] | None, classes: Classes
) -> ClassMap:
    """Decide what a network's channels mean.

    Args:
        channels: of the network's output.
        class_map: from the configuration: 0..C-1 or None per channel; None altogether if not set.
        names: class names that the model carries, one per channel, if it does.
        classes: of the data set.

    Raises:
        HarnessError: the channels do not fit the classes, or names say that the order is another.
    """
    if names is not None and len(names) != channels:
        return _with_note(
            resolve_class_map(channels, class_map, None, classes),
            f"the model's {len(names)} class names are not used: it outputs {channels} channels",
        )
    found = _classes_by_name(names, classes) if names is not None else None
    if names is not None and found is None and class_map is None:
        return _with_note(
            resolve_class_map(channels, class_map, None, classes),
            f"most of the model's class names are none of {classes.dataset}'s, such as {names[0]!r}, so nothing says"
            " whether its channels are in the right order",
        )
    if class_map is None:
        if channels != len(classes):
            raise HarnessError(_wrong_number(channels, found, names, classes))
        if found is not None:
            _refuse_other_order(found, names or [], classes)
        return ClassMap(None, tuple(range(channels)), _note(tuple(range(channels)), found, names, classes))
    if len(class_map) != channels:
        raise HarnessError(
            f"model.class_map has {len(class_map)} entries, but the model outputs {channels} channels:"
            f" one entry per channel ({classes.span}, or null to leave it out)."
        )
    over = next((v for v in class_map if v is not None and v >= len(classes)), None)
    if over is not None:
        raise HarnessError(f"model.class_map: {over}: {classes.dataset} has the classes {classes.span}.")
    kept = tuple(c for c, value in enumerate(class_map) if value is not None)
    class_of = tuple(value for value in class_map if value is not None)
    return ClassMap(None if len(kept) == channels else kept, class_of, _note(class_map, found, names, classes))


def refuse_other_classes(names: Sequence[str], classes: Classes, who: str) -> str | None:
    """Refuse label maps of other classes: they are numbers below the data set's, and would be counted as its own.

    Args:
        names: of the classes of whoever makes the labels, in order.
        classes: of the data set.
        who: leads the message.

    Returns:
        A remark, where most names are none of the data set's, so that nothing is known.

    Raises:
        HarnessError: there are more or fewer, or another order.
    """
    remedy = (
        "Evaluate it on its own data set, or ask for scores (model.http.returns=scores), whose channels"
        f" model.class_map can assign to the classes of {classes.dataset}."
    )
    if len(names) != len(classes):
        raise HarnessError(
            f"{who}: its labels are of {len(names)} classes ({', '.join(map(repr, names[:3]))}, ...), and"
            f" {classes.dataset} has {len(classes)}. {remedy}"
        )
    found = _classes_by_name(names, classes)
    if found is None:
        return f"{who}: most of its class names are none of {classes.dataset}'s, such as {names[0]!r}"
    other = _other_order(found, names, classes)
    if other:
        label, actual = other[0]
        raise HarnessError(
            f"{who}: its class {label} is {names[label]!r}, and {classes.dataset}'s is {classes.names[label]!r}"
            f" ({names[label]!r} is {actual}); {len(other)} classes differ. {remedy}"
        )
    return None


def _with_note(found: ClassMap, note: str) -> ClassMap:
    return replace(found, note=note if found.note is None else f"{found.note}; {note}")


def _classes_by_name(names: Sequence[str], classes: Classes) -> list[int | None] | None:
    """Return the class of each name, None where it is unknown; None unless most are the data set's.

    A class's own name wins over other classes' synonyms, and a synonym counts if one class alone has it: ADE20K calls
    both a chair and a stool "stool" somewhere.
    """
    found = [classes.find(str(n).strip().lower().split(",")[0].strip()) for n in names]
    return found if sum(f is not None for f in found) * 2 > len(names) else None


def _other_order(found: Sequence[int | None], names: Sequence[str], classes: Classes) -> list[tuple[int, int]]:
    """Return the channels whose names are those of other classes, with these; [] where that may be an accident."""
    wrong = [(c, f) for c, f in enumerate(found) if f is not None and f != c]
    if len(wrong) > len(classes) // 10:
        return wrong
    # a few names have other spellings or are shared by two classes; two that are other classes' own are no accident
    exact = [(c, f) for c, f in wrong if str(names[c]).strip().lower() == classes.names[f].strip().lower()]
    return exact if len(exact) > 1 else []


def _refuse_other_order(found: list[int | None], names: Sequence[str], classes: Classes) -> None:
    wrong = _other_order(found, names, classes)
    if wrong:
        channel, actual = wrong[0]
        raise HarnessError(
            f"The model's own names are not in the order of {classes.dataset}: channel {channel} is {names[channel]!r},"
            f" which is class {actual}, not {channel} ({classes.names[channel]!r}); {len(wrong)} channels differ."
            f" {_proposal(found, names)}"
        )


def _proposal(found: Sequence[int | None], names: Sequence[str]) -> str:
    """Return the class map that names speak for; what they leave open is the user's to say."""
    written, open_ = [], []
    for channel, (name, value) in enumerate(zip(names, found, strict=True)):
        nothing = str(name).strip().lower() in NO_CLASS_NAMES
        written.append(str(value) if value is not None else "null" if nothing else "?")
        if value is None and not nothing:
            open_.append(f"{channel} {str(name)[:40]!r}")
    text = f"By the model's own names: model.class_map=[{','.join(written)}]."
    if open_:
        more = f" and {len(open_) - 5} more" if len(open_) > 5 else ""
        text += (
            f" Put a class, or null, for each ?: no class, or more than one, has the name of channel"
            f" {', '.join(open_[:5])}{more}."
        )
    return text


def _wrong_number(channels: int, found: list[int | None] | None, names: Sequence[str] | None, classes: Classes) -> str:
    last = len(classes) - 1
    if channels == 1:
        return (
            f"The model outputs 1 channel, {classes.dataset} has {len(classes)} classes. Scores have a channel for each"
            " class (of one logit x of the second of two: torch.cat([-x, x], 1)); labels are integers [N, h, w]."
        )
    text = (
        f"The model outputs {channels} channels, {classes.dataset} has {len(classes)} classes: set model.class_map, one"
    )
    text += f" entry per channel ({classes.span}, or null for a channel that is left out of the argmax)."
    if found is not None and names is not None:
        return f"{text} {_proposal(found, names)}"
    if channels == len(classes) + 1:
        text += f" One channel more is usually 'other': null,0,1,...,{last} if it is first, 0,...,{last},null if last."
    elif usual := usual_dataset(channels):
        text += f" {channels} channels are usual for {usual}: is this the right checkpoint?"
    return text


def _note(
    class_map: Sequence[int | None], found: list[int | None] | None, names: Sequence[str] | None, classes: Classes
) -> str | None:
    missing = len(classes) - len({v for v in class_map if v is not None})
    notes = (
        [f"{missing} of the {len(classes)} classes can never be predicted with this model.class_map"] if missing else []
    )
    if found is not None and names is not None:
        wrong = [c for c, f in enumerate(found) if f is not None and class_map[c] not in (None, f)]
        if wrong:
            channel = wrong[0]
            notes.append(
                f"channel {channel} is counted as class {class_map[channel]}, the model's own name for it is"
                f" {names[channel]!r} ({len(wrong)} channels disagree)"
            )
    return "; ".join(notes) or None
