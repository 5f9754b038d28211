"""Public checkpoints: their layouts, at a small size, compute what the speculators package computes; what cannot be is refused by
name.

Configurations have the keys of EAGLE3-LLaMA3.1-Instruct-8B, of z-lab's DFlash drafters and of RedHatAI's speculators; weights are
random.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from common.errors import UserError
from data_prep.target.target import Target
from tests.support.served_drafters import (
    ANCHORS,
    assert_same,
    block_logits,
    drafter_for,
    eagle3_logits,
    four_slots,
    imported,
    logits_of,
    refused,
)
from tests.support.speculators_models import TINY, package, real_ids
from train.drafter.build import load_config
from train.drafter.formats.export import save_export
from train.drafter.formats.names import MASK_FILE, method_of


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A target with as many layers as the servers' default layers need, on disk with a tokenizer; and text."""
    folder = tmp_path_factory.mktemp("deep")
    torch.manual_seed(0)
    sizes = dict(vocab_size=8192, hidden_size=64, intermediate_size=96, num_hidden_layers=8, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, initializer_range=0.1, rope_theta=500000.0))
    model.save_pretrained(folder)
    for file in TINY.glob("tokenizer*"):
        shutil.copy(file, folder)
    target = Target(str(folder))
    target.capture(range(8), [])
    ids = real_ids()
    return target, (torch.tensor(ids), target.forward(torch.tensor([ids])).map(lambda t: t[0]))


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype=torch.float16) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    return {
        name: (torch.randn(shape, generator=g) * (0.2 if len(shape) > 1 else 0.1) + (len(shape) == 1)).to(dtype)
        for name, shape in shapes.items()
    }


def layer_shapes(prefix: str, inputs: int, hidden=64, heads=4, groups=2, size=16, inner=96) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.self_attn.q_proj.weight": (heads * size, inputs),
        f"{prefix}.self_attn.k_proj.weight": (groups * size, inputs),
        f"{prefix}.self_attn.v_proj.weight": (groups * size, inputs),
        f"{prefix}.self_attn.o_proj.weight": (hidden, heads * size),
        f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
        f"{prefix}.mlp.up_proj.weight": (inner, hidden),
        f"{prefix}.mlp.down_proj.weight": (hidden, inner),
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
    }


def vocabulary_maps(size: int) -> dict[str, torch.Tensor]:
    kept_D = torch.arange(8192)[torch.randperm(8192, generator=torch.Generator().manual_seed(1))[:size]].sort().values
    t2d = torch.zeros(8192, dtype=torch.bool).index_fill_(0, kept_D, True)
    return {"d2t": kept_D - torch.arange(size), "t2d": t2d}


def write(folder, config: dict, tensors: dict[str, torch.Tensor]):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")


EAGLE3_8B = {  # as EAGLE3-LLaMA3.1-Instruct-8B says it, at this size: no layers, no head_dim, no rope_theta, few positions
    "architectures": ["LlamaForCausalLMEagle3"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.28.1",
    "use_cache": True,
    "vocab_size": 8192,
    "draft_vocab_size": 600,
}


def eagle3_tensors(dtype=torch.float16) -> dict[str, torch.Tensor]:
    shapes = layer_shapes("midlayer", 128)
    shapes |= {"midlayer.hidden_norm.weight": (64,), "fc.weight": (64, 192), "norm.weight": (64,), "lm_head.weight": (600, 64)}
    return random_tensors(shapes, dtype) | vocabulary_maps(600)


def test_a_published_eagle3_checkpoint_is_read(deep, tmp_path):
    """Its layers are the servers' default: the inputs of 2, L/2, L - 3. The package converts it and computes the same."""
    package()
    from speculators import Eagle3DraftModel
    from speculators.convert import convert_model

    target, text = deep
    write(tmp_path / "published", EAGLE3_8B, eagle3_tensors())
    drafter = imported(tmp_path / "published", target)
    config = drafter.config
    assert (config.hidden_layers, config.slots, config.positions, config.draft_vocab) == ([1, 3, 4], 7, 512, 600)
    assert config.architecture.inv_freq != target.architecture.inv_freq  # theta is 10,000 where nothing says otherwise
    with pytest.raises(UserError, match="format=eagle3 has the target's rotary embedding; this drafter"):
        save_export(drafter, target, tmp_path / "again", "eagle3")
    assert not (tmp_path / "again").exists()
    convert_model(str(tmp_path / "published"), target.path, "eagle3", str(tmp_path / "converted"))
    model = Eagle3DraftModel.from_pretrained(str(tmp_path / "converted")).float().eval()
    torch.nn.init.constant_(model.embed_tokens.weight, torch.nan)  # as tests/train/test_export.py says
    model.load_verifier_weights()
    assert model.config.eagle_aux_hidden_state_layer_ids == [2, 4, 5]
    assert_same(eagle3_logits(model, text, ANCHORS, 7), logits_of(target, drafter, text, ANCHORS))
    # The converted folder is a speculators checkpoint of three steps, with an embedding table of its own: the target's.
    assert_same(four_slots(target, imported(tmp_path / "converted", target), text), four_slots(target, drafter, text)[:, :3])


def test_a_published_dflash_checkpoint_is_read(deep, tmp_path):
    """z-lab's keys: block_size beside dflash_config, an embedding and an LM head that are the target's and not stored."""
    package()
    from speculators import SpeculatorModel

    target, text = deep
    config = {
        "architectures": ["DFlashDraftModel"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "block_size": 6,
        "dflash_config": {"mask_token_id": 5, "target_layer_ids": [1, 3, 5]},
        "dtype": "bfloat16",
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "layer_types": ["full_attention", "full_attention"],
        "max_position_embeddings": 40960,
        "max_window_layers": 2,
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "num_target_layers": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 8192,
    }
    shapes = {"fc.weight": (64, 192), "hidden_norm.weight": (64,), "norm.weight": (64,)}
    for i in range(2):
        shapes |= layer_shapes(f"layers.{i}", 64)
        shapes |= {f"layers.{i}.self_attn.{name}.weight": (16,) for name in ("q_norm", "k_norm")}
    write(tmp_path / "published", config, random_tensors(shapes, torch.bfloat16))
    drafter = imported(tmp_path / "published", target)
    assert (drafter.config.hidden_layers, drafter.config.slots, drafter.config.mask_token_id) == ([1, 3, 5], 6, 5)
    assert torch.equal(drafter.mask.weight[0], target.frozen_head.embedding_VE[5])
    model = SpeculatorModel.from_pretrained(str(tmp_path / "published"), verifier=target.path).float().eval()
    model.load_verifier_weights()
    assert_same(block_logits(model, text, ANCHORS), logits_of(target, drafter, text, ANCHORS))


def test_a_published_speculators_checkpoint_is_read(deep, tmp_path):
    """The keys of RedHatAI's: the verifier by its name on the hub, norm_before_residual, three tokens a round."""
    package()
    from speculators import Eagle3DraftModel

    target, text = deep
    config = {
        "architectures": ["Eagle3Speculator"],
        "auto_map": {"": "eagle3.Eagle3SpeculatorConfig"},
        "draft_vocab_size": 600,
        "eagle_aux_hidden_state_layer_ids": None,
        "embed_requires_grad": False,
        "has_no_defaults_at_init": False,
        "norm_before_residual": True,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"accept_tolerance": 0.0, "proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1}
            ],
            "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "somebody/llama-8b"},
        },
        "speculators_model_type": "eagle3",
        "speculators_version": "0.1.0.dev42",
        "target_hidden_size": None,
        "torch_dtype": "bfloat16",
        "transformer_layer_config": {
            "attention_bias": False,
            "head_dim": 16,
            "hidden_act": "silu",
            "hidden_size": 64,
            "intermediate_size": 96,
            "max_position_embeddings": 40960,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 4,
            "num_hidden_layers": 1,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "vocab_size": 8192,
        },
        "transformers_version": "4.55.4",
    }
    tensors = {name.replace("midlayer", "layers.0"): t for name, t in eagle3_tensors(torch.bfloat16).items()}
    tensors["embed_tokens.weight"] = target.frozen_head.embedding_VE.to(torch.bfloat16)
    write(tmp_path / "published", config, tensors)
    drafter = imported(tmp_path / "published", target)
    assert (drafter.config.slots, drafter.config.hidden_layers) == (3, [1, 3, 4])
    assert load_config(tmp_path / "published", lambda: target.architecture).target["id"] == "somebody/llama-8b"
    config["speculators_config"]["verifier"]["name_or_path"] = target.path  # where the package looks for its embedding
    write(tmp_path / "local", config, tensors)
    model = Eagle3DraftModel.from_pretrained(str(tmp_path / "local")).float().eval()
    torch.nn.init.constant_(model.embed_tokens.weight, torch.nan)
    model.load_verifier_weights()
    assert_same(eagle3_logits(model, text, ANCHORS, 3), logits_of(target, drafter, text, ANCHORS))


# What cannot be


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"hidden_size": 128}, "is for targets of hidden size 128; this target has 64"),
        ({"vocab_size": 32000}, "is for targets of 32000 tokens; this target has 8192"),
        ({"target_hidden_size": 128}, "projects states of size 128"),
        ({"norm_before_fc": True}, "has norm_before_fc"),
        ({"eagle_config": {"norm_before_fc": True}}, "has norm_before_fc"),
        ({"fc_norm": True}, "lacks the tensor fc_norm.0.weight .in all 3"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "as EAGLE-1"),
        ({"logit_scale": 0.5}, "scales its logits .logit_scale=0.5"),
        ({"hidden_act": "gelu"}, "has MLPs of gelu"),
        ({"is_neox_style": False}, "rotates interleaved pairs of a head"),
        ({"rope_is_neox_style": False}, "rotates interleaved pairs of a head"),
        ({"use_gemma_norm": True}, "has Gemma's norms"),
        ({"num_aux_hidden_states": 5, "eagle_aux_hidden_state_layer_ids": [2, 4, 5]}, "says that it reads 5 hidden states"),
        ({"draft_vocab_size": 500}, "has draft_vocab_size=500, and d2t of 600 tokens"),
        ({"model_type": "gemma2"}, "has layers of model_type=gemma2; those of llama and qwen3 are read"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' changes with the length"),
        ({"layer_types": ["sliding_attention"], "sliding_window": 128}, "sees 128 positions back"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 4, 5]}, "reads the outputs of layers .-1, 3, 4.; the target has layers 0 to 7"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 4, 9]}, "reads the outputs of layers .1, 3, 8."),
        (
            {"eagle_aux_hidden_state_layer_ids": [2, 4, 5], "eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 4, 5]}},
            "names the layers that it reads twice",
        ),
        ({"eagle_aux_hidden_state_layer_ids": [2, 5]}, "do not fit its config.json"),
        ({"head_dim": 32}, "do not fit its config.json"),
        ({"rms_norm_eps": "small"}, "configuration cannot be read"),
        ({"eagle_config": 5}, "config.json is of no checkpoint that is known"),
        ({"eagle_aux_hidden_state_layer_ids": ["first"]}, "config.json is of no checkpoint that is known"),
    ],
)
def test_a_configuration_that_no_drafter_can_be_is_refused_by_name(deep, tmp_path, changes, message):
    write(tmp_path / "one", EAGLE3_8B | changes, eagle3_tensors())
    refused(tmp_path / "one", deep[0], message)


ROW = torch.ones(64)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"d2t": None}, "says 600 tokens .draft_vocab_size., and not which"),
        ({"d2t": torch.zeros(600, dtype=torch.long)}, "has d2t and t2d that name other tokens"),
        ({"d2t": torch.zeros(600)}, "has d2t of torch.float32, which holds no offsets"),
        ({"d2t": torch.full((600,), 9999)}, "has d2t with tokens twice, or beyond the vocabulary"),
        ({"norm.weight": None}, "lacks the tensor norm.weight"),
        ({"midlayer.self_attn.o_proj.bias": ROW}, "no drafter here has, layers.0.self_attn.o_proj.bias"),
        ({"input_norm.weight": ROW}, "no drafter here has, input_norm.weight"),
        ({"midlayer.self_attn.q_norm.weight": torch.ones(16)}, "lacks the tensor layers.0.self_attn.k_norm.weight"),
        ({"embed_tokens.weight": torch.ones(8192, 64)}, "has an embedding of its own: 8192 rows are not the target's"),
        ({"embed_tokens.weight": torch.ones(9, 64)}, r"has an embedding of its own, \[9, 64\]"),
        ({"mask_hidden": torch.ones(1, 192)}, "names no MASK"),
    ],
)
def test_a_tensor_without_a_place_is_refused_by_name(deep, tmp_path, changes, message):
    tensors = eagle3_tensors() | changes
    write(tmp_path / "one", EAGLE3_8B, {name: t for name, t in tensors.items() if t is not None})
    refused(tmp_path / "one", deep[0], message)


def test_other_folders_are_refused_by_name(deep, tmp_path):
    target = deep[0]
    layer = {"layers.0.mlp.up_proj.weight": ROW}
    for name, config, tensors, message in (
        ("none", {"architectures": ["LlamaForCausalLM"]}, {"fc.weight": ROW}, "is a LlamaForCausalLM; what is read:"),
        ("two", {"architectures": ["DFlash2DraftModel"]}, {"fc.weight": ROW}, "is a DFlash2DraftModel"),
        ("mtp", {"speculators_model_type": "mtp"}, {"fc.weight": ROW}, "is speculators' mtp"),
        ("dspark", EAGLE3_8B | {"architectures": ["Qwen3DSparkModel"], "markov_head_type": "rnn"}, layer, "has a rnn Markov"),
        (
            "domino",
            {"architectures": ["DFlashDraftModel"], "dflash_config": {"projector_type": "domino"}},
            {"fc.weight": ROW},
            "has dflash_config.projector_type=domino",
        ),
        (
            "conv",
            {"architectures": ["DFlashDraftModel"], "dflash_config": {"conv_kernel_size": 2}},
            {"fc.weight": ROW},
            "says dflash_config.conv_kernel_size, which is not known here",
        ),
    ):
        write(tmp_path / name, config, tensors)
        refused(tmp_path / name, target, message)
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle/config.json").write_text(json.dumps(EAGLE3_8B))
    (tmp_path / "pickle/pytorch_model.bin").write_bytes(b"")
    refused(tmp_path / "pickle", target, "pytorch_model.bin, a pickle, which is not read: convert it to model.safetensors")
    (tmp_path / "pickle/pytorch_model.bin").unlink()
    refused(tmp_path / "pickle", target, "holds no weights")
    (tmp_path / "pickle/model.safetensors").write_bytes(b"cut")
    refused(tmp_path / "pickle", target, "its weights cannot be read")


def block_for(target, **changes):
    return drafter_for(target, "blockwise", hidden_layers=[1, 3, 5], target_layers=[1], mask_token_id=5, **changes)


@pytest.mark.parametrize(
    "stored,message",
    [
        (b"garbage", "its MASK or its Markov head cannot be read"),
        ({"mask_token_id": 3, "embedding": torch.ones(64)}, "has a mask_embedding.pt for token 3, and mask_token_id=5"),
        ({"mask_token_id": 5}, "its MASK or its Markov head cannot be read"),
        (torch.ones(63), "has a MASK that is no embedding of size 64"),
    ],
    ids=["no pickle", "another token", "no embedding", "another size"],
)
def test_a_mask_that_is_none_is_refused(deep, tmp_path, stored, message):
    target = deep[0]
    save_export(block_for(target), target, tmp_path, "dflash")
    if isinstance(stored, bytes):
        (tmp_path / MASK_FILE).write_bytes(stored)
    else:
        torch.save(stored, tmp_path / MASK_FILE)
    refused(tmp_path, target, message)


@pytest.mark.parametrize(
    "changes,message", [({"mask_token_id": -1}, "has mask_token_id=-1"), ({"block_size": -4}, "drafts -4 tokens")]
)
def test_numbers_that_mean_nothing_are_refused(deep, tmp_path, changes, message):
    target = deep[0]
    save_export(block_for(target), target, tmp_path, "dflash")
    written = json.loads((tmp_path / "config.json").read_text())
    nested = {name: value for name, value in changes.items() if name in written["dflash_config"]}
    written |= changes | {"dflash_config": written["dflash_config"] | nested}
    (tmp_path / "config.json").write_text(json.dumps(written))
    refused(tmp_path, target, message)


def test_blocks_are_as_long_as_their_servers_count(deep, tmp_path):
    """DFlash's block_size counts the anchor's slot; DSpark's counts what is drafted."""
    target = deep[0]
    for changes in ({}, {"sequential": "markov", "sequential_size": 8}, {"shifted": True}):
        drafter = block_for(target, **changes)
        for format in (method_of(drafter.config), "speculators"):
            save_export(drafter, target, tmp_path / format, format)
            assert imported(tmp_path / format, target).config.draft_length == drafter.config.draft_length
