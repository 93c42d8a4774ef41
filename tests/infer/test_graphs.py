"""Which graphs are captured and replayed, with a stand-in for the card; tests/test_cuda.py has the card itself."""

import contextlib
import gc
import threading
import time
import weakref

import pytest
import torch

from hrpose.infer import Predictor, graphs
from hrpose.infer.graphs import Captured, Graphed
from hrpose.models import create_model


def network(images: torch.Tensor) -> torch.Tensor:
    """Each image by itself: a 1x1 convolution, in effect."""
    return torch.stack((images.sum(1), images[:, 0] * 2 + 1), 1)


class StandIn:
    """A card whose graphs run the network on their memory, slowly enough for other threads to come in between."""

    def __init__(self, fails: int | None = None) -> None:
        self.fails, self.captured, self.replayed, self.turns = fails, [], [], 0

    def capture(self, function, images):
        if len(images) == self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA")
        self.captured.append(
            (tuple(images.shape), images.dtype, images.is_contiguous(memory_format=torch.channels_last))
        )
        heatmaps = function(images).clone()

        def replay() -> None:
            time.sleep(0)
            self.replayed.append(len(images))
            heatmaps.copy_(function(images))

        return Captured(images, replay, heatmaps)

    @contextlib.contextmanager
    def turn(self):
        self.turns += 1
        yield


def images_of(n: int, seed: int = 0, side: int = 6) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(100 * n + seed))


def test_batches_are_filled_up_to_the_next_graph_and_large_ones_have_none():
    card = StandIn()
    graphed = Graphed(network, card)
    for n in (3, 1, 8, 4, 2, 7, 5, 3, 9, 40, 0):
        images = images_of(n)
        assert torch.equal(graphed(images), network(images)) and graphed(images).shape[0] == n
    assert [shape[0] for shape, *_ in card.captured] == [4, 1, 8, 2]  # in the order they were met, each once
    assert card.replayed == [s for s in (4, 1, 8, 4, 2, 8, 8, 4) for _ in range(2)]
    assert all(last for *_, last in card.captured) and graphed.reason is None


def test_results_stay_when_the_memory_is_used_again():
    graphed = Graphed(network, StandIn())
    first = graphed(images_of(2))
    kept = first.clone()
    graphed(images_of(2, seed=1))
    assert torch.equal(first, kept)


def test_every_shape_and_dtype_has_its_graph():
    card = StandIn()
    graphed = Graphed(network, card)
    for images in (images_of(2), images_of(2, side=8), images_of(2).double(), images_of(2)):
        assert torch.equal(graphed(images), network(images))
    assert [(shape[3], dtype) for shape, dtype, _ in card.captured] == [
        (6, torch.float32), (8, torch.float32), (6, torch.float64)
    ]  # fmt: skip


def test_what_cannot_be_captured_runs_without_and_says_why_once(recwarn):
    card = StandIn(fails=4)
    graphed = Graphed(network, card)
    for n in (2, 3, 4, 2, 1):
        assert torch.equal(graphed(images_of(n)), network(images_of(n)))
    assert graphed.reason == "operation not permitted when stream is capturing"
    assert [str(w.message) for w in recwarn] == [
        f"hrpose: no CUDA graphs, layers are launched one by one: {graphed.reason}"
    ]
    assert card.replayed == [2] and len(card.captured) == 1 and card.turns == 2


def test_an_error_of_the_network_itself_is_not_swallowed():
    def broken(images):
        raise ValueError("the network's own")

    with pytest.raises(ValueError, match="the network's own"):
        Graphed(broken, StandIn())(images_of(1))


def test_eight_threads_get_their_own_results():
    graphed, wrong = Graphed(network, StandIn()), []

    def work(seed: int) -> None:
        for i in range(60):
            images = images_of(1 + (seed + i) % 9, seed=seed * 1000 + i)
            if not torch.equal(graphed(images), network(images)):
                wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_memory_goes_with_it():
    graphed = Graphed(network, StandIn())
    graphed(images_of(2))
    memory = weakref.ref(next(iter(graphed._captured.values())).images)
    del graphed
    gc.collect()
    assert memory() is None


def test_predictor_has_them_on_cuda_unless_told_otherwise(monkeypatch):
    """With a card that stands in for one: the CPU says that it is CUDA when Predictor asks."""
    card = StandIn()
    monkeypatch.setattr(graphs, "Cuda", lambda device: card)
    monkeypatch.setattr(Predictor, "_has_graphs", lambda self: True)
    torch.manual_seed(0)
    model = create_model("dpn1_32", 3)
    photo = torch.randint(256, (60, 80, 3), dtype=torch.uint8).numpy()
    boxes = [[5, 6, 30, 40], [20, 10, 50, 45], [0, 0, 80, 60]]
    with_graphs = Predictor(model, size=(32, 48))
    without = Predictor(model, size=(32, 48), graphs=False)
    assert isinstance(with_graphs.network, Graphed) and not isinstance(without.network, Graphed)
    for some in (boxes, boxes[:1]):
        a, b = with_graphs(photo, some), without(photo, some)
        torch.testing.assert_close(torch.from_numpy(a.keypoints), torch.from_numpy(b.keypoints), rtol=0, atol=1e-3)
    assert [shape[0] for shape, *_ in card.captured] == [4, 1]


def test_there_are_none_on_the_cpu():
    assert not isinstance(Predictor(create_model("dpn1_32", 3), size=(32, 48)).network, Graphed)
