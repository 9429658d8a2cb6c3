"""psycopg2: simple queries only, values in the text of the statement."""

import psycopg2
import psycopg2.extras

import course


class Driver:
    def __init__(self, _mode, client):
        self.connection = psycopg2.connect("")
        self.connection.autocommit = True
        self.cursor = self.connection.cursor()
        self.channel = f"echo_{client}"

    def transfer(self, order):
        self.connection.autocommit = False
        with self.connection:
            run = self.cursor.execute
            run(
                "INSERT INTO ledger (client, n, aid, delta) VALUES (%s, %s, %s, %s)",
                (order.client, order.n, order.aid, order.delta),
            )
            run("UPDATE accounts SET abalance = abalance + %s WHERE aid = %s", (order.delta, order.aid))
            self.send(order)
        self.connection.autocommit = True

    def send(self, order):
        self.cursor.execute(
            "INSERT INTO parcel (client, n, body, sent) VALUES (%s, %s, %s, %s)",
            (order.client, order.n, psycopg2.Binary(order.body), order.sent),
        )

    def parcel(self, order):
        self.cursor.execute("SELECT body, sent FROM parcel WHERE client = %s AND n = %s", (order.client, order.n))
        body, sent = self.cursor.fetchone()
        return bytes(body), sent

    def collide(self, order, in_transaction):
        try:
            self.connection.autocommit = not in_transaction
            self.send(order)
        except psycopg2.Error as error:
            self.connection.rollback()
            return error.pgcode
        finally:
            self.connection.autocommit = True

    def begin_session(self):
        self.cursor.execute(f"SET work_mem = '7MB'; LISTEN {self.channel}")

    def setting(self):
        self.cursor.execute("SHOW work_mem")
        return self.cursor.fetchone()[0]

    def echo(self, order):
        self.cursor.execute("SELECT pg_notify(%s, %s)", (self.channel, str(order.n)))
        self.connection.poll()
        return self.connection.notifies.pop(0).payload if self.connection.notifies else None

    def learn_types(self):
        psycopg2.extras.register_composite("spot", self.cursor)
        oid, array_oid = self.numbers()
        psycopg2.extensions.register_type(psycopg2.extensions.new_type((oid,), "mood", psycopg2.STRING))
        array = psycopg2.extensions.new_array_type((array_oid,), "mood[]", psycopg2.STRING)
        psycopg2.extensions.register_type(array)

    def numbers(self):
        self.cursor.execute("SELECT 'mood'::regtype::oid, 'mood[]'::regtype::oid")
        return self.cursor.fetchone()

    def feel(self, order):
        self.cursor.execute(
            "INSERT INTO feeling (client, n, mood, moods, spot) VALUES (%s, %s, %s, %s::mood[], %s::spot)",
            (order.client, order.n, order.mood, [order.mood, "ok"], ("street", order.mood)),
        )
        self.cursor.execute(
            "SELECT mood, moods, spot FROM feeling WHERE client = %s AND n = %s", (order.client, order.n)
        )
        mood, moods, spot = self.cursor.fetchone()
        return mood, moods, tuple(spot)


course.run(Driver, psycopg2.__version__.split()[0])
