"""A folder of images as an index: what it finds, what it keeps, and what it refuses."""

import json
import os
import re
import shlex
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tqdm.auto
from PIL import Image

from benchmarks.collection import of_numbers, places
from wejepa import collection
from wejepa.collection import Collection, main
from wejepa.config import DataConfig, HardwareConfig, IJepaConfig, MaskConfig, ModelConfig, adapt_config_for_backbone
from wejepa.data import MemoryImages, as_source, load_images
from wejepa.errors import ConfigError, DataError
from wejepa.model import IJEPA_base
from wejepa.train.checkpoints import save_model

SIZE, COUNT = 64, 24


def small_config(**sizes) -> IJepaConfig:
    sizes = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "enc_depth": 1, "pred_depth": 1, "pred_dim": 12, "num_heads": 2} | sizes
    return IJepaConfig(
        data=DataConfig(dataset="imagefolder"),
        mask=MaskConfig(target_scale=(0.1, 0.2), context_share=0.3),
        model=ModelConfig(**sizes),
        hardware=HardwareConfig(device="cpu", mixed_precision=False),
    )


def small_model(seed: int = 0, **sizes) -> IJEPA_base:
    torch.manual_seed(seed)
    return IJEPA_base(small_config(**sizes)).eval()


def picture(seed: int, side: int = 96) -> Image.Image:
    """A smooth random pattern, as large areas of a photograph are."""
    rough = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def folder(tmp_path):
    """A folder of JPEG files, some of them in a folder below."""
    root = tmp_path / "photos"
    for i in range(COUNT):
        path = root / ("old" if i % 3 == 0 else "") / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path, quality=95)
    return root


@pytest.fixture
def encoded(monkeypatch):
    """How many images each batch that was encoded had."""
    counts, features = [], IJEPA_base.features

    def counting(self, images, *args):
        counts.append(len(images))
        return features(self, images, *args)

    monkeypatch.setattr(IJEPA_base, "features", counting)
    return counts


def same(one: Collection, other: Collection) -> bool:
    assert one.names == other.names and one.encoder == other.encoder and one.statistics == other.statistics
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("cells", "checksums", "stamps"))


# ---------------------------------------------------------------- what it finds


@pytest.mark.parametrize("shape", [(4, 4), (1, 1), (2, 3)])
def test_nearest_are_those_of_a_plain_computation(shape, monkeypatch):
    monkeypatch.setattr(Collection, "_blocks", blocks_of(70))
    generator = torch.Generator().manual_seed(0)
    photos = of_numbers(torch.randn(300, 6, 4, 4, generator=generator).half())
    queries = torch.randn(9, 6, *shape, generator=generator)
    similarity, index = photos.nearest(queries, 11)
    expected = torch.full((9, 300), -2.0)
    for row in range(5 - shape[0]):
        for column in range(5 - shape[1]):
            window = photos.cells[:, :, row : row + shape[0], column : column + shape[1]].float().flatten(1)
            for q, query in enumerate(queries.flatten(1)):
                expected[q] = expected[q].maximum(F.cosine_similarity(window, query[None]))
    best = expected.topk(11, dim=1)
    torch.testing.assert_close(similarity, best.values)
    assert torch.equal(index, best.indices)
    assert photos.nearest(queries, 1000)[1].sort(dim=1).values.equal(torch.arange(300).expand(9, -1))


def blocks_of(step: int):
    def blocks(self, start=0):
        for first in range(start, len(self), step):
            yield first, self.cells[first : first + step].float()

    return blocks


def test_pairs_are_those_of_a_plain_computation(monkeypatch):
    monkeypatch.setattr(Collection, "_blocks", blocks_of(70))
    photos = of_numbers(torch.randn(300, 3, 2, 2, generator=torch.Generator().manual_seed(0)).half())
    unit = F.normalize(photos.cells.float().flatten(1), dim=1)
    expected = {(str(i), str(j)) for i, j in ((unit @ unit.T) >= 0.7).triu(1).nonzero().tolist()}
    found = photos.near_duplicates(0.7)
    assert len(expected) > 50 and {(p.first, p.second) for p in found} == expected and len(found) == len(expected)
    assert [p.similarity for p in found] == sorted((p.similarity for p in found), reverse=True)
    monkeypatch.setattr(collection, "MOST_PAIRS", 50)
    with pytest.raises(DataError, match=r"threshold = 0.7: more than 50 pairs .* nearer to 1"):
        photos.near_duplicates(0.7)


@pytest.mark.parametrize("pooling", ["grid", "mean"])
def test_an_image_of_the_folder_finds_itself_whatever_it_is_given_as(folder, model, pooling):
    photos = Collection.build(model, folder, pooling=pooling)
    path = folder / "old" / "03.jpg"
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    for image in (path, str(path), Image.open(path), pixels):
        hits = photos.search(image, 5)
        assert hits[0].name == "old/03.jpg" and hits[0].similarity > 0.999 and len(hits) == 5
    similarities = [hit.similarity for hit in hits]
    assert similarities == sorted(similarities, reverse=True) and similarities[1] < 0.99
    assert len(photos.search(path, 1000)) == COUNT


def test_cells_are_the_means_of_the_teachers_tokens(folder):
    model = small_model()
    with torch.no_grad():
        model.teacher_encoder.pos_embed.add_(0.1)  # the student's stay
        images = next(as_source([folder / "01.jpg"], model.cfg).batches(torch.tensor([0]), 1))
        plane = model.encode(images)[0].view(8, 8, -1)
    photos = Collection.build(model, folder)
    by_hand = torch.stack([torch.stack([plane[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean((0, 1)) for c in range(4)]) for r in range(4)])
    found = photos.cells[photos.names.index("01.jpg")]
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), by_hand.permute(2, 0, 1), rtol=2e-3, atol=2e-3)


def mosaic(seeds: list[int]) -> Image.Image:
    image = Image.new("RGB", (96, 96))
    for i, seed in enumerate(seeds):
        image.paste(picture(seed, 48), (i % 2 * 48, i // 2 * 48))
    return image


def test_a_part_finds_the_images_that_have_it_wherever_it_is(tmp_path, model):
    """Mosaics of four, each in four mosaics, once in each corner: the upper left part of another mosaic finds all four."""
    (tmp_path / "mosaics").mkdir()
    n = 20
    for i in range(n):
        mosaic([i, (i + 5) % n, (i + 9) % n, (i + 12) % n]).save(tmp_path / "mosaics" / f"{i:02d}.png")
    photos, right = Collection.build(model, tmp_path / "mosaics"), 0
    for seed in range(n):
        hits = photos.search(mosaic([100, 101, seed, 102]), 4, patch=(0, 0.5, 0.5, 1))
        right += len({hit.name for hit in hits} & {f"{(seed - by) % n:02d}.png" for by in (0, 5, 9, 12)})
    assert right >= 0.9 * 4 * n, f"{right} of {4 * n}"


def test_a_part_may_be_smaller_than_a_patch():
    assert collection.within(0, 1, 8) == slice(0, 8)
    assert collection.within(0.5, 1, 8) == slice(4, 8)
    assert collection.within(0.3, 0.31, 8) == slice(2, 3)
    assert collection.within(0.99, 1, 8) == slice(7, 8)
    for low in np.linspace(0, 0.98, 50):
        for high in np.linspace(low + 0.01, 1, 20):
            found = range(7)[collection.within(low, high, 7)]
            inside = [i for i in range(7) if low <= (i + 0.5) / 7 < high]
            assert list(found) == inside or (not inside and len(found) == 1)
    assert [collection.cells_of(share, 4) for share in (0.01, 0.25, 0.5, 0.6, 1)] == [1, 1, 2, 2, 4]


def test_near_duplicates_are_found(folder, model):
    picture(5).save(folder / "again.jpg", quality=60)
    picture(7).crop((0, 0, 95, 95)).resize((96, 96)).save(folder / "shifted.png")  # by half a pixel on average
    shutil.copy(folder / "old" / "09.jpg", folder / "copy.jpg")
    found = Collection.build(model, folder).near_duplicates()
    assert {(p.first, p.second) for p in found} == {("05.jpg", "again.jpg"), ("07.jpg", "shifted.png"), ("copy.jpg", "old/09.jpg")}
    assert found[0].first == "copy.jpg" and found[0].similarity == pytest.approx(1, abs=1e-5)


def test_clusters_and_outliers(tmp_path, model):
    pytest.importorskip("sklearn")
    for i in range(30):
        kind, noise = ("one", "two")[i % 3 == 0], np.random.default_rng(i).integers(-20, 20, (96, 96, 3))
        path = tmp_path / kind / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((np.asarray(picture(1 + (kind == "two"))) + noise).clip(0, 255).astype(np.uint8)).save(path)
    picture(0).save(tmp_path / "other.png")
    photos = Collection.build(model, tmp_path)
    assert photos.outliers(1)[0].name == "other.png"
    (tmp_path / "other.png").unlink()
    photos = Collection.build(model, tmp_path)
    clusters = photos.clusters(2)
    assert [len(names) for names in clusters] == [20, 10]
    assert [{name.partition("/")[0] for name in names} for names in clusters] == [{"one"}, {"two"}]
    assert photos.clusters(2) == clusters
    for count in (0, 31):
        with pytest.raises(ConfigError, match=f"count = {count}: .* from 1 to 30"):
            photos.clusters(count)


def test_the_other_vendors_drawing_is_found_well_above_chance():
    """600 drawings, two of each emoji: by chance the other one is the nearest once in 599, with this encoder at random once in five."""
    cfg = small_config()
    cfg.data.dataset = "emoji"
    torch.manual_seed(0)
    source = load_images(cfg, "test")
    first = MemoryImages(
        source.images[:600], source.labels[:600], source.classes, img_size=SIZE, in_chans=3, mean=source.mean, std=source.std
    )
    photos = Collection.build(IJEPA_base(cfg), first)
    place = places(photos)
    assert (place == 0).float().mean() > 0.1 and (place < 10).float().mean() > 0.25
    drawn_alike = of_numbers(torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]]).view(4, 2, 1, 1))  # 0 and 1 are a pair, and so are 2 and 3
    assert places(drawn_alike, 2)[2] == 2 and (places(drawn_alike, 2)[:2] < 2).all()
    assert photos.search(first.images[7], 1)[0].name == "7"


def test_backbones_have_cells_too(folder):
    torch.manual_seed(0)
    cfg = adapt_config_for_backbone(small_config(), "resnet18")
    model = IJEPA_base(cfg)
    photos = Collection.build(model, folder)
    assert photos.search(folder / "04.jpg", 1)[0].name == "04.jpg"


# ---------------------------------------------------------------- what it keeps


def test_what_is_saved_is_read_back_and_searched(folder, model, tmp_path):
    photos = Collection.build(model, folder, tmp_path / "new" / "photos.safetensors")
    again = Collection.load(tmp_path / "new" / "photos.safetensors", model)
    assert same(again, photos) and again.files.folder == folder
    assert again.search(folder / "02.jpg") == photos.search(folder / "02.jpg")
    assert os.listdir(tmp_path / "new") == ["photos.safetensors"]
    (tmp_path / "plain").touch()
    assert (tmp_path / "new" / "photos.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_only_new_and_changed_files_are_encoded(folder, model, tmp_path, encoded, capsys, monkeypatch):
    file = tmp_path / "photos.safetensors"
    Collection.build(model, folder, file)
    assert sum(encoded) == COUNT
    encoded.clear()
    (folder / "01.jpg").unlink()
    picture(100).save(folder / "a new one.jpg")
    picture(101).save(folder / "02.jpg", quality=95)
    (folder / "04.jpg").rename(folder / "old" / "moved.jpg")
    os.utime(folder / "05.jpg")
    capsys.readouterr()
    photos = Collection.build(model, folder, file)
    assert sum(encoded) == 2
    assert (
        "24 images, 2 to compute" in (told := capsys.readouterr().out)
        and "24 images in the collection, 0 cannot be read, 2 former ones dropped" in told
    )
    assert same(photos, Collection.build(model, folder))  # as if all were computed anew, in the folder's order
    encoded.clear()
    monkeypatch.setattr(collection, "checksum_of", None)  # what is known by name, size and time is not even read
    assert same(Collection.build(model, folder, file), photos) and encoded == []


def test_a_folder_that_was_moved_is_known(folder, model, tmp_path, encoded):
    Collection.build(model, folder, tmp_path / "photos.safetensors")
    encoded.clear()
    shutil.copytree(folder, tmp_path / "elsewhere", copy_function=shutil.copyfile)  # with other times
    photos = Collection.build(model, tmp_path / "elsewhere", tmp_path / "photos.safetensors")
    assert encoded == [] and photos.files.folder == tmp_path / "elsewhere"


def test_a_build_that_was_stopped_goes_on(folder, model, tmp_path, encoded, monkeypatch):
    monkeypatch.setattr(collection, "BATCH", 10)
    features, file = IJEPA_base.features, tmp_path / "photos.safetensors"

    def stopped(self, *args):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        return features(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(IJEPA_base, "features", stopped)
        Collection.build(model, folder, file)
    assert len(Collection.load(file)) == 20
    encoded.clear()
    assert same(Collection.build(model, folder, file), Collection.build(model, folder)) and sum(encoded[:1]) == COUNT - 20


def test_a_file_that_changes_while_it_is_read_is_read_again(folder, model, tmp_path, encoded, monkeypatch):
    features, file = IJEPA_base.features, tmp_path / "photos.safetensors"

    def changing(self, *args):
        picture(300).save(folder / "02.jpg")
        return features(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(IJEPA_base, "features", changing)
        Collection.build(model, folder, file)
    encoded.clear()
    assert same(Collection.build(model, folder, file), Collection.build(model, folder)) and encoded[0] == 1


def test_a_long_build_is_saved_now_and_then(folder, model, tmp_path, monkeypatch):
    monkeypatch.setattr(collection, "BATCH", 10)
    monkeypatch.setattr(collection, "SAVE_SECONDS", 0.0)
    sizes, save = [], Collection.save
    monkeypatch.setattr(Collection, "save", lambda self, file: (sizes.append(len(self)), save(self, file)))
    Collection.build(model, folder, tmp_path / "photos.safetensors")
    assert sizes == [10, 20, 24, 24]


def test_damaged_files_are_named_and_passed_over(folder, model, tmp_path, encoded):
    (folder / "03a.jpg").write_bytes(b"\xff\xd8 no image")
    (folder / "gone.jpg").symlink_to(folder / "nowhere")
    (folder / "08.jpg").write_bytes((folder / "08.jpg").read_bytes()[:-200])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        photos = Collection.build(model, folder, tmp_path / "photos.safetensors")
    assert len(photos) == COUNT - 1 and not {"03a.jpg", "gone.jpg", "08.jpg"} & set(photos.names)
    for name in ("03a.jpg", "gone.jpg", "08.jpg"):
        assert sum(f"{folder / name} cannot be read as an image" in str(w.message) for w in told) == 1
    assert photos.search(folder / "09.jpg" if (folder / "09.jpg").exists() else folder / "old" / "09.jpg", 1)[0].name == "old/09.jpg"
    encoded.clear()
    picture(8).save(folder / "08.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "08.jpg" in Collection.build(model, folder, tmp_path / "photos.safetensors").names and sum(encoded) == 1


def test_the_bar_reaches_its_end_past_damaged_files(folder, model, monkeypatch):
    """JupyterLab shows a bar that ends short in red and leaves it there."""
    (folder / "03a.jpg").write_bytes(b"\xff\xd8 no image")
    monkeypatch.setenv("TQDM_DISABLE", "0")
    bars = []

    class Bar(tqdm.auto.tqdm):
        def close(self):
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    with pytest.warns(UserWarning, match=r"03a.jpg cannot be read"):
        Collection.build(model, folder)
    assert (COUNT + 1, COUNT + 1) in bars


def test_other_processes_decode_the_same(folder, model):
    (folder / "03a.jpg").write_bytes(b"\xff\xd8 no image")
    with_workers = small_model()
    with_workers.cfg.data.num_workers = 1
    with pytest.warns(UserWarning, match=r"03a.jpg cannot be read"):
        one, other = Collection.build(model, folder), Collection.build(with_workers, folder)
    assert same(one, other)


# ---------------------------------------------------------------- what it refuses


def test_another_encoder_is_refused_before_anything_is_computed_or_overwritten(folder, model, tmp_path, encoded):
    file = tmp_path / "photos.safetensors"
    photos = Collection.build(model, folder, file)
    before = file.read_bytes()
    encoded.clear()
    other_statistics = small_model()
    other_statistics.cfg.data.dataset = "emoji"
    changed = small_model()
    with torch.no_grad():
        changed.teacher_encoder.norm.bias[3] += 1e-3
    for other in (small_model(1), small_model(num_heads=4), small_model(norm_eps=1e-5), other_statistics, changed):
        for call in (
            lambda other=other: Collection.build(other, folder, file),
            lambda other=other: Collection.load(file, other) if other is not other_statistics else Collection.build(other, folder, file),
        ):
            with pytest.raises(DataError, match=r"photos.safetensors was made by another encoder: give the model") as caught:
                call()
            assert "\n" not in str(caught.value)
    assert encoded == [] and file.read_bytes() == before
    other = Collection.build(small_model(1), folder)
    with pytest.raises(DataError, match="another encoder"):
        other.save(file)
    assert file.read_bytes() == before and same(Collection.load(file, small_model()), photos)  # the same weights again


def test_another_pooling_or_other_images_are_refused(folder, model, tmp_path, encoded):
    file = tmp_path / "photos.safetensors"
    Collection.build(model, folder, file)
    encoded.clear()
    with pytest.raises(DataError, match="built with another pooling"):
        Collection.build(model, folder, file, pooling="mean")
    (tmp_path / "others").mkdir()
    picture(200).save(tmp_path / "others" / "00.jpg")
    with pytest.raises(DataError, match=r"holds 24 other images and none of these: give its own folder"):
        Collection.build(model, tmp_path / "others", file)
    with pytest.raises(ConfigError, match=r"pooling = 'max': give grid or mean"):
        Collection.build(model, folder, pooling="max")
    assert encoded == []


@pytest.mark.parametrize("where", [0.02, 0.3, 0.6, 0.99])
def test_a_tampered_file_is_refused(folder, model, tmp_path, where):
    file = tmp_path / "photos.safetensors"
    Collection.build(model, folder, file)
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"truncated, damaged or not a collection"):
        Collection.load(file)


def test_every_part_of_a_file_is_under_its_checksum(folder, model, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    file = tmp_path / "photos.safetensors"
    Collection.build(model, folder, file)
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    for key, value in (("folder", "/"), ("encoder", "0"), ("statistics", json.dumps([[0.5], [0.5]]))):
        save_file(load_file(file), tmp_path / "forged.safetensors", {**header, key: value})
        with pytest.raises(DataError, match="does not match its checksum"):
            Collection.load(tmp_path / "forged.safetensors")
    for name in ("cells", "checksums", "stamps", "names"):
        tensors = {key: value.clone() for key, value in load_file(file).items()}
        tensors[name].view(-1)[0] += 1
        save_file(tensors, tmp_path / "forged.safetensors", header)
        with pytest.raises(DataError, match="does not match its checksum"):
            Collection.load(tmp_path / "forged.safetensors")


def test_foreign_files_and_places_are_refused_before_anything_is_computed(folder, model, tmp_path, encoded):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "weights.safetensors")
    (tmp_path / "text.safetensors").write_text("nothing")
    for name in ("weights.safetensors", "text.safetensors"):
        before = (tmp_path / name).read_bytes()
        for call in (
            lambda name=name: Collection.build(model, folder, tmp_path / name),
            lambda name=name: Collection.load(tmp_path / name),
        ):
            with pytest.raises(DataError, match=f"{name} is truncated, damaged or not a collection"):
                call()
        assert (tmp_path / name).read_bytes() == before
    with pytest.raises(DataError, match=r"cannot write .*text.safetensors"):
        Collection.build(model, folder, tmp_path / "text.safetensors" / "photos.safetensors")
    with pytest.raises(DataError, match="there is no collection"):
        Collection.load(tmp_path / "none.safetensors")
    (tmp_path / "empty").mkdir()
    for images, told in ((tmp_path / "empty", "holds no images"), (tmp_path / "none", "is no folder"), ([3, 4], "has no labels")):
        with pytest.raises(DataError, match=told):
            Collection.build(model, images)
    assert encoded == []


def test_a_dataset_is_a_source_as_well(folder, model):
    images = [Image.open(folder / f"{i:02d}.jpg").convert("RGB") for i in (1, 2, 4)]
    photos = Collection.build(model, as_source(images, model.cfg))
    assert photos.names == ["0", "1", "2"] and photos.search(images[1], 1)[0].name == "1"
    with pytest.raises(DataError, match=r"its images are no files: draw them by plot_images"):
        photos.sheet(["0"])


def test_searches_that_make_no_sense_are_refused(folder, model, tmp_path):
    file = tmp_path / "photos.safetensors"
    photos = Collection.build(model, folder, file)
    for patch in ((0, 0, 0, 1), (0.5, 0, 0.4, 1), (0, 0, 1, 1.5), (-0.1, 0, 1, 1)):
        with pytest.raises(ConfigError, match=r"patch = \(.*\): give left, top, right and bottom"):
            photos.search(folder / "01.jpg", patch=patch)
    with pytest.raises(ConfigError, match=r"k = 0: .* 1 or more"):
        photos.search(folder / "01.jpg", 0)
    with pytest.raises(ConfigError, match=r"search needs the model"):
        Collection.load(file).search(folder / "01.jpg")
    with pytest.raises(DataError, match=r"none.jpg cannot be read as an image \(No such file"):
        photos.search(folder / "none.jpg")
    with pytest.raises(DataError, match=r"no image: it is ndarray"):
        photos.search(np.zeros((8, 8, 3)))
    with pytest.raises(ConfigError, match=r"threshold = 0: .* above 0 and at most 1"):
        photos.near_duplicates(0)
    with pytest.raises(DataError, match="nothing to compare it with"):
        of_numbers(torch.ones(1, 2, 4, 4)).outliers()


def test_an_encoder_that_gives_no_numbers_is_refused(folder, tmp_path):
    broken = small_model()
    with torch.no_grad():
        broken.teacher_encoder.norm.bias[0] = 1e6
    with pytest.raises(DataError, match="not finite, or beyond float16"):
        Collection.build(broken, folder, tmp_path / "photos.safetensors")
    assert not (tmp_path / "photos.safetensors").exists()


# ---------------------------------------------------------------- shown, and from the shell


def test_a_sheet_and_a_table(folder, model):
    pytest.importorskip("matplotlib")
    photos = Collection.build(model, folder)
    hits = photos.search(folder / "01.jpg", 12)
    titles = [ax.get_title() for ax in photos.sheet(hits, columns=5, title="found").axes]
    assert titles[0] == "01\n1.000" and sum(bool(title) for title in titles) == 12
    shutil.copy(folder / "01.jpg", folder / "a_name_of_many_letters.jpg")
    assert Collection.build(model, folder).sheet(["a_name_of_many_letters.jpg"]).axes[0].get_title() == "a_name…tters"
    (folder / hits[3].name).unlink()
    with pytest.raises(DataError, match=r"cannot be drawn \(No such file or directory\): build again"):
        photos.sheet([hits[3].name])
    pytest.importorskip("pandas")
    table = photos.table()
    assert list(table.columns) == ["name", "bytes", "changed", "sha256"] and list(table["name"]) == photos.names
    assert table["bytes"][0] == (folder / photos.names[0]).stat().st_size


def test_the_command_line(folder, model, tmp_path, capsys):
    pytest.importorskip("sklearn")
    checkpoint, file = str(tmp_path / "model.pt"), str(tmp_path / "photos.safetensors")
    save_model(checkpoint, model, source="a test")
    picture(5).save(folder / "again.jpg", quality=60)
    assert main(["build", str(folder), file, "--checkpoint", checkpoint]) == 0
    assert "25 images in the collection" in capsys.readouterr().out
    sheet = tmp_path / "found.png"
    query = str(folder / "05.jpg")
    assert main(["search", file, query, "--checkpoint", checkpoint, "-k", "3", "--patch", "0", "0", "1", "0.5", "--sheet", str(sheet)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and {line.split()[1] for line in lines[:2]} == {"05.jpg", "again.jpg"} and sheet.read_bytes()[1:4] == b"PNG"
    assert main(["duplicates", file]) == 0
    assert [line.split()[1:] for line in capsys.readouterr().out.splitlines()] == [["05.jpg", "again.jpg"]]
    assert main(["clusters", file, "--count", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_the_command_line_refuses_in_one_line(folder, model, tmp_path, capsys):
    checkpoint, file = str(tmp_path / "model.pt"), str(tmp_path / "photos.safetensors")
    save_model(checkpoint, model, source="a test")
    assert main(["build", str(folder), file, "--checkpoint", checkpoint]) == 0
    capsys.readouterr()
    save_model(tmp_path / "other.pt", small_model(1), source="a test")
    for arguments in (
        ["build", str(folder), file, "--checkpoint", str(tmp_path / "other.pt")],
        ["build", str(folder), file, "--checkpoint", str(tmp_path / "none.pt")],
        ["build", str(tmp_path / "none"), file, "--checkpoint", checkpoint],
        ["search", file, str(folder / "none.jpg"), "--checkpoint", checkpoint],
        ["search", file, str(folder / "01.jpg"), "--checkpoint", checkpoint, "--sheet", str(tmp_path / "sheet.nothing")],
        ["search", file, str(folder / "01.jpg"), "--checkpoint", checkpoint, "--patch", "1", "0", "0", "1"],
        ["duplicates", str(tmp_path / "none.safetensors")],
        ["clusters", file, "--count", "99"],
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "Error: " in error, error
    for arguments in ([], ["search", file], ["build", str(folder), file, "--pooling", "max"], ["search", file, "x", "--patch", "1"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


def test_interrupted_at_the_shell(folder, model, tmp_path, capsys, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    save_model(tmp_path / "model.pt", model, source="a test")
    monkeypatch.setattr(Collection, "build", stopped)
    assert main(["build", str(folder), str(tmp_path / "photos.safetensors"), "--checkpoint", str(tmp_path / "model.pt")]) == 130
    assert "the same command goes on" in capsys.readouterr().err


PAGE = (Path(__file__).parent.parent / "website" / "howto" / "collection.md").read_text(encoding="utf-8")


def test_the_how_tos_lines_run_as_they_stand(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    save_model("outputs/first/latest.pt", small_model(), source="a test")
    shutil.copy(folder / "05.jpg", "beach.jpg")
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    names = {}
    exec(compile(block, "collection.md", "exec"), names)
    assert names["hits"][0].name == "05.jpg" and len(names["hits"]) == 20 and (tmp_path / "found.png").is_file()
    assert sum(map(len, names["groups"])) == COUNT and len(names["parts"]) == len(names["odd"]) == 10
    (shell,) = re.findall(r"\n\n```\n(.*?)```", PAGE, flags=re.DOTALL)
    assert shell.count("python -m wejepa.collection") == 4
    for line in shell.splitlines():
        assert main(shlex.split(line, comments=True)[3:]) == 0, line
    assert "24 images, 0 to compute" in capsys.readouterr().out
