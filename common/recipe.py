"""What every configuration has in common: where the repository is, and how strictly a group of keys is read."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

ROOT = Path(__file__).resolve().parents[1]


class Section(BaseModel):
    """A group of keys. Unknown keys are refused; nothing changes after composition."""

    # The string below a key is its description: docs/reference/generate.py writes tables and YAML comments from it.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
