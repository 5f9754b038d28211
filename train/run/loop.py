"""The training loop: DeepSpeed does ZeRO, precision, accumulation and clipping; this file feeds it."""

import math
import os
import time
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger

from common.errors import UserError
from common.files import disk_says
from common.progress import Heartbeat
from common.ranks import rank, together, world_size
from data_prep.capture.live import LiveReader, open_cache
from data_prep.target.loading import pick_device
from train.data.loader import loaded
from train.data.pack import Pack
from train.gate import hold_gates
from train.measure import diagnostics, pictures
from train.recipe import TrainRecipe
from train.run import deepspeed_private, not_finite
from train.run.figures import Measured, Sums, Window, peak_gib, window_figures
from train.run.folder import lock_run, refuse_another_run, write_recipe
from train.run.parts import Parts, RunContext, build_parts
from train.run.ranks import connect
from train.run.rates import Rates
from train.run.stopping import AGAIN, Asked
from train.run.tracking import Tracker
from train.run.validate import diagnose, validate


class Voice(Heartbeat):
    """What is heard of a run: what rank 0 says, and `doing` whenever it has said nothing for a while."""

    def __init__(self):
        super().__init__(lambda: self.doing, silent=rank() != 0)
        self.doing = "starting"


def train(recipe: TrainRecipe, run_dir: Path, asked: Asked) -> bool:
    """Train to `max_steps`, from the newest checkpoint of `run_dir` if there is one. False: it was asked to stop on the way.

    Raises:
        UserError: the target is not the cache's, the folder holds another run, the loss is not finite, or the disk is full.
    """
    lock = lock_run(run_dir) if rank() == 0 else None
    deepspeed_logger.setLevel("ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's own calls
    device = pick_device(recipe.target.device)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = torch.device("cuda", torch.cuda.current_device())
    connect(device.type == "cuda", recipe.train.timeout_s)
    try:
        with together(recipe.train.timeout_s):  # the first rank that leaves ends the others, through the launcher
            finished = _build_and_train(recipe, run_dir, device, asked)
    except OSError as error:
        if (said := disk_says(error)) is None:
            raise
        raise UserError(
            f"{run_dir} cannot be written ({said}); its checkpoints are intact. Make room, then run the same command "
            "again"
        ) from error
    dist.destroy_process_group()  # only after success: with a rank gone it can wait for ever
    del lock
    return finished


def _build_and_train(recipe: TrainRecipe, run_dir: Path, device: torch.device, asked: Asked) -> bool:
    voice = Voice()
    # A cache that is missing is made here. That has its own lines of progress, so the voice is silent until it is done, and a
    # limit of its own for ranks that are not heard of.
    with together() as barrier:
        reader = open_cache(recipe, barrier)
    refuse_another_run(recipe, run_dir, reader.manifest)
    context = RunContext(recipe, run_dir, device, reader, voice.say)
    with voice:
        return Trainer(context, build_parts(context), voice, asked).train()


class Trainer:
    """Runs the parts of a run from its newest checkpoint to its last step. All ranks do everything here together; rank 0 alone
    logs."""

    def __init__(self, context: RunContext, parts: Parts, voice: Voice, asked: Asked):
        self.recipe = context.recipe
        self.run_dir = context.run_dir
        self.device = context.device
        self.reader = context.reader
        self.voice = voice
        self.asked = asked
        self.model = parts.model
        self.data = parts.data
        self.checkpoints = parts.checkpoints
        self.world = world_size()
        self.accumulation = self.recipe.train.batch // self.world  # packs of each rank in an optimizer step

        # additional training states: they survive a resume, with `objective.alpha_VJ` and what the engine keeps
        self.step = 0
        self.best = 0.0
        self.best_step = 0

        # what belongs to this process: a resumed run makes it anew
        self.tracker: Tracker | None = None  # of rank 0
        self.packs: Iterator[Pack] = iter(())
        self.window = Window()
        self.rates = Rates(deepspeed_private.adam_of(self.model.engine), self.recipe.train)
        self.lr = math.nan  # of the last step
        self.grad_norm = math.nan  # of the last step, before clipping
        self.gradients: dict = {}  # diagnostics of the last step's gradients, if it was one that is saved

    def train(self) -> bool:
        """From the newest checkpoint to the last step; whether it got there, and was not asked to stop before."""
        last = self.recipe.train.max_steps
        window = self._resume()
        done = self.step
        if rank() == 0:
            config = write_recipe(self.recipe, self.run_dir, self.reader.manifest, self.world)
            self.tracker = Tracker(self.recipe.tracking, self.run_dir, self.recipe.run.group, config, done)
        self._say_what_begins()
        # A live reader has one target, which one thread runs.
        workers = 0 if isinstance(self.reader, LiveReader) else self.recipe.train.workers
        self.packs = loaded(self.data.training, self._numbers(done, last), self.device, workers)
        self.window = Window.of(window, self.device)
        with self.asked:
            stopped = self._steps(done, last)
        if done >= last:
            self.voice.say(f"{self.run_dir} is finished: {last} steps, best tau {self.best:.3f}")
        if self.tracker and not stopped:
            self.tracker.close()
        return not stopped

    def _steps(self, done: int, last: int) -> bool:
        """The steps that are left; whether it was asked to stop before the last one."""
        began = time.monotonic()
        for step in range(done + 1, last + 1):
            self.voice.doing = self._progress(step - 1, step - 1 - done, time.monotonic() - began)
            saves = step % self.recipe.train.save_every == 0 or step == last
            total = self._step(step, saves)
            self.window.steps.append(total)
            # A window ends at a checkpoint too. Else a run that resumes there would begin a window in the middle of one, and log
            # other means than the run that was never interrupted.
            if saves or step % self.recipe.train.log_every == 0:
                self._log(step)
                self.window = Window()
            if saves:
                self._save(step)
                self.window = Window()  # the time that saving took is no step's
            if total.asked and step < last:
                self._stop(step, saves)
                return True
        return False

    def _stop(self, step: int, saved: bool) -> None:
        """Leave a checkpoint of this step. It is not judged: that can take longer than whoever asks waits."""
        self.voice.doing = f"step {step}: asked to stop, saving"
        if not saved:
            not_finite.refuse_to_keep(step, self.model.engine, [], self.data.validation, self.device)
            self.checkpoints.save(step, self._state(step))
        if self.tracker:
            self.tracker.close()
        self.voice.say(
            f"asked to stop: a checkpoint of step {step} is written, from which the same command goes on (exit code {AGAIN})"
        )
        self.asked.answered()

    def _resume(self) -> dict:
        """Take the newest checkpoint's state, where there is a checkpoint; the window that it lies in."""
        alpha_VJ = self.model.objective.alpha_VJ
        state = self._state(0) | (self.checkpoints.load() or {})
        self.step = state["step"]
        self.best = state["best"]
        self.best_step = state["best_step"]
        alpha = torch.tensor(state["alpha"], dtype=torch.float64, device=self.device)
        self.model.objective.alpha_VJ = alpha.view(alpha_VJ.shape)
        return state["window"]

    def _state(self, step: int) -> dict:
        """What `_resume` reads."""
        alpha = self.model.objective.alpha_VJ.tolist()
        window = self.window.state()
        return {"step": step, "best": self.best, "best_step": self.best_step, "alpha": alpha, "window": window}

    def _say_what_begins(self) -> None:
        if self.step > 0:
            self.voice.say(f"resuming {self.run_dir} after step {self.step}")
            return
        size = deepspeed_private.whole_size(self.model.objective.parameters())
        self.voice.say(
            f"{size:,} parameters, "
            f"{len(self.data.training.documents):,} training and {len(self.data.validation.documents):,} validation documents, "
            f"{self.world} rank(s), {self.accumulation} pack(s) a rank and step -> {self.run_dir}"
        )
        longest = min(int(self.reader.lengths.max()), self.recipe.train.pack_tokens)
        if self.recipe.view_sampler and longest <= min(self.data.budgets):
            self.voice.say(
                f"no document shows more than {longest} tokens: every view is the full one (data.long=join joins them)"
            )

    def _numbers(self, done: int, last: int) -> Iterator[int]:
        """This rank's packs of the steps to come. Packs are dealt out in turn, so that those of a step are the same with any
        number of ranks, and a run resumes at the pack where it stopped."""
        batch = self.recipe.train.batch
        return iter(range(done * batch + rank(), last * batch, self.world))

    def _step(self, step: int, saves: bool) -> Sums:
        """One optimizer step; what it summed over all packs and ranks."""
        since = time.monotonic()
        packs = list(islice(self.packs, self.accumulation))
        self.window.waited += time.monotonic() - since

        # What the step's loss is divided by is a sum over all its packs, on all ranks. It must be known before the first
        # backward.
        weight_T = torch.stack([self.model.objective.weight_sums(pack) for pack in packs]).sum(0)
        dist.all_reduce(weight_T)
        hold_gates(self.model.drafter, self.recipe, step)
        self.lr = self.rates.set(step)

        # `engine.step` is called after every pack. DeepSpeed counts these calls: only the last of `accumulation` changes weights.
        # Between its backward and that call the gradients of the whole step are there to be looked at.
        every = self.recipe.train.acceptance_every
        counts = bool(every) and step % every == 0
        parts: list[Sums] = []
        for pack in packs[:-1]:
            parts.append(self._learn(pack, weight_T, counts))
            self.model.engine.step()
        parts.append(self._learn(packs[-1], weight_T, counts))
        total = self._reduce(step, packs, parts)
        if saves and self.recipe.train.diagnose:
            self._look_at_gradients(packs)
        # DeepSpeed keeps no norm under ZeRO-0, but there every rank holds all gradients, until the step clears them.
        if self.recipe.deepspeed.stage == 0:
            gradients = [p.grad for p in self.model.objective.parameters() if p.grad is not None]
            self.grad_norm = float(torch.nn.utils.get_total_norm(gradients))
        self.model.engine.step()
        # Under the other stages each rank holds a part of them, and DeepSpeed knows their norm once it has stepped.
        if self.recipe.deepspeed.stage > 0:
            self.grad_norm = float(self.model.engine.get_global_grad_norm())
        if not math.isfinite(self.grad_norm):
            not_finite.refuse_gradient(step)
        return total._replace(weight_T=weight_T)

    def _learn(self, pack: Pack, weight_T: torch.Tensor, counts: bool) -> Sums:
        """Forward and backward of one pack. `counts`: whether acceptance is."""
        outcome = self.model.engine(pack, weight_T, acceptance=counts)
        # The shares of all packs add up to the loss, so their gradients are to be added. DeepSpeed makes means of them: it
        # divides by the accumulation and by the number of ranks, which is undone here.
        self.model.engine.backward(outcome.share * (self.world * self.accumulation))
        return Sums.of(outcome, pack)

    def _reduce(self, step: int, packs: list[Pack], parts: list[Sums]) -> Sums:
        """The step's sums over all ranks. Raises UserError on all of them when the loss is not finite."""
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        total = total._replace(asked=torch.full_like(total.asked, self.asked.yes)).reduced()
        # Looked at once a step, so that the host need not wait for every pack. All ranks see the same sum: all go on, or
        # all stop.
        if not total.share.isfinite():
            bad = [pack for pack, part in zip(packs, parts) if not part.share.isfinite()]
            not_finite.refuse_loss(step, self.model.engine, bad[0] if bad else None)
        # What lk_lambda follows in the next step. A slot that never counted keeps what was known of it.
        mean_VJ = total.overlap_VJ / total.valid_J.clamp(min=1)
        objective = self.model.objective
        objective.alpha_VJ = torch.where(total.valid_J > 0, mean_VJ, objective.alpha_VJ)
        return total

    def _look_at_gradients(self, packs: list[Pack]) -> None:
        rows = torch.stack([self.model.objective.draft_rows(pack) for pack in packs]).sum()
        dist.all_reduce(rows)
        self.gradients = diagnostics.gradients(self.model.drafter, int(rows))

    def _save(self, step: int) -> None:
        """Judge the drafter, then write the checkpoint: its state says whether it is the best."""
        self.voice.doing = f"step {step}: judging on held-out documents and saving"
        found = validate(self.model, self.data, self.device)
        not_finite.refuse_to_keep(step, self.model.engine, found, self.data.validation, self.device)
        taus = [one["sampled"].tau for one in found]
        tau = sum(taus) / len(taus)
        best = tau > self.best
        if best:
            self.best = tau
            self.best_step = step
        self.voice.say(
            f"step {step}: held-out tau {taus[0]:.3f} sampled, {found[0]['greedy'].tau:.3f} greedy"
            + "".join(f", {sparse:.3f} with {budget}" for sparse, budget in zip(taus[1:], self.data.budgets[1:]))
            + " (best)" * best
        )
        if self.tracker:
            self.tracker.log(step, {"validation": self._plain(found)})
        if self.recipe.train.diagnose:
            self._diagnose(step)
        self.checkpoints.save(step, self._state(step))

    def _plain(self, found: list[dict]) -> dict:
        """`validate`'s figures as JSON: the full view's, and under "budget" the others'."""
        plain = [{kind: one if kind == "loss" else vars(one) for kind, one in view.items()} for view in found]
        if not self.recipe.view_sampler:
            return plain[0]
        return plain[0] | {"budget": {str(budget): one for budget, one in zip(self.data.budgets[1:], plain[1:])}}

    def _diagnose(self, step: int) -> None:
        found = diagnose(self.model, self.data, self.device) | {"gradients": self.gradients}
        if self.tracker:
            picture = self.run_dir / "diagnostics.png"
            self.tracker.log(step, {"diagnostics": found})
            pictures.draw(found, picture)
            self.tracker.picture(step, "diagnostics", picture)

    def _log(self, step: int) -> None:
        if self.tracker is None:
            return
        window = self.window
        seconds = window.seconds
        measured = Measured(seconds, window.waited, self.lr, self.grad_norm, peak_gib(self.device))
        figures = window_figures(window.total(), measured, self.recipe)
        self.tracker.log(step, figures)
        left = (self.recipe.train.max_steps - step) * seconds / len(window.steps)
        tau = f"tau {figures['sampled']['tau']:.3f}  " if "sampled" in figures else ""
        self.voice.say(
            f"step {step}/{self.recipe.train.max_steps}  loss {figures['loss']:.3f}  {tau}"
            f"{figures['tokens_per_s']:,.0f} tokens/s  {left / 60:.1f} min left"
        )

    def _progress(self, step: int, taken: int, seconds: float) -> str:
        """What is said of a step by the clock: `taken` steps took `seconds`, checkpoints among them."""
        whole = f"step {step}/{self.recipe.train.max_steps}"
        if not taken:
            return whole
        left = (self.recipe.train.max_steps - step) * seconds / taken
        return f"{whole}  {seconds / taken:.2g} s a step  {left / 60:.1f} min left"
