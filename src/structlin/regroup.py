"""Take parameters out of an optimizer, and put others in, in the middle of a run.

An optimizer knows its parameters twice, by group and by state; both are kept whole here. Groups are never removed,
even when they have become empty: learning-rate schedulers count them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

Group = dict[str, Any]


def find(optimizer: Optimizer, parameter: nn.Parameter) -> Group | None:
    """The group of ``optimizer`` that ``parameter`` is in."""
    groups: list[Group] = optimizer.param_groups
    return next((group for group in groups if any(p is parameter for p in group["params"])), None)


def forget(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Take ``parameters`` out of the groups and the state of ``optimizer``."""
    gone = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        for parameter in (p for p in group["params"] if id(p) in gone):
            optimizer.state.pop(parameter, None)
        group["params"] = [p for p in group["params"] if id(p) not in gone]


def join(optimizer: Optimizer, parameter: nn.Parameter, like: Group, lr: float | None) -> Group:
    """Put ``parameter`` into the group ``like``, or with another ``lr`` into one that has it and is else the same.

    A group that is not there is added. Returns the group.
    """
    if lr is None or lr == float(like["lr"]):
        like["params"].append(parameter)
        return like
    wanted = _options(like)
    for group in optimizer.param_groups:
        if float(group["lr"]) == lr and _options(group) == wanted:
            group["params"].append(parameter)
            return dict(group)
    fresh = {**wanted, "params": [parameter], "lr": lr}
    if "initial_lr" in like:
        # of a scheduler: the new group is as far in its schedule as the others
        fresh["initial_lr"] = like["initial_lr"] * lr / float(like["lr"])
    optimizer.add_param_group(fresh)
    return dict(optimizer.param_groups[-1])


def _options(group: Group) -> Group:
    """All of a group but its parameters and learning rate."""
    return {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr", "param_names")}
