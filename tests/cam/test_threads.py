"""One network in several threads, and extractors within one another: each gets what it would get alone."""

import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel.cam import CAM, GradCAM, GradCAMPlusPlus, LayerCAM, capture_attention
from pseudolabel.cam import _network as modes
from pseudolabel.cam._network import EvalMode, hook_here

THREADS = 4
LABELS = torch.tensor([[1, 0, 1, 0, 1], [0, 0, 0, 1, 0]])


class Meeting(nn.Module):
    """Lets go on who is here once all others are here as well."""

    def __init__(self) -> None:
        super().__init__()
        self.barrier: threading.Barrier | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.barrier is not None:
            self.barrier.wait(20)
        return x


class Network(nn.Module):
    """A bit of everything that is looked at. All threads meet in front of each part."""

    def __init__(self) -> None:
        super().__init__()
        self.meeting = Meeting()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.ReLU())
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.meeting(x))
        tokens = self.meeting(x).flatten(2).transpose(1, 2)
        q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, 2))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.meeting(x) + attended.transpose(1, 2).unflatten(2, x.shape[2:])
        return self.meeting(self.head(F.adaptive_avg_pool2d(x, 1).flatten(1)))


class OneByOne(Network):
    """Classifies each place, then pools."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.meeting(self.body(self.meeting(x)))
        return self.meeting(self.head(x)).mean((2, 3))


@pytest.fixture
def model() -> Network:
    return seeded(Network)


def seeded(kind: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = kind()
        for norm in [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]:
            nn.init.normal_(norm.running_mean)
    return network


def photos(count: int = THREADS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(2, 3, 8, 9, generator=generator) for _ in range(count)]


def attention(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def look(x: Tensor) -> Tensor:
        with EvalMode(model), torch.no_grad(), capture_attention(model) as layers:
            model(x)
        return torch.stack(layers)

    return look


def gradients(kind: type[GradCAM], layer: str) -> Callable[[nn.Module], Callable[[Tensor], Tensor]]:
    return lambda model: lambda x: kind(model, layer)(x, LABELS)


WAYS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "pooled": CAM,
    "target layer": lambda model: CAM(model, "body"),
    "no graph": lambda model: torch.no_grad()(CAM(model, "body", bias=True)),
    "Grad-CAM": gradients(GradCAM, "body"),
    "Grad-CAM++": gradients(GradCAMPlusPlus, "body.0"),
    "LayerCAM": gradients(LayerCAM, "body.1"),
    "attention": attention,
}


def in_threads(jobs: list[Callable[[], Any]]) -> list[Any]:
    """What each job returns, all at a time; what one of them raises."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def met(model: Network, looks: list[Callable[[Tensor], Tensor]]) -> None:
    """All in the network at a time, at the same place of it: each as alone, to the last bit."""
    images = photos(len(looks))
    before = [part.training for part in model.modules()]
    alone = [look(image) for look, image in zip(looks, images, strict=True)]
    model.meeting.barrier = threading.Barrier(len(looks))
    found = in_threads(
        [lambda look=look, image=image: look(image) for look, image in zip(looks, images, strict=True)]
    )
    for got, wanted in zip(found, alone, strict=True):
        assert torch.equal(got, wanted)
        assert got.requires_grad == wanted.requires_grad
    assert len({one.std().item() for one in alone}) == len(alone)  # they can be told apart
    assert [part.training for part in model.modules()] == before
    nothing_left(model)


def nothing_left(model: nn.Module) -> None:
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert not len(modes._users)


@pytest.mark.parametrize("way", WAYS)
def test_threads_with_extractors_of_their_own(model: Network, way: str) -> None:
    met(model, [WAYS[way](model) for _ in range(THREADS)])


@pytest.mark.parametrize("way", WAYS)
def test_threads_with_one_extractor(model: Network, way: str) -> None:
    met(model, [WAYS[way](model)] * THREADS)


def test_one_by_one_classifier() -> None:
    model = seeded(OneByOne)
    met(model, [CAM(model) for _ in range(THREADS)])


def test_extractors_of_all_kinds(model: Network) -> None:
    met(model, [look(model) for look in WAYS.values()])


def test_many_calls_at_no_fixed_time(model: Network) -> None:
    """Hundreds of calls, with threads that take turns as often as they can."""
    looks = [look(model) for look in WAYS.values()]
    images = photos(len(looks))
    alone = [look(image) for look, image in zip(looks, images, strict=True)]

    def look_on(look: Callable[[Tensor], Tensor], image: Tensor, wanted: Tensor) -> bool:
        return all(torch.equal(look(image), wanted) for _ in range(60))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        jobs = [lambda case=case: look_on(*case) for case in zip(looks, images, alone, strict=True)]
        assert all(in_threads(jobs))
    finally:
        sys.setswitchinterval(interval)
    assert all(part.training for part in model.modules())
    nothing_left(model)


@pytest.mark.parametrize("way", WAYS)
def test_who_runs_the_network_beside_an_extractor_notices_nothing(model: Network, way: str) -> None:
    look, (image, other) = WAYS[way](model.eval()), photos(2)

    def plainly() -> tuple[Tensor, bool]:
        with torch.no_grad():
            return model(other), torch.is_grad_enabled()

    wanted, _ = plainly()
    maps = look(image)
    model.meeting.barrier = threading.Barrier(2)
    found, (output, grad_enabled) = in_threads([lambda: look(image), plainly])
    assert torch.equal(found, maps)
    assert torch.equal(output, wanted)
    assert not output.requires_grad
    assert not grad_enabled


def test_hooks_are_registered_one_at_a_time() -> None:
    """PyTorch counts them without a lock, and two with the same number would be one."""
    inside: list[int] = []
    layer = nn.Identity()

    def register(hook: Callable[..., Any]) -> Any:
        inside.append(1)
        time.sleep(1e-3)
        assert len(inside) == 1
        handle = layer.register_forward_hook(hook)
        inside.pop()
        return handle

    def job() -> None:
        for _ in range(5):
            with hook_here(register, lambda *_: None):
                pass

    in_threads([job] * THREADS)
    assert not layer._forward_hooks


def test_a_network_that_spreads_over_threads_is_an_error(model: Network) -> None:
    """As `nn.DataParallel` over several devices does: the maps of one part are not those of the batch."""

    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat(in_threads([lambda part=part: self.module(part) for part in x.split(1)]))

    spread, image = Spread(), photos()[0]
    for layer in (None, "module.body"):
        with pytest.raises(ValueError, match=r"\(B, 8, h, w\), for 8 classifier inputs, got none"):
            CAM(spread, layer)(image)
    with pytest.raises(ValueError, match="target_layer: expected a layer that the network runs"):
        GradCAM(spread, "module.body")(image, LABELS)
    with pytest.raises(ValueError, match="model: expected attention"):
        attention(spread)(image)


def test_data_parallel_without_devices(model: Network) -> None:
    image = photos()[0]
    if torch.cuda.device_count() > 1:
        pytest.skip("it would spread over them")
    parallel = nn.DataParallel(model)
    assert torch.equal(CAM(parallel)(image), CAM(model)(image))
    assert torch.equal(CAM(parallel, "module.body")(image), CAM(model, "body")(image))
    assert torch.equal(GradCAM(parallel, "module.body")(image, LABELS), GradCAM(model, "body")(image, LABELS))
    assert torch.equal(attention(parallel)(image), attention(model)(image))


def test_networks_compiled_as_one_graph() -> None:
    """A hook that breaks the graph would be an error there."""
    torch._dynamo.reset()
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    with torch.no_grad():
        for image in photos(3):
            assert torch.equal(CAM(compiled)(image), CAM(network)(image))
            assert torch.equal(CAM(compiled, network[1])(image), CAM(network)(image))
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------ modes


def mixed_modes(model: Network) -> list[bool]:
    """In training, but for a frozen norm."""
    model.train()
    model.body[1].eval()
    return trains(model)


def trains(model: nn.Module) -> list[bool]:
    return [part.training for part in model.modules()]


EXTRACTORS: list[Callable[[Network], Any]] = [CAM, lambda model: GradCAM(model, "body"), EvalMode]


@pytest.mark.parametrize("first", EXTRACTORS)
@pytest.mark.parametrize("second", EXTRACTORS)
def test_who_leaves_last_restores_the_modes(first, second, model: Network) -> None:
    before = mixed_modes(model)
    one, other = first(model), second(model)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert not any(trains(model))
    one.__enter__()
    other.__exit__(None, None, None)
    assert not any(trains(model))
    one.__exit__(None, None, None)
    assert trains(model) == before
    nothing_left(model)


def test_a_network_and_a_part_of_it(model: Network) -> None:
    before = mixed_modes(model)
    whole, part = EvalMode(model), EvalMode(model.body)
    part.__enter__()
    assert model.training
    assert not any(trains(model.body))
    whole.__enter__()
    part.__exit__()
    assert not any(trains(model))
    part.__enter__()
    whole.__exit__()
    assert not any(trains(model.body))
    assert model.head.training
    part.__exit__()
    assert trains(model) == before
    nothing_left(model)


def test_modes_in_threads(model: Network) -> None:
    """A call takes the network out of training; the one that is through first must not bring it back."""
    before, images = mixed_modes(model), photos(2)
    cam = CAM(model, "body")
    alone = [cam(image) for image in images]
    inside, both, through = threading.Event(), threading.Event(), threading.Event()

    def hurried() -> Tensor:
        with CAM(model, "body") as cam:
            inside.set()
            assert both.wait(20)
            maps = cam(images[0])
        through.set()
        return maps

    def slow() -> Tensor:
        assert inside.wait(20)
        with CAM(model, "body") as cam:
            both.set()
            assert through.wait(20)
            assert not any(trains(model))
            return cam(images[1])

    assert all(map(torch.equal, in_threads([hurried, slow]), alone))
    assert trains(model) == before
    nothing_left(model)


def test_extractors_within_one_another(model: Network) -> None:
    before, (image, *_) = mixed_modes(model), photos()
    wanted = [WAYS[way](model)(image) for way in ("pooled", "Grad-CAM", "attention")]
    cam, grad_cam = CAM(model), GradCAM(model, "body")
    with torch.no_grad(), capture_attention(model) as layers, grad_cam, cam, cam:
        maps = cam(image)
        with cam:
            gradients = grad_cam(image, LABELS)
        assert torch.equal(torch.stack(layers), wanted[2])
        assert not any(trains(model))
    assert torch.equal(maps, wanted[0])
    assert torch.equal(gradients, wanted[1])
    assert trains(model) == before
    nothing_left(model)


def test_errors_leave_nothing_behind(model: Network) -> None:
    before, image = mixed_modes(model), torch.rand(2, 4, 8, 9)  # four colour channels
    grad_cam, cam = GradCAM(model, "body"), CAM(model)

    def within() -> None:
        with capture_attention(model), grad_cam, cam:
            with pytest.raises(RuntimeError):
                grad_cam(image, LABELS)
            assert not any(trains(model))
            cam(image)

    with pytest.raises(RuntimeError):
        within()
    assert trains(model) == before
    assert torch.is_grad_enabled()
    nothing_left(model)


def test_errors_behind_the_layer_leave_the_grad_mode(model: Network) -> None:
    """Grad-CAM turns gradients on half-way through the network."""
    model.head = nn.Linear(7, 5)
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            GradCAM(model, "body")(photos()[0], LABELS)
        assert not torch.is_grad_enabled()
    nothing_left(model)


def test_a_network_that_cannot_be_put_in_eval_mode(model: Network) -> None:
    class Stubborn(nn.Sequential):
        def train(self, mode: bool = True) -> "Stubborn":
            super().train(mode)
            if not mode:
                raise RuntimeError("never")
            return self

    network = Stubborn(model)
    before = mixed_modes(model)
    with pytest.raises(RuntimeError, match="never"):
        CAM(network)(photos()[0])
    assert trains(model) == before
    nothing_left(model)


def test_networks_are_let_go(model: Network) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    gone = weakref.ref(network)
    cam = CAM(network)
    cam(torch.rand(1, 3, 6, 6))
    cam.__enter__()  # and never left
    del cam, network
    gc.collect()
    assert gone() is None
    nothing_left(model)
