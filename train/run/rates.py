"""The learning rate of an optimizer step: a function of its number alone, so that a resume needs nothing of it."""

import math

from torch.optim import Optimizer

from train.recipe import TrainSection


def share_of_peak(train: TrainSection, step: int) -> float:
    """What of train.lr step 1 .. max_steps has. It rises in equal parts over W = warmup_ratio * max_steps steps: step 1 has 1/W,
    step W all of it; without any, step 1 has. From there it falls as half a cosine to min_lr_ratio, which the last step has."""
    rising = round(train.warmup_ratio * train.max_steps)
    if step <= rising:
        return step / rising
    peak = max(rising, 1)
    fallen = (step - peak) / max(train.max_steps - peak, 1)
    return train.min_lr_ratio + (1 - train.min_lr_ratio) * (1 + math.cos(math.pi * fallen)) / 2


class Rates:
    """Sets the rates of an optimizer whose groups begin with their peaks."""

    def __init__(self, optimizer: Optimizer, train: TrainSection):
        self._train = train
        self._peaks = [(group, group["lr"]) for group in optimizer.param_groups]

    def set(self, step: int) -> float:
        """For the step to come; the rate of the first group."""
        share = share_of_peak(self._train, step)
        for group, peak in self._peaks:
            group["lr"] = peak * share
        return self._peaks[0][1] * share
