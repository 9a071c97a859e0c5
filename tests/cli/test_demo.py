import contextlib
import io as io_module
import re

import pytest
import torch
from PIL import Image

from pseudolabel import io
from pseudolabel.cli import main
from pseudolabel.cli._scenes import CLASSES


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two small runs of the same seed, the second in the folder of a larger one; and what it printed."""
    folders = [tmp_path_factory.mktemp("demo") for _ in range(2)]
    state = torch.random.get_rng_state()
    for folder, images, seed in ((folders[0], 12, 7), (folders[1], 13, 6), (folders[1], 12, 7)):
        arguments = ["--out", str(folder), "--images", str(images), "--epochs", "1", "--seed", str(seed)]
        with contextlib.redirect_stdout(io_module.StringIO()) as printed:
            assert main(["demo", *arguments]) == 0
    assert torch.equal(state, torch.random.get_rng_state())
    return *folders, printed.getvalue()


def test_what_it_leaves(made, capsys):
    folder = made[0]
    labels = io.read_labels(folder / "labels.csv")
    assert labels.classes == CLASSES[1:]
    assert len(labels) == 12
    for name in labels.names:
        mask, truth = (io.read_mask(folder / kind / f"{name}.png") for kind in ("masks", "truth"))
        assert mask.shape == truth.shape == io.image_size(folder / "images" / f"{name}.png")
        present = {0, *(labels[name].nonzero()[:, 0] + 1).tolist()}
        assert set(mask.unique().tolist()) <= present == {0, *truth.unique().tolist()}
    with Image.open(folder / "panels.png") as picture:
        assert picture.width > 1000
    # What it leaves is what the other commands take.
    assert (
        main(
            [
                "evaluate",
                str(folder / "masks"),
                str(folder / "truth"),
                "--classes",
                str(folder / "classes.txt"),
            ]
        )
        == 0
    )
    out = folder / "again"
    arguments = ["generate", str(folder / "images"), "--labels", str(folder / "labels.csv")]
    model = ["--model", "pseudolabel.cli.demo:classifier", "--weights", str(folder / "classifier.pt")]
    assert main([*arguments, *model, "--out", str(out), "--no-crf", "--scales", "1"]) == 0
    assert len(list(out.glob("*.png"))) == 12


def test_the_same_for_a_seed_and_nothing_of_an_earlier_run(made):
    for kind in ("images", "truth", "masks"):
        one, two = ({path.name: path.read_bytes() for path in (made[i] / kind).iterdir()} for i in (0, 1))
        assert one == two
    one, two = (torch.load(made[i] / "classifier.pt", weights_only=True) for i in (0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_table(made):
    for stage in ("CAM", "CAM + CRF", "CVS", "CVS + shares", "CVS + shares + CRF"):
        assert re.search(
            rf"{re.escape(stage)} +│ +(alpha|background) [\d.]+ +│ 0\.\d\d\d │ +\d+\.\d │", made[2]
        )


def test_too_few_scenes(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--images", "3"]) == 2
    assert "at least 12" in capsys.readouterr().err
