"""wejepa: I-JEPA to learn, to run and to change. Start with `default_config` and `launch_pretraining`; `dir(wejepa)` shows the rest.

A name's module is imported when the name is first asked for, so that `import wejepa` is immediate and imports no torch.
"""

import importlib

__version__ = "0.1.0"

_MODULES = {
    "wejepa.config": ("IJepaConfig", "adapt_config_for_backbone", "default_config", "hf224_config", "photos96_config"),
    "wejepa.model": ("IJEPA_base",),
    "wejepa.data": ("as_source", "available_datasets", "load_images"),
    "wejepa.train.pretrain": ("launch_pretraining",),
    "wejepa.train.loop": ("Pretraining",),
    "wejepa.train.callbacks": ("Callback",),
    "wejepa.train.checkpoints": ("load_model",),
    "wejepa.train.finetune": ("FinetuneConfig", "compare_pretrained_vs_scratch", "train_linear_probe"),
    "wejepa.collection": ("Collection",),
    "wejepa.pretrained": ("load_pretrained",),
    "wejepa.interop": ("export", "from_huggingface", "from_meta"),
}
__all__ = sorted(name for names in _MODULES.values() for name in names)


def __getattr__(name: str):
    module = next((module for module, names in _MODULES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module 'wejepa' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
