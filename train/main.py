"""deepspeed train/main.py objective=blockwise reuse=hybrid cache.dir=CACHE run.dir=RUN [-m reuse=hidden,kv,hybrid]"""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder: no module here may hide another

from common import ranks  # noqa: E402

ranks.wait_without_spinning()
ranks.die_with_parent()  # before the slow imports: a launcher killed meanwhile takes this rank with it

import hydra  # noqa: E402
import torch  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402

from common import cli  # noqa: E402
from common.errors import UserError  # noqa: E402
from common.files import refuse_unwritable, said_in_one_line  # noqa: E402
from common.overrides import CONF, folder_name, parsed, points, quoted, sweep_words  # noqa: E402
from data_prep.target.loading import pick_device  # noqa: E402
from train.build import check_training  # noqa: E402
from train.recipe import TrainRecipe  # noqa: E402
from train.run.folder import begun  # noqa: E402
from train.run.ranks import loss_of_a_rank  # noqa: E402
from train.run.stopping import AGAIN, SAME_S, Asked  # noqa: E402
from train.sizes import spoken  # noqa: E402
from train.sweep import Sweep  # noqa: E402

UNNAMED = ("run.dir", "cache.dir", "cache.on_missing", "tracking", "run.group")  # keys that do not make another run


def key_of(override: str) -> str:
    return override.split("=")[0].lstrip("+~")


def run_name(overrides: list[str]) -> str:
    """A folder's name from the overrides, without a timestamp, so that the same command finds its run again."""
    kept = sorted(word for word in overrides if key_of(word) not in UNNAMED and not key_of(word).startswith("hydra"))
    return folder_name(",".join(kept) or "default")


def run(recipe: TrainRecipe, run_dir: str) -> None:
    asked = Asked(SAME_S if "LOCAL_RANK" in os.environ else 0)  # a launcher says who is which
    ranks.single_process_defaults()
    if pick_device(recipe.target.device).type == "cpu":
        if ranks.rank() == 0 and (line := spoken(recipe)):
            print(line, flush=True)
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed decides when it is imported, and by what it finds
        if "OMP_NUM_THREADS" not in os.environ:
            local = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or os.environ["WORLD_SIZE"])
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    # DeepSpeed builds an operation with the first `ninja` of the path. Another than last time builds it anew, for a minute.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    from train.run.deepspeed_private import refuse_unknown
    from train.run.loop import train

    try:
        refuse_unknown(recipe.deepspeed.zero_optimization)
        finished = train(recipe, Path(run_dir), asked)
    except UserError as error:
        cli.fail(error)
    except Exception as error:
        # Leave at once, without the interpreter's usual end: a failed rank that waits for its collectives there is never noticed
        # by the launcher.
        if lost := loss_of_a_rank(error, recipe.train.timeout_s):
            cli.fail(lost, code=1)  # not a mistake: what starts jobs may try again
        cli.internal(*sys.exc_info())
        os._exit(1)
    if not finished:
        sys.stdout.flush()
        os._exit(AGAIN)


def main() -> None:
    sys.excepthook = cli.internal
    try:
        arguments = cli.arguments()
    except UserError as error:
        cli.fail(error)
    only_shown = arguments.help or arguments.hydra_help or arguments.cfg or arguments.info
    # Every rank composes and checks every point before Hydra runs: a mistake is one line, and costs no GPU.
    try:
        cli.for_hydra("train", arguments)
        if not only_shown:
            jobs = points(arguments.overrides, arguments.multirun)
            recipes = [cli.compose("train", TrainRecipe, job) for job in jobs]
            run_dir = recipes[0].run.dir or f"runs/{run_name(arguments.overrides)}"
            with said_in_one_line("a path"):
                if not arguments.multirun:
                    recipes = [recipes[0].going_on(begun(Path(run_dir)))]
                if not recipes[0].run.dir:
                    refuse_unwritable("run.dir", run_dir)
                for recipe in recipes:
                    check_training(recipe)
    except UserError as error:
        cli.fail(error)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let our own errors through
    if only_shown:
        if ranks.rank() == 0:
            hydra.main(config_path=CONF, config_name="train", version_base="1.3")(lambda config: None)()
        return
    if arguments.multirun:
        run_sweep(arguments.overrides, run_dir)
    elif ranks.rank() == 0:
        hydra.main(config_path=CONF, config_name="train", version_base="1.3")(lambda config: run(recipes[0], run_dir))()
    else:
        run(recipes[0], run_dir)


def launcher_of(overrides: list[str]) -> str:
    """Raises UserError where Hydra's launcher would start ranks of which there are already some."""
    launcher = next((word.value() for word in parsed(overrides, multirun=True) if word.key_or_group == "hydra/launcher"), "basic")
    if launcher != "basic" and "RANK" in os.environ:
        raise UserError(f"hydra/launcher={launcher} starts ranks itself: run it with python, not with deepspeed or torchrun")
    return launcher


def run_sweep(overrides: list[str], run_dir: str) -> None:
    """Every point of a `-m` sweep, each in processes of its own, in a folder of its own under `run_dir`."""
    try:
        launcher = launcher_of(overrides)
    except UserError as error:
        cli.fail(error)
    sweep = Sweep(str(Path(__file__).resolve()))
    if ranks.rank() != 0:
        return sweep.follow()
    try:
        sys.argv += sweep_words("run.dir", run_dir, overrides, UNNAMED)
    except UserError as error:
        cli.fail(error)

    def point(config) -> list[str] | None:
        job = HydraConfig.get()
        words = [word for word in job.overrides.task if key_of(word) not in ("run.dir", "run.group")]
        words += [word for word in job.overrides.hydra if key_of(word) == "hydra.searchpath"]
        words += [f"run.dir={quoted(job.runtime.output_dir)}", f"run.group={quoted(Path(run_dir).name)}"]
        if launcher == "deepspeed":
            return [sweep.program, *words]  # it starts them
        sweep.run(words) if launcher == "basic" else sweep.run_as_task(words)

    others = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = sys.path[0] + (os.pathsep + others if others else "")  # a job of submitit unpickles `point`
    try:
        hydra.main(config_path=CONF, config_name="train", version_base="1.3")(point)()
    except UserError as error:
        cli.fail(error, code=1)
    sweep.finish()


if __name__ == "__main__":
    main()
