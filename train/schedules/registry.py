"""The objectives that there are, by the name that `objective.kind` and a drafter's config.json give them."""

from train.schedules.blockwise import Blockwise
from train.schedules.schedule import Schedule
from train.schedules.ttt import TrainingTimeTest

OBJECTIVES: dict[str, Schedule] = {"ttt": TrainingTimeTest(), "blockwise": Blockwise()}
