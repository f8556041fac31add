"""Would the tests notice a silent error? Each mutation is one, made in a copy of the package; a test named beside it has to fail.

    python -m benchmarks.mutations                      # all of them, some ten seconds each
    python -m benchmarks.mutations "no fsync" "AdamW"   # those whose name holds one of these

First the named tests run on the package as it is, where all have to pass. Exit code 1 unless every mutation is noticed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutation:
    """An error that no exception gives away.

    Attributes:
        name: what is wrong.
        file: where, below the repository.
        old: the text as it is, found once in the file.
        new: what takes its place.
        tests: one of them at least has to fail; each as FILE::FUNCTION below tests/.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    # ---------------------------------------------------------------- the method
    Mutation(
        "the targets are the student's, with their gradient",
        "wejepa/model.py",
        "with torch.no_grad():\n            tokens = for_each_context(self.teacher_encoder(images), masks)",
        "if True:\n            tokens = for_each_context(self.student_encoder(images), masks)",
        ("test_model.py::test_targets_are_the_normalised_tokens_of_the_teacher_on_the_whole_image",),
    ),
    Mutation(
        "the targets keep their gradient",
        "wejepa/model.py",
        "with torch.no_grad():\n            tokens",
        "if True:\n            tokens",
        ("test_model.py::test_the_teacher_gets_no_gradient",),
    ),
    Mutation(
        "the targets are not layer-normalised",
        "wejepa/model.py",
        "F.layer_norm(hidden, hidden.shape[-1:])",
        "hidden",
        ("test_model.py::test_targets_are_layer_normalised",),
    ),
    Mutation(
        "positions added twice",
        "wejepa/model.py",
        "(positions if keep is None else F.embedding(keep, positions[0]))",
        "2 * (positions if keep is None else F.embedding(keep, positions[0]))",
        ("test_model.py::test_the_student_equals_a_computation_by_hand",),
    ),
    Mutation(
        "features are the student's",
        "wejepa/model.py",
        'def encode(self, images: Tensor, encoder: str = "teacher")',
        'def encode(self, images: Tensor, encoder: str = "student")',
        ("test_model.py::test_shapes",),
    ),
    Mutation(
        "no target in the last row",
        "wejepa/masking.py",
        "grid_size[0] - block[0] + 1",
        "max(1, grid_size[0] - block[0])",
        ("test_masking.py::test_every_patch_is_reachable_as_target_and_as_context",),
    ),
    # ---------------------------------------------------------------- devices and precision
    Mutation(
        "auto is always the CPU",
        "wejepa/devices.py",
        'torch.device(found[0] if found else "cpu")',
        'torch.device("cpu")',
        ("test_devices.py::test_auto_takes_cuda_then_mps_then_the_cpu",),
    ),
    Mutation(
        "CUDA never computes bfloat16",
        "wejepa/devices.py",
        "return torch.cuda.is_bf16_supported(including_emulation=False)",
        "return False",
        ("test_devices.py::test_bfloat16_where_it_is_native_and_float16_on_other_gpus",),
    ),
    Mutation(
        "emulated bfloat16 is taken for native",
        "wejepa/devices.py",
        "is_bf16_supported(including_emulation=False)",
        "is_bf16_supported()",
        ("test_devices.py::test_bfloat16_where_it_is_native_and_float16_on_other_gpus",),
    ),
    Mutation(
        "features without mixed precision",
        "wejepa/analysis/features.py",
        "with autocast(model.device, cfg.hardware.mixed_precision):",
        "if True:",
        ("test_devices.py::test_features_are_computed_in_the_configs_precision",),
    ),
    Mutation(
        "a step leaves the images where they are",
        "wejepa/train/loop.py",
        "self._backward(to_device(images, self.device), ",
        "self._backward(images, ",
        ("test_devices.py::test_a_step_elsewhere_is_the_step_here",),
    ),
    Mutation(
        "a step leaves the masks where they are",
        "wejepa/train/loop.py",
        "Masks(*(to_device(index, self.device) for index in masks))",
        "masks",
        ("test_devices.py::test_a_step_elsewhere_is_the_step_here",),
    ),
    Mutation(
        "the model takes no images from another device",
        "wejepa/model.py",
        "network.eval()(images.to(self.device))",
        "network.eval()(images)",
        ("test_devices.py::test_a_model_on_cuda_takes_images_from_the_cpu",),
    ),
    Mutation(
        "a loss that is no number reaches the weights",
        "wejepa/train/loop.py",
        "self.scaler.scale(1 + 0 * loss.detach())",
        "self.scaler.scale(torch.ones_like(loss))",
        ("test_mixed_precision.py::test_what_is_no_number_reaches_no_weights_before_it_is_read",),
    ),
    Mutation(
        "a gradient that is no number reaches the weights",
        "wejepa/train/loop.py",
        "self.optimizer.found_inf = skip  #",
        "pass  #",
        ("test_mixed_precision.py::test_what_is_no_number_reaches_no_weights_before_it_is_read",),
    ),
    Mutation(
        "the teacher moves when the update is left out",
        "wejepa/train/loop.py",
        "momentum_update(now.momentum, skip)",
        "momentum_update(now.momentum)",
        ("test_mixed_precision.py::test_what_is_no_number_reaches_no_weights_before_it_is_read",),
    ),
    Mutation(
        "a resumed run forgets the scale",
        "wejepa/train/loop.py",
        'self.scaler.load_state_dict(state["scaler"])',
        "pass",
        ("test_mixed_precision.py::test_a_run_in_float16_resumes_to_the_bit",),
    ),
    # ---------------------------------------------------------------- training
    Mutation(
        "the teacher stands still",
        "wejepa/train/loop.py",
        "self.model.momentum_update(now.momentum, skip)",
        "pass",
        ("test_pretrain.py::test_the_teacher_follows_with_the_schedules_momentum",),
    ),
    Mutation(
        "Muon forgets its momentum",
        "wejepa/train/muon.py",
        'self.state[p]["exp_avg"].copy_(momentum)',
        "pass",
        ("test_muon.py::test_a_matrix_follows_its_momentum_and_all_else_adamw",),
    ),
    Mutation(
        "AdamW's own betas",
        "wejepa/train/loop.py",
        "[decaying, others], betas=cfg.optimizer.betas, ",
        "[decaying, others], ",
        ("test_pretrain.py::test_the_optimizer_remembers_ten_gradients_and_twenty_squares",),
    ),
    Mutation(
        "Meta's predictor is asked for all blocks at once",
        "wejepa/interop.py",
        '"blockwise_prediction": True',
        '"blockwise_prediction": False',
        ("test_interop.py::test_metas_predictor_predicts_as_the_paper_says",),
    ),
    Mutation(
        "fixed positions tell the column as the row",
        "wejepa/patches.py",
        "for place in (row, col)]",
        "for place in (col, row)]",
        ("test_patches.py::test_fixed_positions_are_sines_and_cosines_of_row_and_column",),
    ),
    Mutation(
        "a resumed run begins again from the weights it began with",
        "wejepa/train/folder.py",
        "if state is None and expected.cfg.model.start_from:",
        "if expected.cfg.model.start_from:",
        ("test_start.py::test_a_run_so_begun_resumes_to_the_bit_without_the_file",),
    ),
    Mutation(
        "biases and norms decay",
        "wejepa/train/loop.py",
        'p.dim() > 1 and name.endswith("weight")',
        "True",
        ("test_pretrain.py::test_weights_decay_and_nothing_else_does",),
    ),
    Mutation(
        "a resumed run forgets AdamW's moments",
        "wejepa/train/loop.py",
        'self._set_moments(state["moments"], self.step - state.get("skipped", 0))',
        "pass",
        ("test_pretrain.py::test_a_run_can_be_interrupted_twice",),
    ),
    Mutation(
        "every epoch has the same crops",
        "wejepa/data/loaders.py",
        "generator_for(seed, epoch, ",
        "generator_for(seed, 0, ",
        ("test_data.py::test_the_augmentation_of_one_image_differs_between_epochs",),
    ),
    Mutation(
        "no image is mirrored",
        "wejepa/data/crops.py",
        "(u[4] < 0.5)",
        "(u[4] < 0)",
        ("test_data.py::test_random_crops_lie_inside_the_image",),
    ),
    Mutation(
        "no aspect jitter",
        "wejepa/data/crops.py",
        "torch.exp((2 * u[1] - 1) * math.log(ASPECT))",
        "torch.ones(batch_size)",
        ("test_data.py::test_random_crops_lie_inside_the_image", "test_data.py::test_crops_have_the_shapes_that_torchvision_draws"),
    ),
    Mutation(
        "the aspect is drawn in shares of the image",
        "wejepa/data/crops.py",
        "(area * aspect * (height / width))",
        "(area * aspect)",
        ("test_data.py::test_crops_have_the_shapes_that_torchvision_draws",),
    ),
    Mutation(
        "no antialiasing",
        "wejepa/data/crops.py",
        "support = step.clamp(min=1)",
        "support = torch.ones_like(step)",
        ("test_data.py::test_resampling_is_pillows", "test_data.py::test_training_and_evaluation_see_one_distribution"),
    ),
    Mutation(
        "a lack of memory counts as an unreadable image",
        "wejepa/data/decoding.py",
        "if isinstance(error, MemoryError) or getattr",
        "if getattr",
        ("test_image_files.py::test_what_does_not_pass_ends_the_run_and_is_not_counted_as_unreadable",),
    ),
    Mutation(
        "workers hear SIGTERM",
        "wejepa/data/workers.py",
        "signal.signal(signum, signal.SIG_IGN)",
        "signal.signal(signum, signal.SIG_DFL)",
        ("test_stops.py::test_sigterm_to_the_group_loses_nothing",),
    ),
    Mutation(
        "workers hear SIGTERM while they start",
        "wejepa/data/workers.py",
        "signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)",
        "signal.pthread_sigmask(signal.SIG_BLOCK, ())",
        ("test_stops.py::test_sigterm_to_the_group_loses_nothing",),
    ),
    Mutation(
        "no fsync",
        "wejepa/files.py",
        'with open(aside, "rb+") as file:\n            os.fsync(file.fileno())',
        "pass",
        ("test_checkpoints.py::test_a_file_is_flushed_whole_before_it_takes_the_name_and_the_folder_after",),
    ),
    # ---------------------------------------------------------------- images, parts and logging of the caller's own
    Mutation(
        "a dataset's random transform is seeded by the item alone",
        "wejepa/data/datasets.py",
        "if crop else ())):",
        "if False else ())):",
        ("test_datasets.py::test_a_random_transform_is_random_in_training_and_draws_nothing_from_the_caller",),
    ),
    Mutation(
        "a dataset's transform draws on from where the process is",
        "wejepa/data/datasets.py",
        "    torch.default_generator.manual_seed(seed)\n",
        "",
        ("test_datasets.py::test_trained_killed_and_resumed_to_the_bit",),
    ),
    Mutation(
        "metrics.csv keeps the steps that a resumed run makes anew",
        "wejepa/train/callbacks.py",
        'int(line.partition(",")[0]) <= step]',
        "True]",
        ("test_callbacks.py::test_over_kills_and_resumes_no_step_is_missing_or_there_twice",),
    ),
    Mutation(
        "every process begins with its own copy of the caller's model",
        "wejepa/train/loop.py",
        "            self.ranks.share(self.model.state_dict().values())\n",
        "",
        ("test_own_parts.py::test_two_processes_make_the_run_of_one_with_parts_of_its_own",),
    ),
    Mutation(
        "the contexts of an image are given another image's targets",
        "wejepa/model.py",
        "x.repeat_interleave(contexts, dim=0)",
        "x.repeat(contexts, *[1] * (x.dim() - 1))",
        ("test_several.py::test_contexts_of_a_crop_are_predicted_as_each_alone_and_the_teacher_looks_once",),
    ),
    # ---------------------------------------------------------------- the judges
    Mutation(
        "the monitor's queries vote for themselves",
        "wejepa/train/callbacks.py",
        "knn_accuracy(x[:voters], y[:voters], ",
        "knn_accuracy(x, y, ",
        ("test_pretrain.py::test_the_monitor_asks_other_images_than_vote_and_draws_all_of_them_at_random",),
    ),
    Mutation(
        "the monitor takes the first images",
        "wejepa/train/callbacks.py",
        "torch.randperm(len(self.source), generator=generator_for(self.cfg.hardware.seed))",
        "torch.arange(len(self.source))",
        ("test_pretrain.py::test_the_monitor_asks_other_images_than_vote_and_draws_all_of_them_at_random",),
    ),
    Mutation(
        "a classifier at a constant rate",
        "wejepa/train/classifier.py",
        "min(1.0, 10 * (step + 1) / steps) * cosine(step / steps, learning_rate, 0.0)",
        "learning_rate",
        ("test_classifier.py::test_the_rate_rises_for_a_tenth_and_fades_along_a_cosine",),
    ),
    Mutation(
        "the probe's penalty is ignored",
        "wejepa/train/finetune.py",
        "penalty / 2 * weights.square().sum()",
        "0 * weights.sum()",
        ("test_finetune.py::test_the_regression_is_at_its_minimum",),
    ),
    Mutation(
        "the probe's penalty is chosen on images that it was trained with",
        "wejepa/train/finetune.py",
        "order[: len(order) // 5], order[len(order) // 5 :]",
        "order[: len(order) // 5], order",
        ("test_finetune.py::test_the_penalty_is_chosen_on_images_that_were_held_out",),
    ),
)


def run_tests(copy: Path, tests: tuple[str, ...]) -> subprocess.CompletedProcess:
    """pytest on tests of a copy of the repository."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=600)


def verdict(copy: Path, mutation: Mutation) -> str:
    """Make one mutation in the copy, run its tests, and put back what was there."""
    file = copy / mutation.file
    source = file.read_text()
    if source.count(mutation.old) != 1:
        return "text not found"
    try:
        file.write_text(source.replace(mutation.old, mutation.new))
        done = run_tests(copy, mutation.tests)
    finally:
        file.write_text(source)
    if done.returncode not in (0, 1):  # not a test that fails, but no test at all
        return f"no verdict: {(done.stdout + done.stderr).strip().splitlines()[-1]}"
    return "noticed" if done.returncode else "survived"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutations", description="Would the tests notice a silent error?")
    parser.add_argument("names", nargs="*", help="mutations whose name holds one of these; all without")
    wanted = parser.parse_args(argv).names
    chosen = [m for m in MUTATIONS if not wanted or any(part in m.name for part in wanted)]
    if not chosen:
        parser.error(f"no mutation's name holds any of {wanted}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("wejepa", "tests", "benchmarks"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        clean = run_tests(copy, tuple(dict.fromkeys(test for m in chosen for test in m.tests)))
        if clean.returncode:
            print(clean.stdout + clean.stderr, file=sys.stderr)
            print("the tests fail without any mutation", file=sys.stderr)
            return 1
        verdicts = []
        for mutation in chosen:
            verdicts.append(verdict(copy, mutation))
            print(f"{mutation.name:65} {verdicts[-1]}", flush=True)
    print(f"{verdicts.count('noticed')} of {len(verdicts)} noticed")
    return 0 if set(verdicts) == {"noticed"} else 1


if __name__ == "__main__":
    sys.exit(main())
