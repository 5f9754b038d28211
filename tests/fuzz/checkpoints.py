"""A trained drafter's folder, as eval loads it; a run's folder, as training resumes from it."""

from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file

from common import cli
from common.hashing import SUMS, file_hash, is_changed, read_sums, write_sums
from data_prep.recipe import location
from data_prep.target.architecture import Architecture
from data_prep.target.loading import load_tokenizer, tokenizer_hashes
from eval.check import check_evaluation
from eval.recipe import EvalRecipe
from tests.fuzz import Silent, copied, damaged
from tests.support.caches import bits, manifest_of
from train.drafter.build import load_drafter, new_drafter
from train.drafter.config import DrafterConfig
from train.recipe import TrainRecipe
from train.run.folder import begun, checkpoints_of, latest, refuse_another_run, write_recipe
from train.run.state import KINDS, file_name

SMALL = Architecture(6, 8, 2, 1, 4, 512, 32, 12, 1e-6, True, False, [1.0, 0.1], 1.0)
DRAFTERS = {
    "ttt": dict(objective="ttt", reuse="hybrid", draft_vocab=16, own_head=True),
    "block": dict(objective="blockwise", reuse="hidden", sequential="gru", sequential_size=4, mask_token_id=2),
}


class Checkpoints:
    def __init__(self, folder: Path):
        self.doors = {"loaded": self.load, "judged": self.judge, "resumed": self.resume}
        self.base, self.work = folder / "whole", folder / "work"
        self.drafters = {}
        tokenizer = tokenizer_hashes(load_tokenizer(location("data_prep/targets/tiny")))[0]
        for name, fields in DRAFTERS.items():
            usual = dict(target_layers=[0, 5], hidden_layers=[0, 5], slots=4, shifted=False, causal=False, seed=0, start="random")
            about = {"id": "tiny", "weights_hash": "w", "tokenizer_hash": tokenizer}
            config = DrafterConfig(**{**usual, "mask_token_id": None, "architecture": SMALL, "target": about, **fields})
            self.drafters[name] = drafter = new_drafter(config)
            with torch.no_grad():
                for number, parameter in enumerate(drafter.parameters()):
                    parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape) + number)
            drafter.save_pretrained(self.base / name)
        line = [f"drafter={self.work / 'ttt'}", f"out={folder / 'out'}", "format=drafter"]
        self.judging = [cli.compose("eval", EvalRecipe, [*line, f"mode={mode}"]) for mode in ("decode", "export")]
        self.recipe = cli.compose("train", TrainRecipe, [f"run.dir={self.work / 'run'}"])
        self.manifest = manifest_of()
        for step in (2, 4):
            engine = self.base / f"run/checkpoints/step-{step:06d}/engine"
            engine.mkdir(parents=True)
            (engine / "state.json").write_text('{"best_step": 2, "engine": {"adam_step": 4}}')
            for kind in KINDS:
                save_file({"drafter.w": torch.ones(3)}, engine / file_name(kind, 0))
            write_sums(engine, {path.name: file_hash(path) for path in engine.iterdir()})
        write_recipe(self.recipe, self.base / "run", self.manifest, world_size=1)

    def mutate(self, random: Random) -> str:
        copied(self.base, self.work)
        if random.random() < 0.3:
            place = self.work / "run"
            return f"run: {damaged(random.choice([place, place / 'checkpoints']), random)}"
        place = self.work / random.choice(list(DRAFTERS))
        self.sealed = random.random() < 0.6
        if not self.sealed:  # as somebody does who changes a drafter by hand
            (place / SUMS).unlink()
        return f"{place.name}{'' if self.sealed else ' without ' + SUMS}: {damaged(place, random)}"

    def load(self) -> str:
        for name, whole in self.drafters.items():
            found = load_drafter(self.work / name)
            mine, theirs = whole.weights(), found.weights()
            if mine.keys() != theirs.keys() or any(not torch.equal(bits(mine[one]), bits(theirs[one])) for one in mine):
                return self._other(f"other weights of {name}")
            if found.config != whole.config:
                return self._other(f"another configuration of {name}")
        return "harmless"

    def _other(self, what: str) -> str:
        if self.sealed:
            raise Silent(what)
        return "accepted as changed by hand"

    def judge(self) -> str:
        for recipe in self.judging:
            check_evaluation(recipe)
        return "accepted"

    def resume(self) -> str:
        run = self.work / "run"
        recipe = self.recipe.going_on(begun(run))
        TrainRecipe.model_validate(recipe.model_dump())
        refuse_another_run(recipe, run, self.manifest)
        engine = latest(checkpoints_of(run)) / "engine"
        try:  # as `Checkpoints.load` does, which needs an engine
            return "refused" if any(is_changed(engine / name) for name in read_sums(engine)) else "accepted"
        except (OSError, ValueError):
            return "refused"
