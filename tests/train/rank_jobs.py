"""What the processes of test_distributed do, in a module that they can import."""

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
from datetime import timedelta

import pytest
import torch
from test_fit import DOTS, TINY, Poisoned, dataset, weight_score

from hrpose.checkpoint import digest, load_checkpoint
from hrpose.data.coco import load_annotations
from hrpose.data.dataset import EpochBatches
from hrpose.errors import InputError
from hrpose.infer.evaluate import estimate_persons, evaluate
from hrpose.infer.protocol import Protocol
from hrpose.models import create_model
from hrpose.ranks import joined
from hrpose.train.fit import LAST, Diverged, fit
from hrpose.train.stop import Interrupted

LOOP = sys.modules[fit.__module__]
LOOP_STEP = LOOP.train_step


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(connection, work, rank: int, world: int, port: int, arguments) -> None:
    """The life of one rank: what `work` returns or raises goes to the test."""
    torch.set_num_threads(1)
    names = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    try:
        with joined() as ranks:
            result = work(ranks, *arguments)
        connection.send_bytes(pickle.dumps(result))
    except (InputError, Interrupted) as error:
        connection.send_bytes(pickle.dumps((type(error), str(error))))


def on_ranks(world: int, work, *arguments, patience: float = 120.0) -> list:
    """What work(ranks, *arguments) returns on each of `world` processes that talk by gloo; for InputError and
    Interrupted type and message; None for a process that died."""
    context = multiprocessing.get_context("forkserver")  # which has loaded torch once, and used none of it
    context.set_forkserver_preload(["torch", "hrpose.train.fit", "hrpose.infer.evaluate"])
    port, found, processes = free_port(), [], []
    for rank in range(world):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=start, args=(theirs, work, rank, world, port, arguments))
        process.start()
        theirs.close()
        processes.append((process, mine))
    end = time.monotonic() + patience
    try:
        for process, connection in processes:
            assert connection.poll(max(0.0, end - time.monotonic())), "a rank hangs"
            try:
                found.append(pickle.loads(connection.recv_bytes()))
            except EOFError:
                found.append(None)
            process.join(max(0.0, end - time.monotonic()))
            assert process.exitcode is not None, "a rank does not end"
    finally:
        for process, _ in processes:
            process.kill()
    return found


def network(seed: int = 0, double: bool = False, norm: bool = True) -> torch.nn.Module:
    """The smallest network; without `norm`, batch norm always uses its initial statistics: 0 and 1."""
    torch.manual_seed(seed)
    model = create_model("dpn1_32", 5)
    if double:
        model.double().register_forward_pre_hook(lambda module, given: (given[0].double(),))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and not norm:
            module.eval().train = lambda mode=True: None
    return model


def train(ranks, persons, folder, out, recipe=TINY, double=False, norm=True, broken=None, resume=False, **options):
    """Weights and loss of each epoch after a run; `broken`: what is made wrong, to see that it is noticed."""
    if broken == "averaging":
        LOOP.with_averaged_gradients = lambda model, *rest: model
    if broken == "stride":
        LOOP.EpochBatches = lambda *arguments: EpochBatches(*arguments[:5], 0, *arguments[6:])
    if broken == "statistics":
        LOOP.SharedStatistics.average = lambda self: None
    model = network(ranks.rank, double, norm)  # other weights on each rank, but for rank 0's none count
    log = fit(
        model, dataset(persons, folder, recipe), recipe, out, report=lambda line: None, ranks=ranks, resume=resume,
        **options,
    )  # fmt: skip
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return weights, [entry["loss"] for entry in log]


def stopped_and_resumed(ranks, persons, folder, out, recipe):
    """SIGTERM to the last rank alone in its second step, then on to the end; a third run that nothing stops."""
    count = 0

    def counted(*arguments):
        nonlocal count
        count += 1
        if count == 2 and ranks.rank == ranks.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return LOOP_STEP(*arguments)

    LOOP.train_step = counted
    with pytest.raises(Interrupted, match="stopped in epoch 1 after 2 of ") as caught:
        train(ranks, persons, folder, out / "stopped", recipe)
    assert caught.value.exit_code == 128 + signal.SIGTERM
    progress = load_checkpoint(out / "stopped" / LAST).training["progress"]
    LOOP.train_step = LOOP_STEP
    weights, _ = train(ranks, persons, folder, out / "stopped", recipe, resume=True, validate=weight_score)
    whole, _ = train(ranks, persons, folder, out / "whole", recipe, validate=weight_score)
    return digest(weights), digest(whole), (progress["epoch"], progress["step"])


def train_on_bad(ranks, persons, folder, out, bad, recipe):
    lines = []
    data = Poisoned(persons, folder, (32, 32), DOTS, recipe.augmentation, recipe.seed)
    data.bad = frozenset(bad)
    model = network()
    try:
        fit(model, data, recipe, out, report=lines.append, ranks=ranks)
    except Diverged as error:
        lines.append(str(error))
    return lines, digest(model.state_dict()), all(bool(t.isfinite().all()) for t in model.state_dict().values())


def estimate_and_score(ranks, path, folder, workers):
    done, model, annotations = [], network().eval(), load_annotations(path)
    found = estimate_persons(
        model, annotations.persons, folder, (32, 32), annotations, Protocol(), 7, workers, done.append, ranks
    )
    score = evaluate(model, annotations, folder, (32, 32), batch_size=7, workers=workers, ranks=ranks)
    return sum(done), found, score


def evaluate_broken(ranks, path, folder):
    return evaluate(network().eval(), load_annotations(path), folder, (32, 32), ranks=ranks)


def train_until_killed(ranks, persons, folder, out):
    def deadly(*arguments):
        if ranks.rank == 1 and (out / "log.jsonl").stat().st_size:
            os.kill(os.getpid(), signal.SIGKILL)
        return LOOP_STEP(*arguments)

    LOOP.train_step = deadly
    return train(ranks, persons, folder, out)


def train_on_unlike(ranks, persons, folder, out):
    return train(ranks, persons[: 14 - ranks.rank], folder, out)


def wait_for_the_first(ranks, seconds: float, patience: float) -> list[int]:
    """Rank 0 works for some seconds, the others have done nothing at once."""
    return ranks.on_all(lambda: time.sleep(0 if ranks.rank else seconds) or ranks.rank, timedelta(seconds=patience))
