"""The class in a pipeline of one's own, as the page of the documentation has it."""

import re
from pathlib import Path

import pytest

from pseudolabel import io
from pseudolabel.cli import main
from pseudolabel.cli._marks import digest_file
from pseudolabel.cli.ray import GenerateMasks

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # of its own parts

PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "cluster.md"


def test_documented_pipeline(ray, data, capsys):
    (code,) = re.findall(r"^```\n(import .*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (data.root / "my_networks.py").write_text(
        (data.root / f"{data.model.partition(':')[0]}.py").read_text() + "\nclassifier = network\n"
    )
    broken = data.root / "photos" / "photo05.png"
    broken.write_bytes(broken.read_bytes()[:200])
    exec(compile(code, str(PAGE), "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.startswith("photo05 ")
    assert len(data.opened()) == len(set(data.opened())) == 2
    options = ("--model", "my_networks:classifier", "--weights", "weights.pt", "--out", "local")
    assert main(["generate", "photos", "--labels", "labels.csv", *options]) == 1
    masks = {path.name: path.read_bytes() for path in (data.root / "local").glob("*.png")}
    assert len(masks) == len(data.names) - 1
    assert masks == {path.name: path.read_bytes() for path in (data.root / "masks").iterdir()}


def test_photos_that_go_together(ray, data, files):
    """Rows of one number, as `--batch-size` would have put them together."""
    labels = io.read_labels("labels.csv")
    names = data.names[:16:2]  # of one size
    rows = [
        {"photo": f"photos/{name}.png", "labels": labels[name].numpy(), "batch": 7 - index // 4}
        for index, name in enumerate(names)
    ]
    made = ray.data.from_items(rows, override_num_blocks=1).map_batches(
        GenerateMasks,
        fn_constructor_kwargs={
            "model": data.model,
            "weights": "weights.pt",
            "classes": labels.classes,
            "out": "masks",
            "cams": "masks_cams",
            "folder": data.root,
            "scales": (1.0, 0.5),
            "crf": False,
        },
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=1,
    )
    rows = sorted(made.take_all(), key=lambda row: row["name"])
    assert [row["name"] for row in rows] == names
    for row in rows:
        assert row["skipped"] == ""
        assert list(row["labels"]) == labels[row["name"]].nonzero()[:, 0].tolist()
        assert row["photo"] == digest_file(Path("photos", f"{row['name']}.png"))
        assert row["mask"] == digest_file(Path("masks", f"{row['name']}.png"))
    Path("list.txt").write_text("\n".join(names))
    assert main(data.generate("local", "--batch-size", "4", "--list", "list.txt")) == 0
    local = {name: its for name, its in files(data.root, "local").items() if "/pseudolabel" not in name}
    assert files(data.root, "masks") == local
