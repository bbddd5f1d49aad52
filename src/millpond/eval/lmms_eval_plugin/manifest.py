"""What lmms-eval reads when it lists its models. Imports nothing else of millpond: a fault here would take the other models with it."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The `ModelManifest` of `--model millpond`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="millpond", chat_class_path="millpond.eval.lmms_eval_plugin.model.Millpond")
