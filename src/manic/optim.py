"""torch's optimizers with a learned scale, as ready-made classes: for code and config files that name a class.

``manic.AdamW(model.parameters(), weight_decay=0.1)`` is
``Mechanic(torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.1))``. Each class takes the arguments of torch's
class of the same name, with ``lr=1.0`` by default, and by keyword the options of :class:`manic.Mechanic`. Two of these
have another name here, since torch's optimizers have options of that name: Mechanic's ``betas`` and ``eps`` are
``tuner_betas`` and ``tuner_eps``, in every class. There is a class for every optimizer of torch that Mechanic can wrap.
"""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Mapping
from inspect import Parameter, Signature
from typing import Any

import torch
from torch.optim import Optimizer

from manic.mechanic import Mechanic
from manic.mechanize import MechanicClass

__all__ = [
    "ASGD", "SGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam", "RMSprop",
    "Rprop",
]  # fmt: skip

_DEFAULT_LR = 1.0

_RENAMED = {"betas": "tuner_betas", "eps": "tuner_eps"}
"""Mechanic's options that have another name here, since bases have options of that name."""


def _options() -> dict[str, Parameter]:
    """Mechanic's options, by the name that they have here."""
    types = typing.get_type_hints(Mechanic.__init__)
    options = list(inspect.signature(Mechanic).parameters.values())[1:]
    return {_RENAMED.get(each.name, each.name): each.replace(annotation=types[each.name]) for each in options}


_OPTIONS = _options()


class _ReadyMade(MechanicClass):
    """A class whose ``__init__`` has the signature of its base and the options of Mechanic."""

    def __init_subclass__(cls, base: type[Optimizer] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if base is not None:  # otherwise it is a subclass of a ready-made class
            cls.BASE = base
            cls.__init__ = _initializer(_signature(base))  # type: ignore[method-assign]

    @classmethod
    def _divide(cls, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        options = {_OPTIONS[name].name: value for name, value in kwargs.items() if name in _OPTIONS}
        return {name: value for name, value in kwargs.items() if name not in _OPTIONS}, options

    def _title(self) -> str:
        return f"{type(self).__module__}.{type(self).__qualname__}({self._settings()})"


def _signature(base: type[Optimizer]) -> Signature:
    """The signature of ``__init__`` of a class for ``base``."""
    mine = inspect.signature(base).parameters
    assert not mine.keys() & _OPTIONS.keys(), (
        f"options of {base.__name__} and Mechanic: {mine.keys() & _OPTIONS.keys()}"
    )
    of_base = [each.replace(default=_DEFAULT_LR) if each.name == "lr" else each for each in mine.values()]
    options = [each.replace(name=name, kind=Parameter.KEYWORD_ONLY) for name, each in _OPTIONS.items()]
    of_self = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
    return Signature([of_self, *of_base, *options], return_annotation=None)


def _initializer(signature: Signature) -> Callable[..., None]:
    """``__init__`` with ``signature``, which inspection and config parsers see."""

    def __init__(self: _ReadyMade, *args: Any, **kwargs: Any) -> None:
        _refuse_unknown(type(self).__name__, kwargs, signature)
        given = {"lr": _DEFAULT_LR, **signature.bind(self, *args, **kwargs).arguments}
        del given["self"]
        super(_ReadyMade, self).__init__(**given)

    vars(__init__)["__signature__"] = signature
    __init__.__annotations__ = {each.name: each.annotation for each in signature.parameters.values()}
    __init__.__annotations__["return"] = None
    del __init__.__annotations__["self"]
    return __init__


def _refuse_unknown(name: str, kwargs: Mapping[str, Any], signature: Signature) -> None:
    """Raise TypeError if an argument's name is not in ``signature``, with the closest that is."""
    known = [each for each in signature.parameters if each != "self"]
    for unknown in kwargs.keys() - known:
        close = [_RENAMED[unknown]] if unknown in _RENAMED else difflib.get_close_matches(unknown, known, n=1)
        advice = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}"
        raise TypeError(f"{name} has no option {unknown!r}; {advice}")


class AdamW(_ReadyMade, base=torch.optim.AdamW):
    """``torch.optim.AdamW`` with a learned scale of its learning rate."""


class Adam(_ReadyMade, base=torch.optim.Adam):
    """``torch.optim.Adam`` with a learned scale of its learning rate."""


class SGD(_ReadyMade, base=torch.optim.SGD):
    """``torch.optim.SGD`` with a learned scale of its learning rate."""


class Muon(_ReadyMade, base=torch.optim.Muon):
    """``torch.optim.Muon`` with a learned scale of its learning rate."""


class NAdam(_ReadyMade, base=torch.optim.NAdam):
    """``torch.optim.NAdam`` with a learned scale of its learning rate."""


class RAdam(_ReadyMade, base=torch.optim.RAdam):
    """``torch.optim.RAdam`` with a learned scale of its learning rate."""


class RMSprop(_ReadyMade, base=torch.optim.RMSprop):
    """``torch.optim.RMSprop`` with a learned scale of its learning rate."""


class Adagrad(_ReadyMade, base=torch.optim.Adagrad):
    """``torch.optim.Adagrad`` with a learned scale of its learning rate."""


class Adamax(_ReadyMade, base=torch.optim.Adamax):
    """``torch.optim.Adamax`` with a learned scale of its learning rate."""


class Adadelta(_ReadyMade, base=torch.optim.Adadelta):
    """``torch.optim.Adadelta`` with a learned scale of its learning rate."""


class Adafactor(_ReadyMade, base=torch.optim.Adafactor):
    """``torch.optim.Adafactor`` with a learned scale of its learning rate."""


class ASGD(_ReadyMade, base=torch.optim.ASGD):
    """``torch.optim.ASGD`` with a learned scale of its learning rate."""


class Rprop(_ReadyMade, base=torch.optim.Rprop):
    """``torch.optim.Rprop`` with a learned scale of its learning rate."""
