"""asyncpg: extended protocol, binary. Modes: cache (named statements kept), no-cache (statement_cache_size = 0)."""

import asyncio
import os

import asyncpg

import course


class Driver:
    def __init__(self, mode, client):
        self.loop = asyncio.new_event_loop()
        size = 100 if mode == "cache" else 0
        name = {"application_name": os.environ.get("PGAPPNAME", "asyncpg")}
        self.connection = self.wait(asyncpg.connect(statement_cache_size=size, server_settings=name))
        self.channel = f"echo_{client}"
        self.heard = []

    def wait(self, coroutine):
        return self.loop.run_until_complete(coroutine)

    def transfer(self, order):
        async def transfer():
            async with self.connection.transaction():
                run = self.connection.execute
                await run(
                    "INSERT INTO ledger (client, n, aid, delta) VALUES ($1, $2, $3, $4)",
                    order.client, order.n, order.aid, order.delta,
                )
                await run("UPDATE accounts SET abalance = abalance + $1 WHERE aid = $2", order.delta, order.aid)
                await self.send(order)

        self.wait(transfer())

    def send(self, order):
        sql = "INSERT INTO parcel (client, n, body, sent) VALUES ($1, $2, $3, $4)"
        return self.connection.execute(sql, order.client, order.n, order.body, order.sent)

    def parcel(self, order):
        sql = "SELECT body, sent FROM parcel WHERE client = $1 AND n = $2"
        return tuple(self.wait(self.connection.fetchrow(sql, order.client, order.n)))

    def collide(self, order, in_transaction):
        async def collide():
            if not in_transaction:
                return await self.send(order)
            async with self.connection.transaction():
                await self.send(order)

        try:
            self.wait(collide())
        except asyncpg.PostgresError as error:
            return error.sqlstate

    def begin_session(self):
        self.wait(self.connection.execute("SET work_mem = '7MB'"))
        listener = lambda _connection, _pid, _channel, payload: self.heard.append(payload)
        self.wait(self.connection.add_listener(self.channel, listener))

    def setting(self):
        return self.wait(self.connection.fetchval("SHOW work_mem"))

    def echo(self, order):
        self.heard.clear()
        self.wait(self.connection.execute("SELECT pg_notify($1, $2)", self.channel, str(order.n)))
        # It has come with the answer, but the driver calls its listeners in a turn of their own.
        self.wait(asyncio.sleep(0))
        return self.heard[0] if self.heard else None

    def learn_types(self):
        """It asks the catalogue by itself."""

    def feel(self, order):
        mood = order.mood
        sql = "INSERT INTO feeling (client, n, mood, moods, spot) VALUES ($1, $2, $3, $4, $5)"
        self.wait(self.connection.execute(sql, order.client, order.n, mood, [mood, "ok"], ("street", mood)))
        sql = "SELECT mood, moods, spot FROM feeling WHERE client = $1 AND n = $2"
        mood, moods, spot = self.wait(self.connection.fetchrow(sql, order.client, order.n))
        return mood, moods, tuple(spot)


course.run(Driver, asyncpg.__version__)
