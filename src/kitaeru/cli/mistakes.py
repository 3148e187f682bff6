"""What is wrong with a command line, in our words: cyclopts' errors as `UsageError`."""

from __future__ import annotations

from itertools import chain
from typing import Literal, get_args, get_origin

from cyclopts.exceptions import (
    CoercionError,
    CycloptsError,
    MissingArgumentError,
    RepeatArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from kitaeru.errors import UsageError
from kitaeru.i18n import tr
from kitaeru.recipe.messages import nearest


def usage_error(error: CycloptsError, command: str, verbs: tuple[str, ...]) -> UsageError:
    """`error` in our words. `command` is what was called (`kitaeru recipe`), `verbs` what may follow it."""
    match error:
        case UnknownCommandError():
            return _unknown_verb((error.unused_tokens or [""])[0], command, verbs)
        case UnknownOptionError():
            return _unknown_option(error, command)
        case MissingArgumentError():
            return _missing(error, command)
        case CoercionError():
            return _bad_value(error, command)
        case RepeatArgumentError():
            return UsageError(tr("{option} is given twice.", option=error.token.keyword), remedy=_help(command))
        case UnusedCliTokensError():
            extra = " ".join(error.unused_tokens or [])
            return UsageError(
                tr("`{command}` does not know what to do with: {extra}", command=command, extra=extra),
                remedy=_help(command),
            )
    error.verbose = False
    return UsageError(tr("The command line does not fit together: {detail}", detail=error), remedy=_help(command))


def _help(command: str) -> str:
    return tr("See `{command} --help`.", command=command)


def _unknown_verb(word: str, command: str, verbs: tuple[str, ...]) -> UsageError:
    what = tr("`{command}` has no command `{word}`.", command=command, word=word)
    if close := nearest(word, verbs):
        return UsageError(what, remedy=tr("Did you mean `{name}`?", name=f"{command} {close}"))
    return UsageError(what, remedy=tr("Commands: {names}.", names=", ".join(verbs)))


def _unknown_option(error: UnknownOptionError, command: str) -> UsageError:
    option = (error.token.keyword or error.token.value).partition("=")[0]
    what = tr("`{command}` has no option `{option}`.", command=command, option=option)
    known = sorted(
        {name for name in chain.from_iterable(a.names for a in error.argument_collection) if name[:1] == "-"}
    )
    if close := nearest(option, [*known, "--help", "--lang", "--debug"]):
        return UsageError(what, remedy=tr("Did you mean `{name}`?", name=close))
    return UsageError(what, remedy=_help(command))


def _missing(error: MissingArgumentError, command: str) -> UsageError:
    argument = error.argument
    if argument is None:
        return UsageError(tr("Something is missing after `{command}`.", command=command), remedy=_help(command))
    given = error.keyword or next((token.keyword for token in argument.tokens if token.keyword), None)
    if given is not None:
        return UsageError(tr("`{option}` needs a value.", option=given), remedy=_help(command))
    name = argument.name.lstrip("-").upper() if argument.index is not None else argument.name
    return UsageError(tr("`{command}` needs {name}.", command=command, name=name), remedy=_help(command))


def _bad_value(error: CoercionError, command: str) -> UsageError:
    token, argument = error.token, error.argument
    name = (token.keyword if token else None) or (argument.name if argument else "")
    value = token.value if token else ""
    what = tr('"{value}" is not a value for {name}.', value=value, name=name)
    if get_origin(error.target_type) is Literal:
        choices = [str(choice) for choice in get_args(error.target_type)]
        if close := nearest(value, choices):
            return UsageError(what, remedy=tr("Did you mean `{name}`?", name=close))
        return UsageError(what, remedy=tr("Take one of these: {choices}.", choices=", ".join(choices)))
    if error.target_type in (int, float):
        return UsageError(what, remedy=tr("It must be a number."))
    return UsageError(what, remedy=_help(command))
