"""Images by name, from a folder or from a Dataset, as the batches of a run.

Every random choice is derived from (seed, epoch, step), so a run that stops in between goes on as if it had not.
"""

from wejepa.data.crops import crop_box, normalise, random_crops, resample, with_channels
from wejepa.data.datasets import DatasetImages, as_source
from wejepa.data.decoding import read_image
from wejepa.data.embedded import Emoji, emoji_index, example_photograph
from wejepa.data.loaders import Ahead, steps_per_epoch, training_batches
from wejepa.data.named import IMAGENET, STATISTICS, available_datasets, load_images
from wejepa.data.sources import FolderImages, MemoryImages, RowImages, Source, check_source
from wejepa.data.workers import DeadWorker, deaths_wait
from wejepa.seeds import generator_for

__all__ = [
    "IMAGENET",
    "STATISTICS",
    "Ahead",
    "DatasetImages",
    "DeadWorker",
    "Emoji",
    "FolderImages",
    "MemoryImages",
    "RowImages",
    "Source",
    "as_source",
    "available_datasets",
    "check_source",
    "crop_box",
    "deaths_wait",
    "emoji_index",
    "example_photograph",
    "generator_for",
    "load_images",
    "normalise",
    "random_crops",
    "read_image",
    "resample",
    "steps_per_epoch",
    "training_batches",
    "with_channels",
]
