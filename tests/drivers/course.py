"""The course that every driver of Python runs. What it does and says: README.md beside this file."""

import json
import sys
import threading
from datetime import datetime, timedelta, timezone
from typing import NamedTuple

ROUNDS_MAX = 2000
EPOCH = datetime(2026, 1, 1, tzinfo=timezone.utc)


class Wrong(Exception):
    """The driver said something that is not so."""


class Order(NamedTuple):
    """What one round writes."""

    client: int
    n: int

    @property
    def aid(self):
        return 1 + (self.client * 31 + self.n) % 1000

    @property
    def delta(self):
        return self.n % 7 - 3

    @property
    def body(self):
        return bytes((place + self.n) % 256 for place in range(300))

    @property
    def sent(self):
        return EPOCH + timedelta(milliseconds=self.n)

    @property
    def mood(self):
        return ["ok", "so, so", "it's {bad}"][self.n % 3]


def tell(**line):
    print(json.dumps(line), flush=True)


def check(what, found, wanted):
    if found != wanted:
        raise Wrong(f"{what}: {found!r}, wanted {wanted!r}")


def text(error):
    """One line that says the class too: drivers leave out what they find obvious."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")


def run(connect, version):
    """Runs the course over `connect(mode, client)`, which gives an object with the methods used below."""
    tell(version=version)
    mode, client, pooling, types, pace_ms = sys.argv[1:6]
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), stop.set()), daemon=True).start()
    done = {"rounds": 0, "refused": 0}
    try:
        driver = connect(mode, int(client))
        if pooling == "session":
            driver.begin_session()
        if types == "1":
            driver.learn_types()
    except Exception as error:
        tell(error=f"connecting: {text(error)}")
        stop.set()
    for n in range(1, ROUNDS_MAX + 1):
        if stop.is_set():
            break
        order = Order(int(client), n)
        try:
            driver.transfer(order)
        except Exception as error:
            tell(unknown=n, error=f"transfer: {text(error)}")
            break
        tell(acknowledged=n)
        try:
            afterwards(driver, order, pooling, types, done)
        except Exception as error:
            tell(error=f"round {n}: {text(error)}")
            break
        done["rounds"] = n
        stop.wait(int(pace_ms) / 1000)
    tell(done=done)


def afterwards(driver, order, pooling, types, done):
    check("parcel", driver.parcel(order), (order.body, order.sent))
    if order.n % 3 == 0:
        check("collision", driver.collide(order, order.n % 2 == 0), "23505")
        done["refused"] += 1
    if pooling == "session":
        check("work_mem", driver.setting(), "7MB")
        check("notification", driver.echo(order), str(order.n))
    if types == "1":
        wanted = (order.mood, [order.mood, "ok"], ("street", order.mood))
        check("feeling", driver.feel(order), wanted)
