"""Words of the project: no two methods on an optimizer step's path share a name."""

import collections
import inspect

from nanolm.distributed.world import World
from nanolm.training.batch import MicroBatch
from nanolm.training.ema import ExponentialMovingAverage
from nanolm.training.engine import Engine
from nanolm.training.gradient import Backward
from nanolm.training.guards.nonfinite import NonFinitePolicy
from nanolm.training.phases import Progress, StragglerMonitor
from nanolm.training.throughput import Throughput
from nanolm.training.trainer import Trainer
from nanolm.training.update import Update

STEP = (
    Trainer,
    Engine,
    Update,
    Backward,
    NonFinitePolicy,
    ExponentialMovingAverage,
    MicroBatch,
    World,
    Progress,
    StragglerMonitor,
    Throughput,
)


def test_no_two_methods_of_a_step_share_a_name():
    owners = collections.defaultdict(list)
    for owner in STEP:
        for name, member in vars(owner).items():
            if inspect.isfunction(member) and not name.startswith("__"):
                owners[name].append(owner.__name__)
    assert {name: found for name, found in owners.items() if len(found) > 1} == {}
