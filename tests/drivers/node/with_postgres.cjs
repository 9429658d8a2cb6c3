'use strict';
// postgres.js. Modes: prepared (its default), unprepared (prepare: false).

const postgres = require('postgres');
const course = require('./course.cjs');

class Driver {
  constructor(sql, number) {
    Object.assign(this, { sql, channel: `echo_${number}`, heard: [] });
  }

  onerror(callback) {
    this.report = callback;
  }

  transfer(order) {
    const { client, n, aid, delta } = order;
    return this.sql.begin(async (sql) => {
      await sql`INSERT INTO ledger (client, n, aid, delta) VALUES (${client}, ${n}, ${aid}, ${delta})`;
      await sql`UPDATE accounts SET abalance = abalance + ${delta} WHERE aid = ${aid}`;
      await this.send(sql, order);
    });
  }

  send(sql, { client, n, body, sent }) {
    return sql`INSERT INTO parcel (client, n, body, sent) VALUES (${client}, ${n}, ${body}, ${sent})`;
  }

  async parcel({ client, n }) {
    return (await this.sql`SELECT body, sent FROM parcel WHERE client = ${client} AND n = ${n}`)[0];
  }

  async collide(order, inTransaction) {
    try {
      await (inTransaction ? this.sql.begin((sql) => this.send(sql, order)) : this.send(this.sql, order));
      return 'nothing';
    } catch (error) {
      return error.code;
    }
  }

  // It listens on a connection of its own.
  async beginSession() {
    await this.sql`SET work_mem = '7MB'`;
    await this.sql.listen(this.channel, (payload) => this.hear(payload));
  }

  async setting() {
    return (await this.sql`SHOW work_mem`)[0].work_mem;
  }

  async echo({ n }) {
    const heard = new Promise((resolve, reject) => {
      this.hear = resolve;
      setTimeout(() => reject(new Error('no notification within 20 s')), 20000).unref();
    });
    await this.sql.notify(this.channel, String(n));
    return heard;
  }

  // Arrays it asks the catalogue about; enums and composites are text to it.
  async learnTypes() {}

  async feel({ client, n, mood }) {
    const [moods, spot] = [[mood, 'ok'], `(street,${JSON.stringify(mood)})`];
    await this.sql`INSERT INTO feeling (client, n, mood, moods, spot) VALUES (${client}, ${n}, ${mood}, ${moods}, ${spot})`;
    const row = (await this.sql`SELECT mood, moods, ARRAY[(spot).street, (spot).mood::text] AS spot FROM feeling
      WHERE client = ${client} AND n = ${n}`)[0];
    return [row.mood, row.moods, row.spot];
  }
}

course.run(async (mode, number) => {
  const sql = postgres({ max: 1, prepare: mode === 'prepared', onnotice: () => {}, max_lifetime: null, idle_timeout: null });
  await sql`SELECT 1`;
  return new Driver(sql, number);
}, 'postgres');
