"""Works of minutes that shall be compared: they go through the same modules in turns of one module, so that a machine that is
slower for a while is slower for all of them."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

from torch import Tensor, nn

from nested_attention.bench.timing import wait_for_device


@dataclass(frozen=True)
class Work:
    """`run` is timed; `prepare` is called before each of its turns, and is not."""

    run: Callable[[], object]
    prepare: Callable[[], None]


class Turns:
    """One go of all `works`, each in a thread, of which one runs at a time: up to the next of the modules `stops`."""

    def __init__(self, works: Mapping[str, Work], stops: Iterable[nn.Module]):
        self.works, self.stops = works, list(stops)
        self.seconds = dict.fromkeys(works, 0.0)
        self.waiting = deque(works)
        self.batons = {name: threading.Semaphore(0) for name in works}
        self.mine = threading.local()  # `name` of the work of this thread, and `start` of its turn
        self.interrupted = False

    def run(self) -> dict[str, float]:
        """The seconds of each. What one raises is raised when all are through."""
        hooks = [stop.register_forward_pre_hook(self.change) for stop in self.stops]
        try:
            with ThreadPoolExecutor(len(self.works)) as pool:
                done = [pool.submit(self.go, name) for name in self.works]
                self.hand_on()
                try:
                    wait(done)
                except KeyboardInterrupt:
                    self.interrupted = True
                    raise
            for work in done:
                work.result()
        finally:
            for hook in hooks:
                hook.remove()
        return self.seconds

    def go(self, name: str) -> None:
        self.mine.name = name
        self.begin()
        try:
            self.works[name].run()
        finally:
            self.end()
            self.hand_on()

    def change(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.end()
        self.waiting.append(self.mine.name)
        self.hand_on()
        self.begin()
        if self.interrupted:
            raise KeyboardInterrupt

    def hand_on(self) -> None:
        if self.waiting:
            self.batons[self.waiting.popleft()].release()

    def begin(self) -> None:
        self.batons[self.mine.name].acquire()
        self.works[self.mine.name].prepare()
        wait_for_device()
        self.mine.start = time.perf_counter()

    def end(self) -> None:
        wait_for_device()
        self.seconds[self.mine.name] += time.perf_counter() - self.mine.start
