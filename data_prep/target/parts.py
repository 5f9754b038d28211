"""A target of which a few weights are read, by name, from its files: what a drafter starts from and says tokens with.

A rank of a training needs the embedding, the LM head and at most a few layers. The others stay on the disk.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import cached_file

from common.errors import UserError, first_line
from common.ranks import rank
from data_prep.target import checkpoint_private, quantised, transformers_private
from data_prep.target.architecture import kind_of, no_causal_lm, read_config
from data_prep.target.described import Described, hash_of
from data_prep.target.from_gguf import plain
from data_prep.target.target import Target

MAPPED = 2**28  # bytes of a file that are read before it is closed: as long as it is open, they count as this process's memory


class _NotByName(Exception):
    """The files do not say a weight in a way that is read here. The model has to be loaded."""


class TargetParts(Described):
    """A target in `dtype`. Weights are read when they are asked for. Where the files do not have them under a known
    name (quantised ones, other formats than safetensors), the whole target is loaded, and a line says so.

    Raises:
        UserError: there is no causal LM at `path`.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
    ):
        self.path = path
        self.revision = revision
        self.dtype = dtype
        self.device = torch.device(device)
        self.folder = plain(path, revision)
        self.trust_remote_code = trust_remote_code
        self._whole: Target | None = None
        config = read_config(path, self.folder, revision, trust_remote_code)
        self.quantisation = quantised.quantisation_of(path, revision, config)
        if trust_remote_code:
            self._load_whole("its code is its own")
            return
        try:
            self.model = checkpoint_private.skeleton(config, dtype, kind_of(config))
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise no_causal_lm(path, error) from error
        self.config = transformers_private.text_config(self.model)
        # Before a weight is read: what cannot be a target is refused as such.
        self._look_inside()
        self._need(lambda: [self.model.get_input_embeddings(), self.model.get_output_embeddings()])
        self._look_inside()

    def layer_weights(self, index: int) -> dict[str, Tensor]:
        self._need(lambda: [self.layers[index]])
        return super().layer_weights(index)

    @property
    def final_norm_weight(self) -> Tensor:
        return self.final_norm.weight

    @property
    def final_norm(self) -> nn.Module:
        """The norm behind the last layer, with its weights."""
        self._need(lambda: [transformers_private.final_norm(self.model)])
        return transformers_private.final_norm(self.model)

    def weights_hash(self) -> str:
        """`Target.weights_hash`, from the files, of which one tensor at a time is in memory (of experts, a layer's)."""
        if (stored := self.hash_of_quantised()) is not None:
            return stored
        if self._whole is None:
            try:
                return self._hash_of_files()
            except NOT_BY_NAME as error:
                self._load_whole(first_line(error))
        return self._whole.weights_hash()

    def _need(self, modules: Callable[[], list[nn.Module]]) -> None:
        """Give `modules` their weights."""
        if self._whole is not None:
            return
        try:
            for module in modules():
                self._weights.fill(module)
            self._weights.close()
        except NOT_BY_NAME as error:
            self._load_whole(first_line(error))

    @cached_property
    def _weights(self) -> "_Weights":
        # Once: what becomes of each of the files' names is found by patterns, of which a mixture of experts has many to try.
        return _Weights(self)

    def _hash_of_files(self) -> str:
        def loaded(name: str) -> Tensor:
            value = self._weights.value(name)
            # Of bf16 numbers, which are hashed, float16 alone does not hold all.
            return value.to(self.dtype) if self.dtype == torch.float16 else value

        found = hash_of(sorted(self._weights.own), loaded)
        self._weights.close()
        return found

    def _load_whole(self, why: str) -> None:
        if rank() == 0:
            said = f"its weights cannot be read by name ({why}); the whole model is loaded"
            print(f"target {self.path}: {said}", flush=True)
        trust = self.trust_remote_code
        self._whole = Target(self.path, self.revision, self.dtype, self.device, trust_remote_code=trust)
        self.quantisation = self._whole.quantisation
        self.model = self._whole.model
        self.config = self._whole.config
        self._look_inside()


# Files that are absent or damaged, and releases of transformers that load in another way.
NOT_BY_NAME = (_NotByName, OSError, SafetensorError, ImportError, AttributeError, TypeError, ValueError, KeyError, RuntimeError)


class _Weights:
    """The parameters of a model without values, and the files that have them."""

    def __init__(self, target: TargetParts):
        self._target = target
        self._model = target.model
        self._files = self._found()
        self._open: dict[str, safe_open] = {}
        self._mapped = 0
        self.own = self._model.state_dict(keep_vars=True)
        self._origins = checkpoint_private.origins(self._model, self._files)

    def fill(self, module: nn.Module) -> None:
        """Read the parameters of a module that have no values yet."""
        for part in module.modules():
            for _, parameter in part.named_parameters(recurse=False):
                if parameter.is_meta:
                    value = self._only_value(parameter).to(self._target.device, self._target.dtype)
                    self._put(parameter, nn.Parameter(value, requires_grad=False))

    def _only_value(self, parameter: nn.Parameter) -> Tensor:
        """Files may have a tied parameter twice. Raises _NotByName where it is not the same."""
        names = [name for name, one in self.own.items() if one is parameter]
        values = [self.value(name) for name in names if name in self._origins] or [self.value(names[0])]
        if not all(torch.equal(values[0], other) for other in values[1:]):
            raise _NotByName(f"{' and '.join(names)} are one and differ")
        return values[0]

    def _put(self, hollow: nn.Parameter, parameter: nn.Parameter) -> None:
        """Wherever a tied parameter stands."""
        for module in self._model.modules():
            for key, one in module.named_parameters(recurse=False):
                if one is hollow:
                    setattr(module, key, parameter)

    def value(self, name: str) -> Tensor:
        """As the files have it. Raises _NotByName where they do not have it, or in another shape."""
        own = self.own[name]
        named = name if name in self._origins else next((n for n in self._origins if self.own[n] is own), None)
        if named is None:
            raise _NotByName(f"no tensor is {name}")
        value = checkpoint_private.made(self._model, named, self._origins[named], self._read)
        if value.shape != own.shape or not value.dtype.is_floating_point or value.dtype.itemsize < 2:
            raise _NotByName(f"{name} is {value.dtype} of shape {list(value.shape)}")
        # Unlike the loaded model's, no forward tells.
        if value.numel() and not torch.stack(torch.aminmax(value)).isfinite().all():
            raise UserError(f"target.path={self._target.path}: {name} of its files has numbers that are not finite")
        return value

    def _read(self, name: str) -> Tensor:
        file = self._files[name]
        if self._mapped > MAPPED:
            self.close()
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        value = self._open[file].get_tensor(name)
        self._mapped += value.nbytes
        return value

    def close(self) -> None:
        """The files, until the next tensor is read."""
        self._open.clear()
        self._mapped = 0

    def _found(self) -> dict[str, str]:
        """Name of a tensor -> its file."""
        folder = self._target.folder
        names = quantised.tensor_files(folder, self._target.revision)
        if not names:
            raise _NotByName("there are no safetensors")
        files = {file: cached_file(folder, file, revision=self._target.revision) for file in set(names.values())}
        return {name: files[file] for name, file in names.items()}
