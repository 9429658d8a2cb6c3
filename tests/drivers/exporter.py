"""Replays the scrape of pgbouncer_exporter and prints what the driver made of each answer, as one JSON object.

Like the exporter's driver (lib/pq) this one sends simple queries and decodes each value by the type that the answer
declares. Nothing is judged here: an error of the driver ends the program, the rest is for the test to read.

Usage: exporter.py DSN
"""

import json
import sys

import psycopg2

# In the exporter's order: the version once, then its three special tables, its maps, and the ping for `up`.
SCRAPE = [
    "SHOW VERSION;",
    "SHOW STATS",
    "SHOW LISTS",
    "SHOW CONFIG",
    "SHOW CLIENTS",
    "SHOW DATABASES;",
    "SHOW STATS_TOTALS;",
    "SHOW POOLS;",
]


def value(cell):
    """The Python type that the driver made, and the text of the value."""
    return None if cell is None else [type(cell).__name__, str(cell)]


def answer(connection, command):
    with connection.cursor() as cursor:
        cursor.execute(command)
        return {
            "tag": cursor.statusmessage,
            "columns": [[column.name, column.type_code] for column in cursor.description],
            "rows": [[value(cell) for cell in row] for row in cursor.fetchall()],
        }


def main():
    connection = psycopg2.connect(sys.argv[1])
    connection.autocommit = True
    answers = {command.split()[1].rstrip(";"): answer(connection, command) for command in SCRAPE}
    connection.close()
    json.dump(answers, sys.stdout)


main()
