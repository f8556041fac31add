"""wejepa: I-JEPA to learn, to run and to change. Start with `wejepa.config.default_config` and `wejepa.train.pretrain`."""

__version__ = "0.1.0"
