"""Which of several options counts, and which have no effect, by the conditions that the options declare.

A condition is the name of an option, which holds if that option is on, or `name=value`. The fields of `Spec` that have
conditions are `only_with`, `not_with`, `wins_over` and `excludes`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from library.config.options import Option, all_options, flag_values, format_default
from library.config.values import written
from library.errors import shortened

logger = logging.getLogger(__name__)

Values = Mapping[str, Any]  # flag -> value; of options that the dataset file has, a list of all their values


def nearer_wins(
    nearer: Values, farther: Values, options: Mapping[str, Option], *, near: str, far: str
) -> dict[str, Any]:
    """Return flag -> value of two places; those of the nearer win, also over options that exclude them.

    near and far name the places, such as the command line and a file, in the log line about an excluded option.
    """
    kept = dict(farther)
    for flag in [flag for flag in farther if flag not in nearer and is_on(farther, flag)]:
        rivals = [other for other in nearer if _are_rivals(options[flag], options[other]) and is_on(nearer, other)]
        if rivals:
            used, unused = (given_as(options[name], nearer.get(name, kept.get(name))) for name in (rivals[0], flag))
            logger.info("%s of %s is used, not %s of %s", used, near, unused, far)
            del kept[flag]
    return kept | dict(nearer)


def _are_rivals(one: Option, other: Option) -> bool:
    return any(
        second.flag in (*first.spec.wins_over, *first.spec.excludes) for first, second in ((one, other), (other, one))
    )


def without_losers(given: Values, options: Mapping[str, Option]) -> dict[str, Any]:
    """Return flag -> value without options over which another given one wins; each is logged."""
    kept = dict(given)
    for flag in given:
        for loser in options[flag].spec.wins_over if is_on(given, flag) else ():
            if loser in kept:
                lost = given_as(options[loser], kept.pop(loser))
                logger.warning("%s is not used: %s wins over it", lost, given_as(options[flag], given[flag]))
    return kept


def idle_options(options: Iterable[Option], values: Values, known: Mapping[str, Option]) -> list[str]:
    """Return a message for every option that differs from its default in vain.

    known are the options that conditions name, and values hold all of them.
    """
    return [text for entry in options if _differs(entry, values) for text in _reason(entry, values, known)]


def warn_of_idle(config: object) -> None:
    """Warn of the options of a configuration that were given in vain."""
    kind: type = type(config)
    known = all_options(kind)
    for text in idle_options(known.values(), flag_values(config), known):
        logger.warning("%s", text)


def idle_in_all(options: Sequence[Option], places: Sequence[Values], known: Mapping[str, Option]) -> list[str]:
    """Return a message for every option with a value that is in vain in each of the places that have this value.

    places are subsets of datasets, each with all values that count there.
    """
    found: dict[str, None] = {}
    for entry in options:
        reasons: dict[str, list[list[str]]] = {}
        for values in places:
            if _differs(entry, values):
                reasons.setdefault(repr(values[entry.flag]), []).append(_reason(entry, values, known))
        found |= {texts[0][0]: None for texts in reasons.values() if all(texts)}
    return list(found)


def _reason(entry: Option, values: Values, known: Mapping[str, Option]) -> list[str]:
    label = given_as(entry, values.get(entry.flag))
    against = [condition for condition in entry.spec.not_with if holds(condition, values)]
    if against:
        return [f"{label} has no effect with {_named(against[0], known)}"]
    if not entry.spec.only_with or any(holds(condition, values) for condition in entry.spec.only_with):
        return []
    twin = known[entry.spec.twin] if entry.spec.twin else None
    more = ""
    if twin is not None and any(holds(condition, values) for condition in twin.spec.only_with):
        more = f"; {twin.label} is for {_named(next(c for c in twin.spec.only_with if holds(c, values)), known)}"
    *others, last = (_named(condition, known) for condition in entry.spec.only_with)
    needed = f"{', '.join(others)} or {last}" if others else last
    return [f"{label} has no effect without {needed}{more}"]


def holds(condition: str, values: Values) -> bool:
    """Return whether an option is on, or has the value of `name=value`; of several values, whether one has."""
    name, sign, wanted = condition.partition("=")
    if not sign:
        return is_on(values, name)
    value = values.get(name)
    return any(str(one) == wanted for one in (value if isinstance(value, list) else [value]))


def is_on(values: Values, flag: str) -> bool:
    """Return whether an option has a value that is not empty, false or 0; of several values, whether one is."""
    value = values.get(flag)
    return any(value) if isinstance(value, list) else bool(value)


def _differs(entry: Option, values: Values) -> bool:
    value = values.get(entry.flag)
    return any(
        one != entry.default and (bool(one) or bool(entry.default))
        for one in (value if isinstance(value, list) else [value])
    )


def _named(condition: str, known: Mapping[str, Option]) -> str:
    name, _, value = condition.partition("=")
    return f"{known[name].label} {value}".rstrip()


def given_as(entry: Option, value: Any) -> str:
    """Return an option with its value as it is written on the command line; of several values, one that differs."""
    values = value if isinstance(value, list) else [value]
    differing = [one for one in values if one != entry.default] or values
    text = "" if entry.kind.nargs == 0 else format_default(written(differing[0]))
    return f"{entry.label} {'...' if entry.spec.secret else shortened(text, 60)}".rstrip()


def long_intervals(options: Iterable[Option], values: Values, *, steps: int, epochs: int) -> list[str]:
    """Return a message for every interval that is longer than a run of so many steps and epochs."""
    lengths = {"steps": steps, "epochs": epochs}
    found = []
    for entry in options:
        value, unit = values.get(entry.flag), entry.spec.interval
        if unit is not None and value is not None and value > lengths[unit]:
            found.append(f"{given_as(entry, value)} is more than the {lengths[unit]} {unit} of the run")
    return found
