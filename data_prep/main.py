"""deepspeed data_prep/main.py target=tiny data=stdlib cache.dir=CACHE [mode=capture|estimate|verify|inspect|merge]
deepspeed data_prep/main.py target=tiny mode=regenerate|synthesize ..."""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder: no module here may hide another

from common import ranks  # noqa: E402

ranks.wait_without_spinning()
# Before the slow imports: a launcher that is killed meanwhile takes this process with it.
ranks.die_with_parent()

import torch  # noqa: E402

from common import cli  # noqa: E402
from common.errors import UserError, first_line  # noqa: E402
from common.files import refuse_unwritable, said_in_one_line  # noqa: E402
from common.rules import refuse  # noqa: E402
from data_prep import rules  # noqa: E402
from data_prep.cache.reader import CacheReader  # noqa: E402
from data_prep.cache.tools import check_picture, inspect, merge, verify  # noqa: E402
from data_prep.capture import build  # noqa: E402
from data_prep.capture.estimate import estimate  # noqa: E402
from data_prep.capture.plan import check_capture  # noqa: E402
from data_prep.recipe import DataPrepRecipe  # noqa: E402
from data_prep.synthesis.regenerate import check_regeneration, regenerate  # noqa: E402
from data_prep.synthesis.synthesize import check_synthesis, synthesize  # noqa: E402

# Modes that all processes of a launcher do, and those that one does.
TOGETHER = {"capture": build.build, "regenerate": regenerate, "synthesize": synthesize}
ALONE = {"estimate": estimate, "verify": verify, "inspect": inspect, "merge": merge}


def check_data_prep(recipe: DataPrepRecipe) -> None:
    """What can be refused before a document is read or the target is loaded."""
    match recipe.mode:
        case "capture" | "estimate":
            check_capture(recipe)
            refuse(rules.MODES, recipe)
        case "regenerate":
            refuse(rules.MODES, recipe)
            check_regeneration(recipe)
        case "synthesize":
            refuse(rules.MODES, recipe)
            check_synthesis(recipe)
        case "verify":
            CacheReader(recipe.cache.dir)
        case "inspect":
            CacheReader(recipe.cache.dir)
            check_picture(recipe.inspect.out)
        case "merge":
            refuse(rules.MODES, recipe)
            refuse_unwritable("cache.dir", recipe.cache.dir)
            for folder in recipe.merge.sources:
                CacheReader(folder)


def run(recipe: DataPrepRecipe) -> None:
    """Do what `mode` says, in every process of the launcher."""
    if ranks.on_gpu():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        with said_in_one_line(recipe.cache.dir):
            if recipe.mode in TOGETHER:
                with ranks.together() as barrier:
                    TOGETHER[recipe.mode](recipe, barrier)
            elif recipe.mode == "estimate" and recipe.capture.spread == "tp":
                with ranks.together():
                    estimate(recipe)
            elif ranks.rank() == 0:
                ALONE[recipe.mode](recipe)
    except RuntimeError as error:
        if not ranks.ended(error):
            raise
        said = f"another rank has ended or never came; its last line may say why; the same command goes on ({first_line(error)})"
        cli.fail(UserError(said), code=1)  # not a mistake: what starts jobs may try again


if __name__ == "__main__":
    cli.main("data_prep", DataPrepRecipe, check_data_prep, run)
