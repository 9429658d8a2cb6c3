"""psycopg 3: extended protocol. Modes: plain, prepared (from the first time on), binary (and prepared), pipeline."""

import contextlib

import psycopg
from psycopg.types.composite import CompositeInfo, register_composite
from psycopg.types.enum import EnumInfo, register_enum

import course


class Driver:
    def __init__(self, mode, client):
        threshold = {"plain": None, "prepared": 0, "binary": 0, "pipeline": 0}[mode]
        self.binary = mode == "binary"
        self.pipelined = mode == "pipeline"
        self.connection = psycopg.connect("", autocommit=True, prepare_threshold=threshold)
        self.channel = f"echo_{client}"
        self.heard = []
        self.connection.add_notify_handler(lambda notify: self.heard.append(notify.payload))

    def run(self, sql, values=()):
        return self.connection.execute(sql, values, binary=self.binary)

    def transfer(self, order):
        pipeline = self.connection.pipeline() if self.pipelined else contextlib.nullcontext()
        with pipeline, self.connection.transaction():
            self.run(
                "INSERT INTO ledger (client, n, aid, delta) VALUES (%s, %s, %s, %s)",
                (order.client, order.n, order.aid, order.delta),
            )
            self.run("UPDATE accounts SET abalance = abalance + %s WHERE aid = %s", (order.delta, order.aid))
            self.send(order)

    def send(self, order):
        self.run(
            "INSERT INTO parcel (client, n, body, sent) VALUES (%s, %s, %b, %s)",
            (order.client, order.n, order.body, order.sent),
        )

    def parcel(self, order):
        found = self.run("SELECT body, sent FROM parcel WHERE client = %s AND n = %s", (order.client, order.n))
        body, sent = found.fetchone()
        return bytes(body), sent

    def collide(self, order, in_transaction):
        try:
            with self.connection.transaction() if in_transaction else contextlib.nullcontext():
                self.send(order)
        except psycopg.Error as error:
            return error.sqlstate

    def begin_session(self):
        self.connection.execute("SET work_mem = '7MB'")
        self.connection.execute(f"LISTEN {self.channel}")

    def setting(self):
        return self.run("SHOW work_mem").fetchone()[0]

    def echo(self, order):
        self.heard.clear()
        self.run("SELECT pg_notify(%s, %s)", (self.channel, str(order.n)))
        return self.heard[0] if self.heard else None

    def learn_types(self):
        register_enum(EnumInfo.fetch(self.connection, "mood"), self.connection)
        self.spot = CompositeInfo.fetch(self.connection, "spot")
        register_composite(self.spot, self.connection)
        self.mood = EnumInfo.fetch(self.connection, "mood")
        register_enum(self.mood, self.connection)

    def feel(self, order):
        label = self.mood.enum
        mood = next(one for one in label if one.name == order.mood)
        ok = next(one for one in label if one.name == "ok")
        self.run(
            "INSERT INTO feeling (client, n, mood, moods, spot) VALUES (%s, %s, %s, %s, %s)",
            (order.client, order.n, mood, [mood, ok], self.spot.python_type("street", mood)),
        )
        found = self.run("SELECT mood, moods, spot FROM feeling WHERE client = %s AND n = %s", (order.client, order.n))
        mood, moods, spot = found.fetchone()
        return mood.name, [one.name for one in moods], (spot.street, spot.mood.name)


course.run(Driver, psycopg.__version__)
