"""What the benchmarks reckon with, and the tables that they print."""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import sys

import nbformat
import pytest
import torch
from PIL import Image

from benchmarks import interop, loading, margins, photos
from benchmarks.against_peers import make_transformers_encoder, peer
from benchmarks.curve import averaged, seconds_to
from benchmarks.mutations import MUTATIONS, ROOT
from benchmarks.scaling import exponent
from benchmarks.step import HERE, arithmetic, configuration, make_step_of
from benchmarks.timing import AVX2, Contender, Times, asked, in_turn, milliseconds, parser, ratio, tell
from wejepa.config import default_config, photos96_config
from wejepa.data import load_images, training_batches
from wejepa.masking import sample_block_masks
from wejepa.model import IJEPA_base, IJepaLoss


def make_counter(start):
    calls = [start]
    return lambda: calls.append(0)


def test_contenders_take_turns_in_processes_of_their_own():
    times = in_turn([Contender("one", make_counter, (0,)), Contender("two", make_counter, (1,))], repeats=3, warmup=1)
    assert [len(t.seconds) for t in times.values()] == [3, 3] and list(times) == ["one", "two"]
    assert all(s >= 0 for t in times.values() for s in t.seconds)


@pytest.mark.slow
def test_a_contender_reads_a_folder_with_workers_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "FILES", loading.BATCH)
    loading.write_folder(tmp_path)
    ours = Contender("ours", loading.make_epoch, (loading.folder_config(str(tmp_path), 2),))
    alone = Contender("alone", loading.make_decoding, (str(tmp_path), 224, True))
    assert all(len(t.seconds) == 1 and t.median > 0 for t in in_turn([ours, alone], repeats=1, warmup=0).values())


def test_processor_time_is_for_one_thread():
    with pytest.raises(SystemExit, match="--threads 1"):
        in_turn([Contender("two", make_counter, (0,), threads=2)], repeats=1, clock="cpu")


def make_threaded(threads):
    assert torch.get_num_threads() == threads
    return lambda: None


@pytest.mark.parametrize("threads", [1, 2])
def test_a_contender_begins_with_its_threads(threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    in_turn([Contender("one", make_threaded, (threads,), threads)], repeats=1, warmup=0)
    assert os.environ["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("avx2", [False, True])
def test_a_command_begins_anew_as_it_is_asked(avx2, monkeypatch):
    begun = []
    monkeypatch.setattr(sys, "argv", ["benchmark", "--threads", "2", *(["--avx2"] if avx2 else [])])
    monkeypatch.setattr(os, "execve", lambda path, argv, environment: begun.append(environment))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in AVX2:
        monkeypatch.delenv(name, raising=False)
    asked(parser("what"))
    (environment,) = begun
    assert environment["OMP_NUM_THREADS"] == "2" and all(environment.get(name) == (value if avx2 else None) for name, value in AVX2.items())
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert asked(parser("what")).threads == 2 and len(begun) == 1


def test_median_spread_and_ratio():
    slow, fast = Times([4.0, 2.0, 9.0]), Times([2.0, 2.0, 3.0])
    assert slow.median == 4.0 and slow.spread == (2.0, 9.0) and ratio(slow, fast) == 2.0
    assert milliseconds(fast) == ["2000", "2000 to 3000"]


def test_figures_are_told_as_a_table_and_as_json(tmp_path, capsys):
    args = argparse.Namespace(json=tmp_path / "figures.json", repeats=3)
    tell("One", ["", "ms"], [["a", "1"]], {"a": 1}, args)
    tell("Two", ["", "ms"], [["b", "2"]], {"b": 2}, args)
    assert "One\n\n|  | ms |\n|---|---:|\n| a | 1 |" in capsys.readouterr().out
    found = json.loads(args.json.read_text())
    assert found["One"]["figures"] == {"a": 1} and found["Two"]["options"] == {"repeats": 3} and found["Two"]["machine"]["cores"]


def test_the_arithmetic_of_a_step_is_that_of_its_matrix_products():
    """As PyTorch counts those of a bfloat16 step, but for the queries of the predictor's last block that nobody needs."""
    from torch.utils.flop_counter import FlopCounterMode

    cfg = configuration("32 x 32", bfloat16=False)
    cfg.data.train_batch_size = 2
    torch.manual_seed(0)
    loss, images = IJepaLoss(IJEPA_base(cfg)), torch.randn(2, 3, 32, 32)
    masks = sample_block_masks(2, cfg.grid_size, cfg.mask, torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        with torch.autocast("cpu", torch.bfloat16):  # in which attention is plain products, which it counts
            value = loss(images, masks)
        value.backward()
    assert abs(counter.get_total_flops() / arithmetic(cfg) - 1) < 0.02


def test_the_step_of_another_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = configuration("default", bfloat16=False)
    cfg.data.train_batch_size = 2
    times = in_turn([Contender("here", make_step_of, (HERE, cfg.to_dict()))], repeats=1, warmup=0)
    assert times["here"].median > 0


def test_the_exponent_of_growth():
    assert exponent((32, 64, 128), [1.0, 2.0, 4.0]) == pytest.approx(1)
    assert exponent((2, 4), [1.0, 4.0]) == pytest.approx(2)


def test_when_a_curve_reaches_an_accuracy():
    curve = [{"seconds": 10.0, "mean": 0.5}, {"seconds": 20.0, "mean": 0.7}]
    assert seconds_to(curve, 0.6) == pytest.approx(15) and seconds_to(curve, 0.4) == 10
    assert seconds_to(curve, 0.8) != seconds_to(curve, 0.8)  # not a number
    assert averaged([curve, [{"seconds": 20.0, "mean": 0.7}] * 2])[0] == pytest.approx({"seconds": 15.0, "mean": 0.6})


def test_a_peer_that_is_absent_is_left_out(capsys):
    assert not peer("no_such_package_anywhere") and "benchmarks" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_transformers_encoder_gets_our_weights():
    cfg = configuration("32 x 32", bfloat16=False)
    cfg.data.train_batch_size, cfg.model.enc_depth = 2, 2
    make_transformers_encoder(cfg, tolerance=1e-5)()  # refuses what differs


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_mutations_text_is_in_the_package_once_and_its_tests_exist(mutation):
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    assert mutation.new != mutation.old and mutation.tests
    for test in mutation.tests:
        file, function = test.split("::")
        assert f"\ndef {function}(" in (ROOT / "tests" / file).read_text()


def test_margins_are_written_down_and_a_failed_assertion_ends_nothing(capsys):
    cells = ["a: int = 1", "import torch\na = torch.tensor([3.0, 5.0])", "assert (a > 2).all() and 1 < a[0] < 2.5, 'fails'"]
    cells += ["assert torch.allclose(a, a + 0.25, rtol=0, atol=1.0)", "assert not a[0] > 4\nassert all(v >= 3 for v in a)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    instrumented, texts = margins.instrumented(notebook)
    namespace = {}
    for cell in instrumented:
        exec(cell.source, namespace)
    found = {texts[key]: row for key, row in json.loads(capsys.readouterr().out.partition("MARGINS ")[2]).items()}
    assert found == {
        "a > 2": [1.0, 3.0, 2.0],  # the closest element
        "1 < a[0]": [2.0, 1.0, 3.0],
        "a[0] < 2.5": [-0.5, 3.0, 2.5],
        "torch.allclose(a, a + 0.25, rtol=0, atol=1.0)": [0.75, 0.25, 1.0],
        "v >= 3": [0.0, 3.0, 3.0],
    }


def test_a_margin_counts_in_deviations_over_the_runs_that_were_kept(tmp_path):
    for seed, margin in enumerate((1.0, 2.0, 3.0)):
        rows = [{"text": "a > b", "cell": "1.0", "margin": m, "left": m, "right": 0.0} for m in (margin + 5, margin)]
        (tmp_path / f"00-native-{seed}.json").write_text(json.dumps({"notebook": "00_tour", "margins": rows}))
    (claim,) = margins.claims(tmp_path)
    assert claim.margins == [1.0, 2.0, 3.0] and claim.deviations == 2.0 and claim.sides == (2.0, 0.0)
    assert margins.claims(tmp_path, {"00_tour": {"a > 0"}}) == []  # the notebook says something else by now


def test_photographs_are_made_for_the_preset(tmp_path):
    photos.make_photographs(tmp_path, images=70)
    cfg = photos96_config()
    cfg.data.root, cfg.data.num_workers = str(tmp_path), 0
    source = load_images(cfg, "train")
    assert len(source) == 70 and len(source.classes) == 9
    assert next(iter(training_batches(source, cfg, epoch=0))).shape == (64, 3, 96, 96) and cfg.grid_size == (12, 12)


def test_published_checkpoints_are_compared_where_they_can_be_had(monkeypatch, capsys):
    """Without them here: on a picture and a model that stand in for them."""
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no route to host")))
    interop.published(list(interop.PUBLISHED))
    assert capsys.readouterr().out == f"skipped: {interop.CATS} cannot be downloaded (no route to host)\n"
    picture = io.BytesIO()
    Image.fromarray(torch.randint(0, 255, (48, 64, 3), dtype=torch.uint8).numpy()).save(picture, "png")
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: io.BytesIO(picture.getvalue()))
    monkeypatch.setattr(interop, "from_huggingface", lambda name: IJEPA_base(default_config()).eval())
    name = "facebook/ijepa_vith14_1k"
    torch.manual_seed(0)
    model = IJEPA_base(default_config()).eval()
    x = interop.as_transformers_takes_it(Image.open(io.BytesIO(picture.getvalue())), 32)
    stated = interop.of_ours(model, x)[0, :3, :3]
    for shift, told in ((2e-5, "facebook/ijepa_vith14_1k: largest difference 2.0e-05 from what is stated"), (2e-4, "2.0e-04")):
        torch.manual_seed(0)
        monkeypatch.setitem(interop.PUBLISHED, name, (stated + shift).tolist())
        with contextlib.nullcontext() if shift < 1e-4 else pytest.raises(SystemExit, match="more than 1e-4"):
            interop.published([name])
        assert told in capsys.readouterr().out


def test_a_picture_is_prepared_as_transformers_does():
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "ViTImageProcessorPil"):
        pytest.skip("this version of transformers has no processor that resizes as the script's did")
    picture = Image.fromarray(torch.randint(0, 255, (480, 640, 3), dtype=torch.uint8).numpy())
    expected = transformers.ViTImageProcessorPil(size={"height": 224, "width": 224})(images=picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(interop.as_transformers_takes_it(picture, 224), expected)
