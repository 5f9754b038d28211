"""The training loop: DeepSpeed does ZeRO, precision, accumulation, clipping and the schedule; this file feeds it."""

import errno
import functools
import json
import math
import operator
import os
import resource
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger

from common.cli import git_revision
from common.errors import UserError
from common.files import write_text
from common.progress import Heartbeat
from common.ranks import barrier, rank, world_size
from data_prep.capture.live import LiveReader, open_cache
from data_prep.target.target import load_target, pick_device
from train.build import (
    attention,
    check_target,
    drafter_config,
    engine_config,
    parameter_groups,
    slot_weights,
    token_counts,
    uses_bf16,
)
from train.data.packs import Pack, PackStream, loaded, sample_ages, split
from train.drafter.build import new_drafter
from train.drafter.warm_start import check_warm_start, other_positions, warm_start
from train.measure import acceptance, diagnostics
from train.objectives.objective import TERMS, Objective, Outcome
from train.recipe import TrainRecipe
from train.run.checkpoint import Checkpoints, latest
from train.run.ranks import connect, lock_run
from train.run.tracking import Tracker
from train.views.plan import FULL


def train(recipe: TrainRecipe, run_dir: Path) -> None:
    """Train to `max_steps`, from the newest checkpoint of `run_dir` if there is one.

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
        _Run(recipe, run_dir, device).go()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{run_dir} cannot be written ({error.strerror}); its checkpoints are intact. Make room, then run the same command "
            "again"
        ) from error
    dist.destroy_process_group()  # only after success: with a rank gone it can wait for ever
    del lock


class Sums(NamedTuple):
    """What one step or more adds up, over packs and ranks; float64 on the device."""

    share: torch.Tensor  # of the step's loss
    tokens: torch.Tensor
    terms_T: torch.Tensor
    weight_T: torch.Tensor
    overlap_VJ: torch.Tensor  # of each view
    valid_J: torch.Tensor
    counts_V4J: torch.Tensor

    @staticmethod
    def of(outcome: Outcome, pack: Pack) -> "Sums":
        share, terms_T, valid = outcome.share.detach().double(), outcome.terms_T.double(), outcome.valid
        overlap_VJ, valid_J = (outcome.overlap.double() * valid).sum(1), valid.double().sum(0)
        tokens, counted = share.new_tensor(len(pack.ids_P)), acceptance.counts(outcome)
        return Sums(share, tokens, terms_T, torch.zeros_like(terms_T), overlap_VJ, valid_J, counted)

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(a + b for a, b in zip(self, other)))

    def reduced(self) -> "Sums":
        """Over all ranks, in one collective."""
        flat = torch.cat([t.flatten() for t in self])
        dist.all_reduce(flat)
        return Sums(*(part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in self]), self)))


class _Run:
    """The state of one training run: engine, data, checkpoints, log."""

    def __init__(self, recipe: TrainRecipe, run_dir: Path, device: torch.device):
        self.recipe, self.run_dir, self.device = recipe, run_dir, device
        self.accumulation, self.world = recipe.train.batch // world_size(), world_size()
        self.doing = "starting"
        self.heart = Heartbeat(lambda: self.doing, silent=rank() != 0)
        self.reader = open_cache(recipe, barrier())
        self._refuse_another_run()

    def go(self) -> None:
        """Start, then train to the last step. What takes long is heard of by the clock."""
        with self.heart:
            self._start()
            self._train()

    def _start(self) -> None:
        """Target, drafter, engine and data."""
        recipe, run_dir, device = self.recipe, self.run_dir, self.device
        config = drafter_config(recipe, self.reader.manifest)
        bf16 = uses_bf16(recipe, device)
        # Every rank of a host holds one for a moment: in a bf16 run there is no use for a float32 one of twice the size.
        dtype = {"dtype": "bfloat16"} if bf16 and recipe.target.dtype == "auto" else {}
        target = load_target(recipe.target.model_copy(update={"device": "cpu"} | dtype))
        check_target(target.architecture, target.weights_hash(), self.reader.manifest, recipe.cache.dir)
        training, validation = split(self.reader, recipe.train.validation_documents)
        counts_V = token_counts(self.reader, training, config.architecture.vocab_size) if config.draft_vocab else None
        drafter = new_drafter(config).start(target, target.frozen_head, counts_V)
        if config.lm and recipe.view.positions == "in_cache":
            drafter.check_in_cache()
        if recipe.reuse.gate.zero_delta:
            for fuse in drafter.fusions:
                torch.nn.init.zeros_(fuse.delta.weight)
        if recipe.drafter.warm_start and latest(run_dir / "checkpoints") is None:
            check_warm_start(recipe.drafter.warm_start, config)
            taken, left = warm_start(drafter, recipe.drafter.warm_start, target.frozen_head)
            self._say(
                f"{recipe.drafter.warm_start}: {len(taken)} tensors taken, as drafter.start says: {', '.join(left) or 'none'}"
            )
            if other_positions(recipe.drafter.warm_start, config):
                self._say(f"{recipe.drafter.warm_start} knows another rotary embedding than the target's, which it gets")
        head = target.frozen_head.to(device, torch.bfloat16 if bf16 else torch.float32)
        del target
        weight_J = None if recipe.objective.weights == "dpace" else slot_weights(recipe.objective, config.draft_length)
        attend, drafter.recompute = attention(recipe, device, config.architecture.head_dim), recipe.train.recompute
        if recipe.train.fp8:
            drafter.use_fp8()
        if recipe.train.compile and device.type == "cuda" and recipe.deepspeed.stage < 3:
            drafter.compile_parts()
        self.view_sampler = recipe.view_sampler
        views = {"view_weights": self.view_sampler.weights, "detach": recipe.objective.detach} if self.view_sampler else {}
        objective = Objective(drafter, head, recipe.loss, weight_J, attend, recipe.train.chunk_rows, recipe.view, **views)
        optimizer = torch.optim.AdamW(
            parameter_groups(drafter, recipe),
            lr=recipe.train.lr,
            betas=recipe.train.betas,
            weight_decay=recipe.train.weight_decay,
            fused=True,
        )
        self.engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=engine_config(recipe, bf16))
        self.objective, self.drafter = objective, drafter
        names, pack_tokens, seed = config.tensors, recipe.train.pack_tokens, recipe.train.seed
        queries = [f"query.{i}" for i in sorted(set(config.query_layers) & set(self.reader.manifest.query_layers))]
        complete = len(queries) == len(set(config.query_layers))  # else they are of no use to the diagnostics
        prefix = recipe.objective.prefix and (config.draft_length, recipe.objective.prefix)
        learnt, diagnosed = queries * (recipe.loss.query_align > 0), queries * complete
        self.budgets = self.view_sampler.judged if self.view_sampler else [FULL]
        drawn = fixed = {"batch": recipe.train.batch}
        if self.view_sampler:
            ages = lambda id, anchors, pass_number: sample_ages(id, anchors, recipe.view.lasts, seed, pass_number)
            fixed = drawn | {"ages": ages, "budgets": lambda step, id: self.budgets}
            drawn = drawn | {"ages": ages, "budgets": self.view_sampler.budgets}
        anchors, judged = recipe.objective.anchors, recipe.train.validation_anchors
        self.stream = PackStream(self.reader, training, names + learnt, pack_tokens, anchors, seed, prefix=prefix, **drawn)
        self.validation = PackStream(
            self.reader, validation, names + diagnosed, pack_tokens, judged, seed, shuffle=False, **fixed
        )
        self.checkpoints = Checkpoints(run_dir / "checkpoints", self.engine, drafter, rank(), recipe.train.keep_last)

    def _train(self) -> None:
        """From the newest checkpoint to the last step."""
        alpha_VJ = self.objective.alpha_VJ
        state = {"step": 0, "best": 0.0, "best_step": 0, "alpha": alpha_VJ.tolist()} | (self.checkpoints.load() or {})
        self.objective.alpha_VJ = torch.tensor(state["alpha"], dtype=torch.float64, device=self.device).view(alpha_VJ.shape)
        done, self.best, self.best_step, last = state["step"], state["best"], state["best_step"], self.recipe.train.max_steps
        self.tracker = self._tracker(done) if rank() == 0 else None
        if done == 0:
            size = sum(getattr(p, "ds_numel", p.numel()) for p in self.objective.parameters())  # ZeRO-3 leaves numel at 0
            self._say(
                f"{size:,} parameters, "
                f"{len(self.stream.documents):,} training and {len(self.validation.documents):,} validation documents, "
                f"{self.world} rank(s), {self.accumulation} pack(s) a rank and step -> {self.run_dir}"
            )
            longest = min(int(self.reader.lengths.max()), self.recipe.train.pack_tokens)
            if self.view_sampler and longest <= min(self.budgets):
                self._say(f"no document shows more than {longest} tokens: every view is the full one (data.long=join joins them)")
        else:
            self._say(f"resuming {self.run_dir} after step {done}")
        workers = 0 if isinstance(self.reader, LiveReader) else self.recipe.train.workers  # one target: one thread runs it
        self.packs = loaded(self.stream, self._share(done, last), self.device, workers)
        window, since, self.waited = [], time.monotonic(), 0.0
        began = time.monotonic()
        for step in range(done + 1, last + 1):
            self.doing = self._progress(step - 1, step - 1 - done, time.monotonic() - began)
            saves = step % self.recipe.train.save_every == 0 or step == last
            window.append(self._step(step, saves))
            if saves or step % self.recipe.train.log_every == 0:  # no window crosses a checkpoint: a resumed run logs the same
                self._log(step, window, time.monotonic() - since)
                window, since, self.waited = [], time.monotonic(), 0.0
            if saves:
                self._save(step)
                since = time.monotonic()
        if done >= last:
            self._say(f"{self.run_dir} is finished: {last} steps, best tau {self.best:.3f}")
        if self.tracker:
            self.tracker.close()

    def _step(self, step: int, saves: bool) -> Sums:
        """One optimizer step; what it summed over all packs and ranks."""
        since = time.monotonic()
        packs = list(islice(self.packs, self.accumulation))
        self.waited += time.monotonic() - since
        weight_T = torch.stack([self.objective.weight_sums(pack) for pack in packs]).sum(0)
        dist.all_reduce(weight_T)
        for fuse in self.drafter.fusions:
            fuse.held.fill_(step <= self.recipe.reuse.gate.hold_steps)
        total, finite = None, []
        for number, pack in enumerate(packs):
            outcome = self.engine(pack, weight_T)
            # DeepSpeed divides the sum of gradients by world x accumulation; the loss is a mean over all of them.
            self.engine.backward(outcome.share * (self.world * self.accumulation))
            sums = Sums.of(outcome, pack)
            total = sums if total is None else total + sums
            finite.append(outcome.share.detach().isfinite())  # looked at once a step: the host need not wait for every pack
            if number == len(packs) - 1:
                total = total.reduced()
                if not total.share.isfinite():
                    culprits = [pack.names for pack, good in zip(packs, finite) if not good]
                    self._stop_on_nan(step, culprits[0] if culprits else None)
                mean_VJ = total.overlap_VJ / total.valid_J.clamp(min=1)  # a slot that never counted keeps what was known of it
                self.objective.alpha_VJ = torch.where(total.valid_J > 0, mean_VJ, self.objective.alpha_VJ)
                if saves and self.recipe.train.diagnose:
                    rows = torch.stack([self.objective.draft_rows(pack) for pack in packs]).sum()
                    dist.all_reduce(rows)
                    self.gradients = diagnostics.gradients(self.drafter, int(rows))
                if self.recipe.deepspeed.stage == 0:  # DeepSpeed reports no norm there, but every rank holds all gradients
                    gradients = [p.grad for p in self.objective.parameters() if p.grad is not None]
                    self.grad_norm = float(torch.nn.utils.get_total_norm(gradients))
            self.engine.step()
        if self.recipe.deepspeed.stage > 0:
            self.grad_norm = float(self.engine.get_global_grad_norm())
        if not math.isfinite(self.grad_norm):
            raise UserError(
                f"the gradient of step {step} is not finite though its loss is; the last checkpoint is intact. Lower train.lr"
            )
        return total._replace(weight_T=weight_T)

    def _share(self, done: int, last: int) -> Iterator[int]:
        """This rank's packs of the steps to come: dealt out so that accumulation and world size do not matter."""
        return iter(range(done * self.recipe.train.batch + rank(), last * self.recipe.train.batch, self.world))

    def _stop_on_nan(self, step: int, culprit: list[str] | None) -> None:
        culprits: list = [None] * self.world
        dist.all_gather_object(culprits, culprit)
        who, names = next((r, names) for r, names in enumerate(culprits) if names)
        raise UserError(
            f"the loss of step {step} is not finite, in rank {who}'s pack of {', '.join(names[:4])}"
            f"{' and more' if len(names) > 4 else ''}; the last checkpoint is intact. Lower train.lr, or look at "
            "the cache with data_prep/main.py mode=verify"
        )

    @torch.no_grad()
    def _validate(self) -> list[dict]:
        """Teacher-forced acceptance and loss on the validation documents, under every budget. Every rank runs the same number of
        forwards."""
        packs, slots = self.validation.passes(0), self.objective.slots
        counts_V4J = torch.zeros(len(self.budgets), 4, slots, dtype=torch.float64, device=self.device)
        loss_V2 = torch.zeros(len(self.budgets), 2, dtype=torch.float64, device=self.device)
        self.engine.eval()
        for start in range(0, len(packs), self.world):
            mine = start + rank()
            outcome = self.engine(self.validation.read(packs[min(mine, len(packs) - 1)]).to(self.device))
            counts_V4J += acceptance.counts(outcome) * (mine < len(packs))
            sums = outcome.loss.double().sum((1, 2)), outcome.valid.sum().expand(len(self.budgets))
            loss_V2 += torch.stack(sums, dim=1) * (mine < len(packs))
        self.engine.train()
        for total in (counts_V4J, loss_V2):
            dist.all_reduce(total)
        losses = (loss_V2[:, 0] / loss_V2[:, 1].clamp(min=1)).tolist()
        return [acceptance.summarise(counted) | {"loss": loss} for counted, loss in zip(counts_V4J, losses)]

    def _save(self, step: int) -> None:
        self.doing = f"step {step}: judging on held-out documents and saving"
        found = self._validate()
        taus = [one["sampled"].tau for one in found]
        tau = sum(taus) / len(taus)
        if best := tau > self.best:
            self.best, self.best_step = tau, step
        self._say(
            f"step {step}: held-out tau {taus[0]:.3f} sampled, {found[0]['greedy'].tau:.3f} greedy"
            + "".join(f", {sparse:.3f} with {budget}" for sparse, budget in zip(taus[1:], self.budgets[1:]))
            + " (best)" * best
        )
        if self.tracker:
            plain = [{kind: vars(a) if kind != "loss" else a for kind, a in one.items()} for one in found]
            by_budget = {"budget": {str(b): one for b, one in zip(self.budgets[1:], plain[1:])}} if self.view_sampler else {}
            self.tracker.log(step, {"validation": plain[0] | by_budget})
        if self.recipe.train.diagnose:
            self._diagnose(step)
        state = {"step": step, "best": self.best, "best_step": self.best_step, "alpha": self.objective.alpha_VJ.tolist()}
        self.checkpoints.save(step, state)

    @torch.no_grad()
    def _diagnose(self, step: int) -> None:
        """On the first validation pack; every rank runs the same forwards, which ZeRO-3 needs."""
        self.engine.eval()
        pack = self.validation.read(self.validation.passes(0)[0]).to(self.device)
        pack = replace(pack, budget_VN=None)
        found = diagnostics.diagnose(self.objective, [pack]) | {"gradients": self.gradients}
        self.engine.train()
        if self.tracker:
            self.tracker.log(step, {"diagnostics": found})
            diagnostics.draw(found, self.run_dir / "diagnostics.png")
            self.tracker.picture(step, "diagnostics", self.run_dir / "diagnostics.png")

    def _log(self, step: int, window: list[Sums], seconds: float) -> None:
        if rank() != 0:
            return
        total = functools.reduce(operator.add, window)
        counts_V4J = total.counts_V4J.cpu()
        found, sparse = acceptance.summarise(counts_V4J[0]), {}
        if self.view_sampler:  # the first view is the full one, where there is one
            shown = counts_V4J[int(self.view_sampler.full > 0) :].sum(0)
            sparse = {"sparse": {kind: vars(a) for kind, a in acceptance.summarise(shown).items()}}
        parts = (total.terms_T / total.weight_T.clamp(min=1e-9)).tolist()
        loss, rate = sum(parts), float(total.tokens) / seconds
        figures = {
            "loss": loss,
            **({"terms": dict(zip(TERMS, parts))} if sum(part != 0 for part in parts) > 1 else {}),
            "lr": self.engine.get_lr()[0],
            "grad_norm": self.grad_norm,
            "tokens_per_s": rate,
            "data_wait_share": self.waited / seconds,  # the host's wait for packs
            "peak_gib": _peak_gib(self.device),
            **{kind: vars(a) for kind, a in found.items()},
            **sparse,
        }
        self.tracker.log(step, figures)
        left = (self.recipe.train.max_steps - step) * seconds / len(window)
        self._say(
            f"step {step}/{self.recipe.train.max_steps}  loss {loss:.3f}  tau {found['sampled'].tau:.3f}  "
            f"{rate:,.0f} tokens/s  {left / 60:.1f} min left"
        )

    def _tracker(self, step: int) -> Tracker:
        config = {
            **self.recipe.model_dump(mode="json"),
            "git_revision": git_revision(),
            "cache_manifest_hash": self.reader.manifest.hash(),
            "world_size": self.world,
        }
        write_text(self.run_dir / "recipe.json", json.dumps(config, indent=1))
        return Tracker(self.recipe.tracking, self.run_dir, self.recipe.run.group, config, step)

    def _refuse_another_run(self) -> None:
        path = self.run_dir / "recipe.json"
        if not path.exists() or latest(self.run_dir / "checkpoints") is None:
            return
        earlier = json.loads(path.read_text())
        if differences := self.recipe.resumable_differences(earlier):
            raise UserError(
                f"{self.run_dir} holds a run of another recipe; these differ: {', '.join(differences)}. "
                "Choose another run.dir or remove that folder"
            )
        if earlier["cache_manifest_hash"] != self.reader.manifest.hash():
            raise UserError(f"{self.run_dir} was trained on another cache than {self.recipe.cache.dir}")

    def _progress(self, step: int, taken: int, seconds: float) -> str:
        """What is said of a step by the clock: `taken` steps took so many seconds, checkpoints among them."""
        whole = f"step {step}/{self.recipe.train.max_steps}"
        if not taken:
            return whole
        left = (self.recipe.train.max_steps - step) * seconds / taken
        return f"{whole}  {seconds / taken:.2g} s a step  {left / 60:.1f} min left"

    def _say(self, text: str) -> None:
        self.heart.say(text)


def _peak_gib(device: torch.device) -> float:
    """Peak memory of this process: the GPU's where there is one, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
