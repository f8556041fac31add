"""What scripts/render_notebooks.py makes of a notebook's outputs."""

import base64
import importlib.util
import io
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "render_notebooks.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("render_notebooks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", dpi=(150, 150))
    return base64.b64encode(file.getvalue()).decode()


def cell(*pictures: str, alt=()):
    outputs = [nbformat.v4.new_output("display_data", {"image/png": data, "text/plain": "<Figure>"}) for data in pictures]
    printed = nbformat.v4.new_output("stream", name="stdout", text="a line\n")
    return nbformat.v4.new_code_cell("draw()", outputs=[printed, *outputs], metadata={"alt": alt} if alt else {})


def test_texts_go_to_their_pictures(script):
    tiny = png(np.zeros((2, 2, 3), np.uint8))
    described = cell(tiny, tiny, alt=["One.", "Other."])
    script.describe_pictures(described)
    assert [o.metadata["image/png"]["alt"] for o in script.pictures(described)] == ["One.", "Other."]
    assert described.metadata["mystnb"]["image"]["alt"] == "One. Other."
    single = cell(tiny, alt="Alone.")
    script.describe_pictures(single)
    assert script.pictures(single)[0].metadata["image/png"]["alt"] == "Alone."
    with pytest.raises(SystemExit, match="shows 2 pictures, its metadata.alt describes 1"):
        script.describe_pictures(cell(tiny, tiny, alt="One."))


def test_large_pictures_have_256_colours_and_small_ones_are_left(script):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    large, small = png(noise), png(noise[:20, :20])
    assert script.smaller(small) == small
    few = Image.open(io.BytesIO(base64.b64decode(script.smaller(large))))
    assert few.size == (200, 200) and len(few.convert("RGB").getcolors(256)) <= 256 and round(few.info["dpi"][0]) == 150
    assert len(script.smaller(large)) < len(large)


def test_one_kind_of_picture_is_kept(script):
    output = nbformat.v4.new_output("display_data", {"image/png": png(np.zeros((2, 2, 3), np.uint8)), "image/jpeg": "more"})
    assert set(script.clean(output).data) == {"image/png"}


def test_texts_are_put_in_without_running_anything(script, tmp_path):
    tiny, path = png(np.zeros((2, 2, 3), np.uint8)), tmp_path / "notebook.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell(tiny, alt="One.")]), path)
    script.put_in_texts(path)
    (found,) = nbformat.read(path, as_version=4).cells
    assert found.outputs[0].text == "a line\n" and found.outputs[1].metadata["image/png"]["alt"] == "One."
