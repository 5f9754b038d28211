"""`make quickstart`'s script: the drafter it trains is worth something on text that neither it nor its target has seen."""

import json
import os
import subprocess

import pytest

from tests.support.commands import ROOT

pytestmark = pytest.mark.slow
SHORTER = {"TOKENS": "120000", "STEPS": "250", "PROMPTS": "6"}  # a third of the text, half of the steps and of the prompts


def test_the_trained_drafter_beats_every_control(tmp_path):
    words = ["bash", str(ROOT / "launchers/quickstart.sh"), str(tmp_path)]
    done = subprocess.run(words, env={**os.environ, **SHORTER}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert len(report["drafter"]["target_layers"]) <= 2
    for temperature in ("0", "1"):
        assert report["temperatures"][temperature]["lossless"]
    warm = report["temperatures"]["1"]
    assert warm["tau_micro"] >= 1.5
    for name in ("untrained", "zero_memory", "shuffled_memory", "prompt_lookup"):
        assert warm["tau_micro"] > warm["controls"][name]["tau_micro"] + 0.1, name
    assert (tmp_path / "report/report.png").exists()
