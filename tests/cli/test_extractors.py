import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel.cam import CAM, GradCAM, interpolate_position_embedding, multi_scale_cam, tokens_to_map
from pseudolabel.cli._console import UserError
from pseudolabel.cli._extractors import find_way, maps_of
from pseudolabel.cli._models import Classifier


class Conv(nn.Module):
    """Pooling and a linear layer, with a norm between where it is asked for."""

    def __init__(self, norm: bool = False, output: str = "logits") -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        self.norm = nn.LayerNorm(6) if norm else nn.Identity()
        self.head = nn.Linear(6, 4)
        self.output = output

    def forward(self, x: Tensor) -> object:
        features = self.body(x)
        logits = self.head(self.norm(features.mean((2, 3))))
        return (logits, features) if self.output == "tuple" else logits


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.qkv, self.mlp = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.scaled_dot_product_attention(*self.qkv(self.norm1(x)).chunk(3, 2))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches of 8 x 8 of images of 32 x 32, two tokens in front."""

    image_size = 32

    def __init__(self, sizes: str = "any") -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 8, 8)
        self.front = nn.Parameter(torch.randn(1, 2, 12))
        self.positions = nn.Parameter(torch.randn(1, 18, 12))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(12, 4)
        self.sizes = sizes
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        self.seen.append(tuple(x.shape[2:]))
        if self.sizes == "one" and x.shape[2:] != (32, 32):
            raise AssertionError("Wrong image height!")
        if self.sizes == "large" and min(x.shape[2:]) < 32:
            raise RuntimeError("window larger than image")
        if not interpolate_pos_encoding and x.shape[2:] != (32, 32):
            raise ValueError("Image size doesn't match")
        x = self.embed(x)
        grid = tuple(x.shape[2:])
        x = torch.cat([self.front.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
        x = x + interpolate_position_embedding(self.positions, (4, 4), grid, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def lens(model: nn.Module, way, places=(0, 1, 2, 3), copies: int = 1):
    look = maps_of(model, way, places, copies)
    return lambda image, present: look(torch.tensor([present]), lambda cam: cam(image))


def test_cam_where_the_mean_of_a_map_is_the_logit():
    way = find_way(Classifier(Conv().eval()))
    assert (way.maps, way.layer, way.num_classes, way.only) == ("cam", None, 4, None)
    assert "by the weights of the last linear layer" in way.said
    assert "the mean of a map is its class's logit" in way.said


@pytest.mark.parametrize("layer", [None, "body"])
def test_gradients_where_it_is_not(layer):
    way = find_way(Classifier(Conv(norm=True).eval()), layer=layer)
    assert (way.maps, way.layer, way.prefix) == ("gradcam", "body", None)
    assert "because something stands between features and classifier" in way.said


@pytest.mark.parametrize(
    ("network", "settings"),
    [
        ({"own": True}, {}),
        ({}, {"maps": "cam"}),
        ({"own": True}, {"layer": "body"}),
        ({}, {"classifier": "head"}),
    ],
)
def test_who_wants_cam_gets_it_and_is_told(network, settings):
    way = find_way(Classifier(Conv(norm=True).eval(), **network), **settings)
    assert way.maps == "cam"
    assert "is not its class's logit" in way.said
    assert "compare with --maps gradcam" in way.said


def test_cam_of_a_network_that_returns_something_else():
    model = Conv(output="tuple").eval()
    way = find_way(Classifier(model, own=True))
    assert way.maps == "cam"
    assert "logit" not in way.said
    with pytest.raises(UserError, match=r"expected a network that returns logits .* got tuple"):
        find_way(Classifier(model, own=True), "gradcam")


def test_gradcam_on_demand_and_at_a_named_layer():
    model = Conv().eval()
    way = find_way(Classifier(model, own=True), "gradcam", "body.0")
    assert (way.maps, way.layer) == ("gradcam", "body.0")
    assert "because it was asked for" in way.said
    image = torch.rand(2, 3, 20, 28)
    labels = torch.zeros(2, 4)
    labels[:, [2, 3]] = 1
    wanted = GradCAM(model, "body.0")(image, labels)[:, [2, 3]]
    assert torch.equal(lens(model, way)(image, [2, 3]), wanted)


def test_errors_of_layers():
    for settings in ({"layer": "nope"}, {"classifier": "nope"}, {"maps": "gradcam", "layer": "nope"}):
        with pytest.raises(ValueError, match="nope"):
            find_way(Classifier(Conv().eval()), **settings)
    with pytest.raises(ValueError, match="features"):
        find_way(Classifier(ViT().eval(), size=32), "cam")
    with pytest.raises(UserError, match=r"returns maps or tokens, got \(1, 4\)"):
        find_way(Classifier(Conv().eval()), "gradcam", "head")


@pytest.mark.parametrize("named", [None, "blocks.1.norm1"])
def test_tokens(named):
    """Prefix and patch size are found out; views become whole patches."""
    model = ViT().eval()
    way = find_way(Classifier(model, size=32), layer=named)
    assert (way.maps, way.layer) == ("gradcam", "blocks.1.norm1")
    assert (way.prefix, way.stride, way.only, way.least) == (2, 8, None, 1)
    assert way.arguments == {"interpolate_pos_encoding": True}
    assert "4 x 4 places, 2 in front" in way.said
    image, model.seen = torch.rand(2, 3, 24, 43), []
    maps = lens(model, way)(image, [1, 3])
    assert model.seen == [(24, 40)]
    fitted = F.interpolate(image, size=(24, 40), mode="bilinear", antialias=True)
    cam = GradCAM(model, reshape=lambda tokens: tokens_to_map(tokens, (3, 5), num_prefix_tokens=2))
    labels = torch.tensor([[0, 1, 0, 1]] * 2)
    assert torch.equal(maps, cam(fitted, labels, interpolate_pos_encoding=True)[:, [1, 3]])


def test_channels_last():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Conv2d(3, 12, 8, 8), nn.Linear(12, 4)
            self.blocks = nn.ModuleList(nn.LayerNorm(12) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x).movedim(1, -1)
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean((1, 2)))

    model = Last().eval()
    way = find_way(Classifier(model, size=32), "gradcam", "blocks.1")
    assert (way.prefix, way.stride) == (0, 8)
    assert lens(model, way)(torch.rand(1, 3, 16, 24), [0]).shape == (1, 1, 2, 3)


def test_network_of_one_size():
    model = ViT("one").eval()
    way = find_way(Classifier(model, size=32))
    assert way.only == 32
    assert lens(model, way)(torch.rand(1, 3, 50, 20), [0]).shape == (1, 1, 4, 4)


def test_network_that_takes_no_small_images():
    model = ViT("large").eval()
    way = find_way(Classifier(model, size=32))
    assert (way.only, way.least) == (None, 32)
    assert lens(model, way)(torch.rand(1, 3, 50, 20), [0]).shape == (1, 1, 6, 4)


def test_network_that_fails():
    with pytest.raises(UserError, match=r"fails on an image of 224 x 224: Assert.* image_size"):
        find_way(Classifier(ViT("one").eval()))


def test_places_and_copies():
    """Classes of the labels are those at their places; a copy shares weights."""
    model = Conv().eval()
    way = find_way(Classifier(model))
    look = maps_of(model, way, (3, 0), 2)
    image = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        wanted = CAM(model)(image)

        def both(cam):
            return torch.cat([cam(image), look(torch.tensor([[1]]), lambda inner: inner(image))], 1)

        assert torch.equal(look(torch.tensor([[0, 1]]), both), wanted[:, [3, 0, 0]])
        with torch.no_grad():
            model.head.weight.zero_()
        assert not look(torch.tensor([[0, 1]]), both).any()


@pytest.mark.parametrize("maps", ["cam", "gradcam"])
def test_threads_have_networks_that_take_notes(maps):
    """What a network notes down of an image is of that image, whatever the other threads look at."""
    turn = threading.Barrier(2)

    class Notes(Conv):
        meet = False

        def forward(self, x: Tensor) -> Tensor:
            self.means = x.mean((2, 3))
            if self.meet:
                turn.wait(20)
            return super().forward(x * self.means[:, :, None, None])

    model = Notes().eval()
    look = maps_of(model, find_way(Classifier(model, own=True), maps, "body"), (0, 1, 2, 3), 2)
    images = [torch.rand(1, 3, 16, 24), torch.rand(1, 3, 24, 16)]

    def one(image):
        with torch.no_grad():
            return look(torch.tensor([[0, 2]]), lambda cam: cam(image))

    wanted = [one(image) for image in images]
    Notes.meet = True
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(one, images))
    assert all(map(torch.equal, found, wanted))


def test_tokens_of_different_sizes_in_threads():
    """How tokens are laid out depends on the image: the threads do not share it."""
    model = ViT().eval()
    way = find_way(Classifier(model, size=32))
    look = maps_of(model, way, (0, 1, 2, 3), 2)
    images = [torch.rand(1, 3, 16, 48), torch.rand(1, 3, 48, 16)]

    def one(image):
        return look(torch.tensor([[0, 2]]), lambda cam: cam(image))

    wanted = [one(image) for image in images]
    assert wanted[0].shape == (1, 2, 2, 6)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(one, images * 20))
    assert all(map(torch.equal, found, wanted * 20))


def test_no_class_count_is_guessed():
    """Merging views needs no labels here: maps are those of the present classes alone."""
    model = Conv(norm=True).eval()
    way = find_way(Classifier(model))
    image = torch.rand(1, 3, 16, 24)
    look = maps_of(model, way, (0, 1, 2, 3), 1)
    maps = look(torch.tensor([[2]]), lambda cam: multi_scale_cam(cam, image, None, (1.0, 2.0)))
    with GradCAM(model) as cam:
        labels = torch.tensor([[0, 0, 1, 0]])
        wanted = multi_scale_cam(lambda x: cam(x, labels.expand(len(x), -1)), image, labels, (1.0, 2.0))
    torch.testing.assert_close(maps, wanted[:, [2]])
    assert re.search("Grad-CAM at the last part that convolves", way.said)
