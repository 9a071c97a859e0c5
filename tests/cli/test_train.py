import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import pseudolabel as pl
from pseudolabel import io
from pseudolabel.cli import _training, main
from pseudolabel.cli._training import Settings, random_view
from pseudolabel.cli.train import segmentation_loss, train_classifier, train_segmenter

# Small networks at their first steps: what they let go is not looked at here.
pytestmark = pytest.mark.filterwarnings("ignore:pretended under-fitting:UserWarning")

NETWORKS = '''
import os, signal
from torch import nn

class Dies(nn.Module):
    """Passes on what comes, until the process is killed in a step of the training."""
    def forward(self, x):
        if self.training:
            self.calls = getattr(self, "calls", 0) + 1
            if str(self.calls) == os.environ.get("DIE_IN_STEP"):
                os.kill(os.getpid(), signal.SIGKILL)
            if str(self.calls) == os.environ.get("STOP_IN_STEP"):
                raise KeyboardInterrupt
        return x

def segmenter():
    first = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(Dies(), *first, nn.Conv2d(8, 7, 1))

def plain():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 7, 1))
'''

CLASSIFIER = "pseudolabel.cli.demo:classifier"


@pytest.fixture
def job(data, monkeypatch) -> SimpleNamespace:
    """Command lines of small jobs, run in the folder of their network."""
    (data.root / "networks_of_the_test.py").write_text(NETWORKS)
    monkeypatch.chdir(data.root)
    monkeypatch.syspath_prepend(data.root)
    monkeypatch.delitem(sys.modules, "networks_of_the_test", raising=False)
    short = ("--epochs", "4", "--batch-size", "2", "--crop", "32", "--save-every", "4")  # 10 steps
    photos = str(data.images)

    def segmenter(*more, out="run", network="segmenter"):
        files = ("--masks", str(data.truth), "--model", f"networks_of_the_test:{network}", "--out", out)
        return ["train", "segmenter", photos, *files, *short, *more]

    def classifier(*more, out="run"):
        files = ("--labels", str(data.csv), "--model", CLASSIFIER, "--out", out)
        return ["train", "classifier", photos, *files, *short, *more]

    return SimpleNamespace(segmenter=segmenter, classifier=classifier, root=data.root)


def run(arguments, *, processes=0, **environment):
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"] * bool(
        processes
    )
    return subprocess.run(
        [sys.executable, "-m", *launcher, "pseudolabel", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def log(out) -> list[dict]:
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def weights(out) -> dict[str, torch.Tensor]:
    return torch.load(Path(out, "weights.pt"), weights_only=True)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Going on


def test_a_killed_run_goes_on_as_if_it_had_not_been(job):
    assert main(job.segmenter(out="whole")) == 0
    killed = run(job.segmenter(), DIE_IN_STEP="7")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [entry["step"] for entry in log("run")] == [1, 2, 3, 4, 5, 6]
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 4
    with Path("run/log.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # what a process leaves that dies while it writes
    assert run(job.segmenter()).returncode == 0
    assert log("run") == log("whole")  # every figure, bit for bit
    assert [entry["step"] for entry in log("run")] == list(range(1, 11))
    assert same(weights("run"), weights("whole"))


@pytest.mark.parametrize(
    "more",
    [
        ("--optimizer", "adamw", "--lr", "1e-3", "--amp", "bf16"),
        ("--loss", "puf", "--puf-mode", "pow", "--beta", "3", "--batch-size", "3", "--epochs", "6"),
    ],
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(job, more, monkeypatch):
    assert main(job.segmenter(*more, out="whole")) == 0
    for stop, done in (("7", 6), ("5", 8), ("1", 8)):  # each from the checkpoint of the one before
        monkeypatch.setenv("STOP_IN_STEP", stop)
        assert main(job.segmenter(*more)) == 130
        assert [entry["step"] for entry in log("run")] == list(range(1, done + 1))
    monkeypatch.delenv("STOP_IN_STEP")
    assert main(job.segmenter(*more)) == 0
    assert log("run") == log("whole")
    assert same(weights("run"), weights("whole"))


@pytest.mark.parametrize("line", [b"{}", b"5", b"null", b'{"step": "7"}', b"\xff\xfe", b"[" * 100_000, b""])
def test_a_line_of_the_log_that_is_no_step(job, line, monkeypatch):
    """Whatever stands there: the log goes on after the steps of the checkpoint that can be read."""
    assert main(job.segmenter(out="whole")) == 0
    monkeypatch.setenv("STOP_IN_STEP", "7")
    assert main(job.segmenter()) == 130
    lines = Path("run/log.jsonl").read_bytes().splitlines(keepends=True)
    Path("run/log.jsonl").write_bytes(b"".join([*lines[:4], line + b"\n", *lines[4:]]))
    monkeypatch.delenv("STOP_IN_STEP")
    assert main(job.segmenter()) == 0
    assert log("run") == log("whole")


def test_a_finished_run_is_left_as_it_is(job, capsys):
    assert main(job.classifier()) == 0
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    assert before.keys() == {"checkpoint.pt", "log.jsonl", "pseudolabel.json", "weights.pt"}
    Path("run/weights.pt").unlink()  # as if killed between the two
    assert main(job.classifier()) == 0
    assert "all done before" in capsys.readouterr().err
    assert same(weights("run"), torch.load("run/checkpoint.pt", weights_only=True)["model"])
    assert Path("run/log.jsonl").read_bytes() == before["log.jsonl"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lr", "0.02"], "run with {'lr': 0.01}, now {'lr': 0.02}"),
        (["--epochs", "5"], "run with {'steps': 10}, now {'steps': 13}"),
        (["--scales", "1", "2"], "'scales': [0.5, 2.0]"),
        (["--loss", "puf"], "{'puf': {'beta': 0.5, 'gate_over': 'all', 'k': 0.5, 'mode': 'clamp'}}"),
        (["--loss", "puf", "--beta", "0.8"], "'beta': 0.8, 'gate_over': 'all', 'k': 0.8"),
        (
            ["--loss", "puf", "--beta", "0.8", "--puf-mode", "pow"],
            "'beta': 0.8, 'gate_over': 'all', 'k': 0.5",
        ),
        (["--seed", "1"], "'seed': 0"),
    ],
)
def test_other_settings_are_refused_by_name(job, capsys, more, said):
    assert main(job.segmenter()) == 0
    before = Path("run/checkpoint.pt").read_bytes()
    capsys.readouterr()
    assert main(job.segmenter(*more)) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "--overwrite" in err
    assert Path("run/checkpoint.pt").read_bytes() == before
    assert main(job.segmenter(*more, "--overwrite")) == 0
    fresh = job.segmenter(*more, out="fresh")
    assert main(fresh) == 0
    assert log("run") == log("fresh")


def test_other_data_are_refused(job, data, capsys):
    assert main(job.segmenter()) == 0
    mask = io.read_mask(data.truth / "photo2.png")
    io.write_mask(data.truth / "photo2.png", torch.where(mask == 0, 255, mask))
    assert main(job.segmenter()) == 2
    assert "{'masks': " in capsys.readouterr().err
    assert main(job.classifier(out="run2")) == 0
    data.write_labels(data.names, ~data.labels)
    assert main(job.classifier(out="run2")) == 2
    assert "{'labels': " in capsys.readouterr().err
    data.write_labels(data.names, data.labels)
    text = data.csv.read_text()
    data.csv.write_text(text.replace("ring", "disk", 1))
    assert data.csv.read_text() != text
    assert main(job.classifier(out="run2")) == 2
    assert "{'classes': " in capsys.readouterr().err


def test_other_photos_of_the_same_names_are_refused(job, data, capsys):
    assert main(job.segmenter()) == 0
    assert main(job.segmenter()) == 0
    path = data.images / "photo3.png"
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    assert main(job.segmenter()) == 2
    assert "{'photos': " in capsys.readouterr().err


def test_what_does_not_change_the_result_may_differ(job):
    assert main(job.segmenter("--workers", "1", out="one")) == 0
    assert main(job.segmenter("--workers", "4", "--save-every", "3", out="four")) == 0
    assert log("one") == log("four")


@pytest.mark.parametrize("harm", ["truncated", "text", "other", "network"])
def test_a_checkpoint_that_is_none(job, capsys, harm):
    assert main(job.segmenter()) == 0
    path = Path("run/checkpoint.pt")
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"text"}.get(harm, whole))
    if harm == "other":
        torch.save({"step": 3}, path)
    if harm == "network":
        networks = Path("networks_of_the_test.py")
        networks.write_text(NETWORKS.replace("8", "9"))
        sys.modules.pop("networks_of_the_test")
    capsys.readouterr()
    assert main(job.segmenter()) == 2
    err = capsys.readouterr().err
    assert str(path) in err
    assert len(err.splitlines()) == 1


# Several processes


PUF = ("--loss", "puf", "--lr", "0.05", "--k", "1.5")


@pytest.mark.parametrize(
    "more", [(), (*PUF, "--beta", "0.65"), (*PUF, "--beta", "1.95", "--gate-over", "classes")]
)
def test_two_processes_are_one(job, data, more):
    """Parts of a batch differ in their number of valid pixels, and in what they would say of the gate."""
    mask = io.read_mask(data.truth / "photo0.png")
    mask[:, 3:] = 255
    io.write_mask(data.truth / "photo0.png", mask)
    more = (*more, "--batch-size", "4", "--scales", "0.3", "1")
    assert main(job.segmenter(*more, out="one", network="plain")) == 0
    done = run(job.segmenter(*more, out="two", network="plain"), processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("steps on 5 photos") == 1
    one, two = (torch.tensor([entry["loss"] for entry in log(out)]) for out in ("one", "two"))
    assert len(one) == 5
    assert torch.allclose(one, two, rtol=1e-5, atol=1e-6)
    for name, value in weights("one").items():
        assert torch.allclose(value, weights("two")[name], atol=1e-5), name
    if more[0] == "--loss":
        plainly = more[more.index("--batch-size") :]
        assert main(job.segmenter(*plainly, "--lr", "0.05", out="ce", network="plain")) == 0
        cross_entropy = torch.tensor([entry["loss"] for entry in log("ce")])
        assert not torch.allclose(one, cross_entropy, rtol=1e-4)  # the gate was open


def test_each_process_needs_a_part_of_the_batch(job):
    done = run(job.segmenter("--batch-size", "1"), processes=2)
    assert done.returncode != 0
    assert "a batch of 1 has no part for each of 2 processes" in done.stderr


# Order and views


def test_order_is_a_function_of_seed_and_step():
    settings = Settings(steps=9, batch_size=4)

    def sample(index, random):
        return torch.tensor(index), torch.tensor(random.random())

    def batches(settings, start, workers=2):
        return list(_training._batches(sample, 5, settings, start, workers))

    whole = batches(settings, 0)
    assert len(whole) == 9
    indices = torch.cat([index for index, _ in whole])
    for epoch in range(7):
        assert sorted(indices[5 * epoch : 5 * epoch + 5].tolist()) == [0, 1, 2, 3, 4]
    assert len({tuple(indices[5 * epoch : 5 * epoch + 5].tolist()) for epoch in range(7)}) > 1
    assert len(torch.cat([number for _, number in whole]).unique()) == 36  # nothing is drawn twice
    for (index, number), (again, once_more) in zip(whole[4:], batches(settings, 4, workers=1), strict=True):
        assert torch.equal(index, again)
        assert torch.equal(number, once_more)
    assert not torch.equal(batches(replace(settings, seed=1), 0)[0][1], whole[0][1])


def test_parts_of_a_batch_make_it_whole(monkeypatch):
    settings = Settings(steps=3, batch_size=5)

    def batches():
        return list(
            _training._batches(
                lambda i, random: (torch.tensor(i), torch.tensor(random.random())), 7, settings, 0, 1
            )
        )

    whole = batches()
    monkeypatch.setattr(_training, "num_processes", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(_training, "_rank", lambda rank=rank: rank)
        parts.append(batches())
    for batch, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([first[1], second[1]]).sort()[0], batch[1].sort()[0])


def rng(seed=0):
    return np.random.default_rng(seed)


def test_view_of_the_crops_own_size_is_the_photo(generator):
    image = torch.rand(3, 24, 32, generator=generator)
    mask = torch.randint(0, 5, (24, 32), generator=generator)
    settings = Settings(steps=1, crop=32, scales=(1, 1), flip=False, mean=(0.1, 0.2, 0.3), std=(0.5, 1, 2))
    view, labels = random_view(image, mask, settings, rng())
    (top,) = {int(row) for row in (labels[:, 0] != 255).nonzero()[:1, 0]}
    assert labels.dtype == torch.int64
    assert torch.equal(labels[top : top + 24], mask)
    wanted = (image - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 1, 2]).view(3, 1, 1)
    assert torch.allclose(view[:, top : top + 24], wanted, atol=1e-6)
    outside = labels == 255
    assert int(outside.sum()) == 8 * 32
    assert torch.equal(view[:, outside], torch.zeros(3, 8 * 32))
    mirrored = {
        bool(
            torch.equal(
                random_view(image, mask, replace(settings, flip=True), rng(k))[1].flip(-1)[labels != 255],
                labels[labels != 255],
            )
        )
        for k in range(12)
    }
    assert mirrored == {False, True}


@pytest.mark.parametrize("size", [(20, 60), (90, 50), (30, 80), (48, 48)])
def test_image_and_mask_stay_together(size):
    """Labels are painted into the photo and found again at the same pixels."""
    mask = torch.zeros(size, dtype=torch.uint8)
    mask[size[0] // 2 :, : size[1] // 2] = 3
    mask[:, size[1] - size[1] // 3 :] = 8
    image = (mask / 10)[None].expand(3, -1, -1)
    settings = Settings(steps=1, crop=40, scales=(0.5, 2.0), mean=(0, 0, 0), std=(0.1, 0.1, 0.1))
    shown = set()
    for seed in range(20):
        view, labels = random_view(image, mask, settings, rng(seed))
        assert view.shape == (3, 40, 40)
        assert labels.shape == (40, 40)
        shown.add(int((labels != 255).sum()))
        inside = labels != 255
        off = (view[0] - labels).abs()[inside]
        # Only pixels at an edge between labels are mixtures.
        assert (off < 1e-4).double().mean() > 0.6
    assert len(shown) > 5


# Losses


def test_loss_is_that_of_the_library(generator):
    logits = torch.randn(2, 3, 6, 7, generator=generator)
    mask = torch.randint(0, 3, (2, 12, 14), generator=generator)
    mask[0, :4] = 255
    for settings in (
        {},
        {"mode": "pow", "beta": 9.0, "k": 0.7},
        {"mode": "ignore", "beta": 9.0, "k": 1.0},
        {"beta": 9.0, "gate_over": "classes"},
    ):
        total, number = segmentation_loss(logits, mask, **settings)
        wanted = pl.losses.pretended_under_fitting_loss(logits, mask, **{"beta": 0, **settings})
        assert torch.allclose(total / number, wanted)
    resized = nn.functional.interpolate(logits, (12, 14), mode="bilinear")
    total, number = segmentation_loss(logits, mask)
    assert torch.allclose(total / number, nn.functional.cross_entropy(resized, mask, ignore_index=255))


def test_clamp_and_ignore_train_alike(job):
    more = ("--loss", "puf", "--beta", "3", "--k", "1.9")
    for mode in ("clamp", "ignore", "pow"):
        assert main(job.segmenter(*more, "--puf-mode", mode, out=mode)) == 0
    assert same(weights("clamp"), weights("ignore"))
    assert not same(weights("clamp"), weights("pow"))
    assert log("clamp") != log("ignore")  # the same gradients, other values


def test_a_loss_that_is_not_finite_ends_it(job, capsys):
    assert main(job.segmenter("--lr", "1e30")) == 2
    assert "a lower learning rate may help" in capsys.readouterr().err
    assert not Path("run/weights.pt").exists()


# What it learns


def test_functions_learn_and_leave_the_global_generator_alone(data):
    photos = sorted(data.images.iterdir())
    masks = [data.truth / path.name for path in photos]
    settings = Settings(steps=40, batch_size=5, crop=48, scales=(1, 1), lr=0.02, optimizer="adamw")
    torch.manual_seed(5)
    segmenter = nn.Sequential(nn.Conv2d(3, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 7, 1))
    classifier = nn.Sequential(
        segmenter, nn.Dropout(0.1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 6)
    )
    state = torch.get_rng_state()
    losses = train_segmenter(segmenter, photos, masks, settings)
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
    segmenter.requires_grad_(False)
    before = {name: value.clone() for name, value in segmenter.state_dict().items()}
    losses = train_classifier(classifier, photos, data.labels, settings)
    assert np.mean(losses[-5:]) < 0.9 * losses[0]
    assert same(before, segmenter.state_dict())
    assert torch.equal(torch.get_rng_state(), state)


def test_generate_reads_what_train_has_written(job, data):
    assert main(job.classifier("--seed", "3")) == 0
    assert main(data.generate("--weights", "run/weights.pt")) == 0
    assert len(list(data.out.glob("*.png"))) == 5
    # It can be the beginning of another run, too.
    assert main(job.classifier("--weights", "run/weights.pt", out="further")) == 0
    assert log("further")[0]["loss"] != log("run")[0]["loss"]


def test_labels_reach_their_photos(job, data):
    """A classifier that knows nothing but brightness tells photos that are labelled by it."""
    shades = (0, 60, 120, 180, 240)
    for path, shade in zip(sorted(data.images.iterdir()), shades, strict=True):
        from PIL import Image

        Image.new("RGB", (40, 30), (shade, shade, shade)).save(path)
    labels = torch.zeros(5, 6, dtype=torch.bool)
    labels[3:, 2] = True
    data.write_labels([*reversed(data.names)], labels.flip(0))
    model = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(3, 6))
    photos = sorted(data.images.iterdir())
    labels = io.read_labels(data.csv)
    settings = Settings(
        steps=150, batch_size=5, crop=16, scales=(1, 1), lr=0.3, mean=(0, 0, 0), std=(1, 1, 1)
    )
    train_classifier(model, photos, labels.select([path.stem for path in photos]), settings)
    views = torch.tensor(shades).view(5, 1, 1, 1).expand(5, 3, 4, 4) / 255
    assert ((model(views)[:, 2] > 0) == torch.tensor([False, False, False, True, True])).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("amp", ["no", "bf16", "fp16"])
def test_mixed_precision_on_cuda(job, amp):
    more = ("--device", "cuda", "--amp", amp)
    assert main(job.segmenter(*more)) == 0
    assert main(job.segmenter(out="cpu")) == 0
    assert (torch.load("run/checkpoint.pt", weights_only=True)["scaler"] != {}) == (amp == "fp16")
    assert all(value.device.type == "cpu" for value in weights("run").values())
    cuda, cpu = (np.mean([entry["loss"] for entry in log(out)]) for out in ("run", "cpu"))
    assert cuda == pytest.approx(cpu, rel=0.1)


def test_checkpoint_holds_everything(job):
    assert main(job.segmenter()) == 0
    checkpoint = torch.load("run/checkpoint.pt", weights_only=True)
    assert checkpoint.keys() == {"model", "optimizer", "scaler", "step", "settings"}
    assert checkpoint["step"] == 10
    assert checkpoint["settings"]["job"] == "segmenter"
    assert checkpoint["optimizer"]["state"]


# What is missing or wrong


def test_what_has_no_partner_is_reported(job, data, capsys):
    (data.truth / "photo1.png").unlink()
    (data.images / "photo2.png").unlink()
    assert main(job.segmenter()) == 1
    err = capsys.readouterr().err
    assert "1 without a mask" in err
    assert "photo1" in err
    assert "1 without a photo" in err
    assert "steps on 3 photos" in err
    (data.root / "list.txt").write_text("photo0\nphoto4\n")
    assert main(job.segmenter("--list", "list.txt", out="two")) == 0
    assert "4 steps on 2 photos" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("segmenter", ["--labels", "labels.csv"], "a segmenter is trained on --masks DIR"),
        ("classifier", ["--masks", "truth"], "a classifier is trained on --labels FILE"),
        ("classifier", ["--loss", "puf"], "and that to a segmenter"),
        ("segmenter", ["--beta", "1"], "--beta, --k and --gate-over belong to --loss puf"),
        ("segmenter", ["--gate-over", "classes"], "--gate-over belong to --loss puf"),
        ("segmenter", ["--loss", "puf", "--k", "0"], "k: expected"),
        ("segmenter", ["--scales", "2", "1"], "scales: expected two numbers > 0, the smaller first"),
        ("segmenter", ["--lr", "0"], "lr: expected a number > 0"),
        ("segmenter", ["--seed", "-1"], "seed: expected a number >= 0"),
        ("segmenter", ["--std", "0", "1", "1"], "std: expected numbers > 0"),
        ("segmenter", ["--amp", "fp16"], "needs a CUDA device"),
        ("segmenter", ["--device", "nonsense"], "--device: 'nonsense'"),
        ("segmenter", ["--model", CLASSIFIER], "the network returns (1, 6) for one image"),
        ("classifier", ["--model", "networks_of_the_test:plain"], "returns (1, 7, 16, 16) for one image"),
        ("classifier", ["--model", "torch.nn:Identity"], "returns (1, 3, 32, 32)"),
        ("segmenter", ["--model", "torch.nn:Identity"], "has no parameter that requires a gradient"),
        ("segmenter", ["--weights", "nowhere.pt"], "nowhere.pt: No such file"),
        ("segmenter", ["--masks", "nowhere"], "nowhere: No such file"),
    ],
)
def test_errors_are_one_line(job, capsys, kind, more, said):
    assert main(getattr(job, kind)(*more)) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
    assert not Path("run/weights.pt").exists()


def test_wrong_files_are_named(job, data, capsys):
    mask = torch.zeros(40, 48, dtype=torch.uint8)
    mask[3, 4:6] = torch.tensor([9, 255])
    io.write_mask(data.truth / "photo3.png", mask)
    assert main(job.segmenter()) == 2
    assert "photo3.png: has label 9, the network has 7 classes" in capsys.readouterr().err
    io.write_mask(data.truth / "photo3.png", torch.zeros(4, 4, dtype=torch.uint8))
    assert main(job.segmenter("--overwrite")) == 2
    assert "photo3.png: the mask has size (4, 4)" in capsys.readouterr().err
    (data.images / "photo3.png").write_bytes(b"text")
    assert main(job.classifier(out="other")) == 2
    assert "photo3.png" in capsys.readouterr().err


def test_help(capsys):
    assert main(["train", "--help"]) == 0
    assert "usage: pseudolabel train" in capsys.readouterr().out
