"""What is declared of servers (`Family.served`) is what the classes of the installed vLLM declare."""

import json
import subprocess

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from data_prep.target.families import FAMILIES, SERVER
from tests.support.commands import ROOT, without_vllm

PYTHON = ROOT / ".venv-serving/bin/python"
SCRIPT = """
import json, sys, vllm
from vllm.model_executor.models.interfaces import supports_eagle3
from vllm.model_executor.models.registry import ModelRegistry

def supports(name):
    if name not in ModelRegistry.models:
        return False
    try:
        return supports_eagle3(ModelRegistry.models[name].load_model_cls())
    except ImportError:  # vLLM's classes of models that read pictures need torchvision
        return None

print(json.dumps([vllm.__version__, {name: supports(name) for name in sys.argv[1:]}]))
"""


@pytest.mark.slow
def test_served_families_are_those_of_vllm():
    if why := without_vllm():
        pytest.skip(why)
    known = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES | MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    names = {family: known[family] for family in FAMILIES}
    done = subprocess.run([PYTHON, "-c", SCRIPT, *set(names.values())], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    version, supports = json.loads(done.stdout.strip().splitlines()[-1])
    assert f"vLLM {version}".startswith(SERVER)
    found = {family: supports[name] for family, name in names.items() if supports[name] is not None}
    assert found == {family: FAMILIES[family].served is None for family in found}
    assert {"llama", "gpt_oss", "glm4_moe", "deepseek_v3"} <= found.keys()
